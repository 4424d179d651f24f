"""Reading: a prompt with images -> answer tokens, greedy or sampled, with a static KV cache.

Legend: B conversations, S prompt slots (bucketed), M images of a prompt, T slots of the cache, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jflow.models.janusflow import JanusFlow, normalise
from jflow.models.llm import Cache


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def prefill(
  model: JanusFlow,
  params: Any,
  tokens_BS: jax.Array,
  lengths_B: jax.Array,
  images_BMHWC: jax.Array,
  image_index_BS: jax.Array,
  *,
  slots: int,
) -> tuple[jax.Array, Cache]:
  """Reads prompts once.

  Args:
    tokens_BS: int32, padded on the right.
    lengths_B: int32 true lengths.
    images_BMHWC: uint8; M may be 0.
    image_index_BS: int32 into the [M * K] image slots of the row; -1 where a token stands.
    slots: size of the cache to make; at least S plus the tokens to generate.

  Returns:
    (f32[B, V] logits of the first answer token, cache).
  """
  apply = functools.partial(model.apply, {"params": params})
  b, s = tokens_BS.shape
  m = images_BMHWC.shape[1]
  if m:
    pixels = normalise(images_BMHWC.reshape(b * m, *images_BMHWC.shape[2:]))
    images = apply(apply(pixels, method="features"), method="read_slots")
    x = apply(tokens_BS, images.reshape(b, -1, images.shape[-1]), image_index_BS, method="assemble")
  else:
    x = apply(tokens_BS, method="embed")
  segments = (jnp.arange(s) < lengths_B[:, None]).astype(jnp.int32)
  cache = Cache.empty(model.config.language_model, b, slots, x.dtype)
  out = apply(x, jnp.broadcast_to(jnp.arange(s), (b, s)), segments, cache, method="backbone")
  last = jnp.take_along_axis(out.hidden, lengths_B[:, None, None] - 1, axis=1)[:, 0]
  return apply(last, method="logits"), out.cache


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("cache",))
def decode(
  model: JanusFlow, params: Any, tokens_B: jax.Array, positions_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
  """Feeds one token per conversation; returns (f32[B, V] logits of the next, cache updated in place)."""
  apply = functools.partial(model.apply, {"params": params})
  x = apply(tokens_B[:, None], method="embed")
  out = apply(x, positions_B[:, None], jnp.ones_like(tokens_B)[:, None], cache, method="backbone")
  return apply(out.hidden[:, 0], method="logits"), out.cache


@jax.jit
def pick(logits_BV: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
  """The next tokens: the most likely at temperature 0, else sampled from the nucleus of mass `top_p`.

  Args:
    temperature: f32[], at least 0.
    top_p: f32[] in (0, 1]; the smallest set of most likely tokens whose mass reaches it is kept.

  Returns:
    int32[B].
  """
  greedy = jnp.argmax(logits_BV, axis=-1)
  scaled = logits_BV / jnp.maximum(temperature, 1e-6)
  order = jnp.argsort(-scaled, axis=-1)
  probabilities = jax.nn.softmax(jnp.take_along_axis(scaled, order, axis=-1), axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  kept = jnp.where(before < top_p, jnp.log(probabilities), -jnp.inf)
  drawn = jax.random.categorical(key, kept, axis=-1)
  sampled = jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0]
  return jnp.where(temperature > 0, sampled, greedy).astype(jnp.int32)
