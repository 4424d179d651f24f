"""The objective of codes (Janus, eq. 1, on image positions): cross entropy by the head of codes.

Legend: I images, P codes of an image, Q of them at once, D embed, V rows of the codebook.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

_AT_ONCE = 64  # codes of an image whose logits exist at once


def loss(
  head: Callable[[jax.Array], jax.Array], hidden_IPD: jax.Array, codes_IP: jax.Array, mask_I: jax.Array
) -> jax.Array:
  """The sum over masked images of the mean over codes of -log softmax(head(hidden))[code], f32[].

  The logits are made a few codes at a time, and again in the backward pass.

  Args:
    head: [I, Q, D] -> f32[I, Q, V].
    hidden_IPD: the LLM's output that predicts each code.
    codes_IP: int32.
    mask_I: bool, the images that count.
  """
  i, p = codes_IP.shape
  size = min(_AT_ONCE, p)
  pad = -p % size
  cut = lambda x: jnp.moveaxis(
    jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)).reshape(i, -1, size, *x.shape[2:]), 1, 0
  )
  piece = jax.checkpoint(lambda part: cross_entropy(head(part[0]), part[1]))
  nats = jax.lax.map(piece, (cut(hidden_IPD), cut(codes_IP)))
  nats_IP = jnp.moveaxis(nats, 0, 1).reshape(i, p + pad)[:, :p]
  return jnp.sum(jnp.where(mask_I, jnp.mean(nats_IP, axis=1), 0.0))


def cross_entropy(logits: jax.Array, codes: jax.Array) -> jax.Array:
  """-log softmax(logits)[code]: f32[..., V], int32[...] -> f32[...]."""
  picked = jnp.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - picked
