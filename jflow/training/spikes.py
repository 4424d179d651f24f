"""The guard against loss spikes: a step whose loss or gradient norm is far above recent ones is skipped.

The recent values are part of the state, so that a resumed run makes the same decisions.
"""

import jax
import jax.numpy as jnp
from flax import struct


class Recent(struct.PyTreeNode):
  """Loss and gradient norm of the last `window` accepted steps, in a ring."""

  values: jax.Array  # f32[2, window]; row 0 the loss, row 1 the gradient's norm
  count: jax.Array  # int32[]; accepted steps since the start

  @classmethod
  def empty(cls, window: int) -> "Recent":
    return cls(jnp.zeros((2, window), jnp.float32), jnp.zeros((), jnp.int32))


def is_spike(recent: Recent, loss: jax.Array, norm: jax.Array, sigmas: float) -> jax.Array:
  """Whether loss or norm is more than `sigmas` standard deviations above its mean over a full window.

  Before the window is full nothing is a spike, since the loss falls too steeply in the first steps.

  Returns:
    bool[].
  """
  limit = jnp.mean(recent.values, axis=1) + sigmas * jnp.std(recent.values, axis=1)
  return (recent.count >= recent.values.shape[1]) & jnp.any(jnp.stack([loss, norm]) > limit)


def remember(recent: Recent, loss: jax.Array, norm: jax.Array, accepted: jax.Array) -> Recent:
  """Adds an accepted step in place of the oldest one. A rejected one is not added: it would raise the limit."""
  place = recent.count % recent.values.shape[1]
  values = recent.values.at[:, place].set(jnp.stack([loss, norm]).astype(jnp.float32))
  return Recent(jnp.where(accepted, values, recent.values), recent.count + accepted.astype(jnp.int32))
