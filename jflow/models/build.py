"""Initial parameters of a model, and their shapes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jflow import sharding
from jflow.batch import RowShape, empty
from jflow.generation.base import family
from jflow.models.config import ModelConfig
from jflow.models.unified import UnifiedModel, make_writer


def initial_params(model: UnifiedModel, seed: int) -> Any:
  """Initial parameters, boxed with their logical axes; to be traced by `initial.create` or `jax.eval_shape`."""
  return _initial_params(model.clone(remat="none", capacity=None), seed)


@functools.partial(jax.jit, static_argnames=("model", "seed"), inline=True)  # traced once for all that ask
def _initial_params(model: UnifiedModel, seed: int) -> Any:
  c = model.config
  slots = family(c.generation).layout.slots(c.written_patches)
  shape = RowShape(2 * (1 + max(c.patches, c.written_patches)), 1, c.patches, c.image_size, c.generation.kind, slots)
  batch = jax.tree.map(jnp.asarray, empty(1, shape))
  draws = make_writer(c, model.dtype).example_draws(batch)
  params = model.init(jax.random.key(seed), batch, draws, method="initialise")["params"]
  if c.reader.kind == "separate":  # equal at the start, trained apart (paper section 4.5)
    params["latent_encoder"] = params["generation_encoder"]
  return params


@functools.lru_cache(maxsize=16)
def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns {path joined by "/": shape} of every parameter of a model; nothing is allocated."""
  model = UnifiedModel(config, jnp.dtype("float32"), "none", 1, "xla")
  boxed = jax.eval_shape(lambda: initial_params(model, 0))
  flat: dict[str, Any] = flatten_dict(sharding.unbox(boxed), sep="/")
  return {path: x.shape for path, x in flat.items()}
