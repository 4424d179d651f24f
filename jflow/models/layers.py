"""Linear maps and norms of the LLM and the encoders. Parameters are f32 masters; compute is in `dtype`.

Legend: B batch, S sequence, D embed, C channels.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jflow.models import fp8
from jflow.models.initial import Normal
from jflow.models.lora import NAMES, SCALE, low_rank
from jflow.sharding import boxed, whole

Axes = tuple[str | None, ...]


def parameter(
  module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...], axes: Axes
) -> jax.Array:
  """Declares an f32 parameter with one logical axis name (see `jflow.sharding.RULES`) per dimension."""
  return module.param(name, boxed(init, axes), shape, jnp.float32)


class Linear(nn.Module):
  """y = x W + b on the last axis. `kernel` f32[in, out], `bias` f32[out]; with an adapter beside it, see `lora`.

  For inference on a GPU the parameters may hold W as `transposed_kernel` [out, in] in its place, see `transposed`.

  Attributes:
    result: type of y, the sums' own; None: `dtype`, to which they are rounded.
    matmul: "dtype", or "fp8" for a product in 8 bits, see `fp8`; an adapter's stay in `dtype`.
  """

  features: int
  axes: tuple[str | None, str | None]
  dtype: Any
  use_bias: bool
  kernel_init: nn.initializers.Initializer = Normal()
  result: Any = None
  matmul: str = fp8.DTYPE

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if self.has_variable("params", "transposed_kernel"):
      kernel_FD = self.get_variable("params", "transposed_kernel").astype(self.dtype)
      y = jax.lax.dot_general(x.astype(self.dtype), kernel_FD, (((x.ndim - 1,), (1,)), ((), ())), None, self.result)
    else:
      kernel = parameter(self, "kernel", self.kernel_init, (x.shape[-1], self.features), self.axes)
      # One leading axis: XLA:CPU is slower on the kernel's gradient when it contracts over two.
      rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
      if self.matmul == fp8.FP8:
        y = fp8.product(rows, kernel, self.axes)
      else:
        weights = whole(kernel.astype(self.dtype), *self.axes)
        y = jnp.dot(rows, weights) if self.result is None else unrounded(rows, weights, self.result)
      if self.has_variable("params", SCALE):
        a, b, scale = (self.get_variable("params", name) for name in NAMES)
        y = y + low_rank(
          x.reshape(-1, x.shape[-1]), whole(a, self.axes[0], None), whole(b, None, self.axes[1]), scale, self.dtype
        )
      y = y.reshape(*x.shape[:-1], self.features)
    if self.use_bias:
      bias = parameter(self, "bias", nn.initializers.zeros, (self.features,), self.axes[1:])
      y = y + whole(bias.astype(self.result or self.dtype), self.axes[1])
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def unrounded(x: jax.Array, kernel: jax.Array, result: Any) -> jax.Array:
  """x @ kernel in the type of the sums; the gradient's products are in the type of the factors, as everywhere."""
  return jnp.dot(x, kernel, preferred_element_type=result)


def _unrounded_forward(x, kernel, result):
  return unrounded(x, kernel, result), (x, kernel)


def _unrounded_backward(result, factors, dy):
  x, kernel = factors
  dy = dy.astype(x.dtype)
  return jnp.dot(dy, kernel.T), jnp.dot(x.T, dy)


unrounded.defvjp(_unrounded_forward, _unrounded_backward)


class Projector(nn.Module):
  """Linear maps to one width with the exact GELU between them, `layers_K`: an aligner of Janus (its "mlp_gelu")."""

  features: int
  depth: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for k in range(self.depth):
      axes = ("embed" if k else None, None if k else "embed")
      x = Linear(self.features, axes, self.dtype, use_bias=True, name=f"layers_{k}")(gelu(x, "erf") if k else x)
    return x


def side_by_side(
  module: nn.Module, x: jax.Array, features: dict[str, int], make: Callable[..., Linear]
) -> list[jax.Array]:
  """The results of several linear maps of one input, by one product where the parameters hold them merged.

  Args:
    module: whose children the maps are, each under its name.
    x: [..., in].
    features: name -> outputs.
    make: (outputs, name) -> the map.
  """
  merged = "_".join(features)
  if not module.has_variable("params", merged):
    return [make(count, name)(x) for name, count in features.items()]
  y = make(sum(features.values()), merged)(x)
  return jnp.split(y, np.cumsum(list(features.values()))[:-1].tolist(), axis=-1)


def transposed(params: dict[str, Any], merge: Sequence[Sequence[str]]) -> dict[str, Any]:
  """The parameters of a layer with every kernel of a `Linear` as [out, in], and those of `merge` as one.

  A GPU reads the rows of such a matrix where it multiplies one vector by it; of [in, out] XLA makes a copy each time.

  Args:
    params: nested; NumPy or JAX arrays.
    merge: groups of names of maps without bias that `side_by_side` computes, wherever all of them stand. A map with an
      adapter stays as it is.
  """
  out: dict[str, Any] = {}
  alone = lambda name: set(params.get(name, ())) == {"kernel"}
  taken = [group for group in merge if group and all(map(alone, group))]
  for group in taken:
    kernels = [params[name]["kernel"].T for name in group]
    join = np.concatenate if isinstance(kernels[0], np.ndarray) else jnp.concatenate
    out["_".join(group)] = {"transposed_kernel": join(kernels)}
  for name, x in params.items():
    if any(name in group for group in taken):
      continue
    if isinstance(x, dict):
      out[name] = transposed(x, merge)
    elif name == "kernel" and x.ndim == 2 and set(params) <= {"kernel", "bias"}:
      out["transposed_kernel"] = x.T
    else:
      out[name] = x
  return out


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, computed in f32, returned in `dtype`."""

  epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],), (None,))
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
    return (x * scale).astype(self.dtype)


class LayerNorm(nn.Module):
  """Layer norm with scale and bias over the last axis, computed in f32, returned in `dtype`."""

  epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],), (None,))
    bias = parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],), (None,))
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
    return (x * scale + bias).astype(self.dtype)


def gelu(x: jax.Array, kind: str) -> jax.Array:
  """GELU in the dtype of x, computed in f32: exact ("erf") or the tanh approximation ("tanh").

  By erf, as PyTorch: jax's own form, by erfc, takes tens of kernels on a GPU.
  """
  x32 = x.astype(jnp.float32)
  y = jax.nn.gelu(x32) if kind == "tanh" else 0.5 * x32 * (1.0 + jax.lax.erf(x32 * math.sqrt(0.5)))
  return y.astype(x.dtype)
