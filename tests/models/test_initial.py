"""Fresh parameters: drawn together or one by one, they are the same bits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import sharding
from jflow.models import initial
from jflow.models.initial import Normal
from jflow.models.layers import Linear, RMSNorm, parameter


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    x = RMSNorm(1e-6, jnp.float32, name="norm")(x)
    return Linear(8, ("embed", "mlp"), jnp.float32, use_bias=True, name="linear")(x), None


class Model(nn.Module):
  """Every initialiser, twice in the same shape, scanned layers, a loop over rows, an initialiser of someone else."""

  @nn.compact
  def __call__(self, x):
    x = x @ parameter(self, "embed", Normal(0.02), (12, 8), ("vocab", "embed"))
    x = x @ parameter(self, "square_1", Normal(), (8, 8), (None, None))
    x = x @ parameter(self, "square_2", Normal(), (8, 8), (None, None))
    x = x @ parameter(self, "foreign", nn.initializers.he_normal(), (8, 8), (None, "embed"))
    x = x @ parameter(self, "convolution", Normal(), (3, 3, 8, 8), (None,) * 4).sum((0, 1))
    x = jax.lax.map(lambda row: 2.0 * row, x)
    scan = nn.scan(
      Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=3,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    x = scan(name="layers")(x, None)[0]
    return jax.lax.map(lambda row: row + 1, x)  # over an array that a key has drawn, not over keys


def make():
  """Fresh parameters, one of them in another type, as what is frozen may be."""
  params = Model().init(jax.random.key(5), jnp.zeros((2, 12)))["params"]
  return params | {"square_2": jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["square_2"])}


@pytest.mark.parametrize("large", [100, 1 << 18])
def test_bits_are_those_of_the_initialisers(monkeypatch, large):
  monkeypatch.setattr(initial, "_LARGE", large)
  mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  made = initial.create(make, mesh)
  expected = jax.jit(lambda: sharding.unbox(make()), compiler_options={"xla_backend_optimization_level": 0})()
  jax.tree.map(np.testing.assert_array_equal, made, expected)
  kernels = np.asarray(made["layers"]["linear"]["kernel"])
  assert kernels.shape == (3, 8, 8) and len(np.unique(kernels)) == kernels.size  # no draw stands twice
