"""The guard against loss spikes: a step far above the steps before it changes nothing.

What it compares with is part of the state, so that a run that was killed inside a spike decides as one that
was not.
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
  """Whether loss or norm lie more than `sigmas` standard deviations above their mean over a full window.

  Before the window is full nothing is a spike: the first steps of a run fall too steeply to judge.

  Returns:
    bool[]
  """
  limit = jnp.mean(recent.values, axis=1) + sigmas * jnp.std(recent.values, axis=1)
  return (recent.count >= recent.values.shape[1]) & jnp.any(jnp.stack([loss, norm]) > limit)


def remember(recent: Recent, loss: jax.Array, norm: jax.Array, accepted: jax.Array) -> Recent:
  """Adds an accepted step in place of the oldest one. A rejected one leaves no trace: it must not widen the limit."""
  place = recent.count % recent.values.shape[1]
  values = recent.values.at[:, place].set(jnp.stack([loss, norm]).astype(jnp.float32))
  return Recent(jnp.where(accepted, values, recent.values), recent.count + accepted.astype(jnp.int32))
