"""Linear maps and norms of the LLM and the encoders. Parameters are f32 masters; compute is in `dtype`.

Legend: B batch, S sequence, D embed, C channels.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow.sharding import boxed, whole

Axes = tuple[str | None, ...]


def parameter(
  module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...], axes: Axes
) -> jax.Array:
  """Declares an f32 parameter with one logical axis name (see `jflow.sharding.RULES`) per dimension."""
  return module.param(name, boxed(init, axes), shape, jnp.float32)


class Linear(nn.Module):
  """y = x W + b on the last axis. `kernel` f32[in, out], `bias` f32[out]."""

  features: int
  axes: tuple[str | None, str | None]
  dtype: Any
  use_bias: bool
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = parameter(self, "kernel", self.kernel_init, (x.shape[-1], self.features), self.axes)
    # One leading axis: XLA:CPU is slower on the kernel's gradient when it contracts over two.
    y = jnp.dot(x.astype(self.dtype).reshape(-1, x.shape[-1]), whole(kernel.astype(self.dtype), *self.axes))
    y = y.reshape(*x.shape[:-1], self.features)
    if self.use_bias:
      bias = parameter(self, "bias", nn.initializers.zeros, (self.features,), self.axes[1:])
      y = y + whole(bias.astype(self.dtype), self.axes[1])
    return y


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
  """GELU, exact ("erf") or the tanh approximation ("tanh")."""
  return jax.nn.gelu(x, approximate=kind == "tanh")
