"""The rectified-flow objective (eq. 7): the mean squared error of the velocity."""

import jax
import jax.numpy as jnp


def loss(velocity: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
  """The sum over masked images of the mean squared error of the velocity.

  Args:
    velocity, target: [..., h, w, C].
    mask: bool[...] of the images that count.
  """
  error = jnp.square(velocity.astype(jnp.float32) - target.astype(jnp.float32))
  return jnp.sum(jnp.where(mask, jnp.mean(error, axis=(-3, -2, -1)), 0.0))
