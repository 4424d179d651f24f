"""Plain forms of what jflow computes in a faster way: what the tests compare with."""

import jax
import jax.numpy as jnp


def next_token(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
  """Sum over masked positions of -log p(target) (eq. 6).

  Args:
    logits: f32[..., V].
    targets: int32[...].
    mask: bool[...] of the positions that count.
  """
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  nll = jax.nn.logsumexp(logits, axis=-1) - picked
  return jnp.sum(jnp.where(mask, nll, 0.0))
