"""The objectives, pure: each returns a sum and the caller divides by a count taken over the global batch."""

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


def flow(velocity: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
  """Sum over masked images of the mean squared error of the velocity (eq. 7).

  Args:
    velocity, target: [..., h, w, C].
    mask: bool[...] of the images that count.
  """
  error = jnp.square(velocity.astype(jnp.float32) - target.astype(jnp.float32))
  return jnp.sum(jnp.where(mask, jnp.mean(error, axis=(-3, -2, -1)), 0.0))


def alignment(projected: jax.Array, features: jax.Array, mask: jax.Array) -> jax.Array:
  """Minus the sum over masked images of the mean cosine over patches (REPA, eq. 8).

  `features` (the understanding encoder's) are held constant here, by stop_gradient.

  Args:
    projected: [..., P, E], the alignment head on LLM features of the latent tokens.
    features: [..., P, E].
    mask: bool[...] of the images that count.
  """
  features = jax.lax.stop_gradient(features).astype(jnp.float32)
  projected = projected.astype(jnp.float32)
  dot = jnp.sum(projected * features, axis=-1)
  norms = jnp.sqrt(jnp.sum(projected**2, -1) * jnp.sum(features**2, -1) + 1e-12)
  return -jnp.sum(jnp.where(mask, jnp.mean(dot / norms, axis=-1), 0.0))
