"""The compiled programs of answering: prefill of prompts with images, then decoding of all rows at once.

`run` loops on the device until its tokens are decoded or all rows have ended: nothing returns to the host between two
tokens.

Legend: B rows, S prompt slots (bucketed), M images of a prompt (bucketed), K = 1 + P slots of an image, Z = M K,
D embed, V vocab.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jflow.models.cache import Cache
from jflow.models.unified import UnifiedModel, normalise
from jflow.programs import bounded

CHUNK = 64  # most tokens per row of one call of `run`


class Rows(struct.PyTreeNode):
  """The decoding state of the rows of a batch."""

  cache: Cache
  tokens: jax.Array  # int32[B], the newest token, not in the cache yet
  active: jax.Array  # bool[B]; the row has not ended
  made: jax.Array  # int32[B], tokens decoded so far, the end of the text included
  limit: jax.Array  # int32[B], most tokens to decode
  temperature: jax.Array  # f32[B], 0: the most likely token
  top_p: jax.Array  # f32[B] in (0, 1]
  seed: jax.Array  # uint32[B]

  @classmethod
  def empty(cls, model: UnifiedModel, rows: int, slots: int) -> "Rows":
    """Returns rows without prompts, with `slots` positions each."""
    zero = lambda dtype: jnp.zeros((rows,), dtype)
    return cls(
      cache=Cache.empty(model.config.language_model, rows, slots, model.dtype, rows=True),
      tokens=zero(jnp.int32),
      active=zero(bool),
      made=zero(jnp.int32),
      limit=zero(jnp.int32),
      temperature=zero(jnp.float32),
      top_p=zero(jnp.float32),
      seed=zero(jnp.uint32),
    )


@bounded(most=6)
def look(model: UnifiedModel, params: Any, images_MHWC: jax.Array) -> jax.Array:
  """Encodes images uint8[M, H, W, 3] to embeddings of their slots, [M * K, D]."""
  slots = model.apply({"params": params}, normalise(images_MHWC), method="read")
  return slots.reshape(-1, slots.shape[-1])


def prefill(
  model: UnifiedModel,
  params: Any,
  tokens_BS: jax.Array,
  slots_ZD: jax.Array,
  image_index_BS: jax.Array,
  lengths_B: jax.Array,
) -> tuple[jax.Array, Cache]:
  """Prefills a new cache with prompts; to be traced.

  Args:
    tokens_BS: int32, padded on the right.
    slots_ZD: from `look`; Z may be 0.
    image_index_BS: int32 into Z; -1 where a token stands.
    lengths_B: int32, tokens of each row.

  Returns:
    (the last token's hidden state [B, D], a cache of S slots).
  """
  apply = functools.partial(model.apply, {"params": params})
  b, s = tokens_BS.shape
  if len(slots_ZD):
    x = apply(tokens_BS, jnp.broadcast_to(slots_ZD, (b, *slots_ZD.shape)), image_index_BS, method="assemble")
  else:
    x = apply(tokens_BS, method="embed")
  positions = jnp.broadcast_to(jnp.arange(s), (b, s))
  segments = (positions < lengths_B[:, None]).astype(jnp.int32)
  cache = Cache.empty(model.config.language_model, b, s, x.dtype)
  out = apply(x, positions, segments, cache, method="backbone")
  return jnp.take_along_axis(out.hidden, lengths_B[:, None, None] - 1, axis=1)[:, 0], out.cache


@bounded(most=24, donate=("rows",))
def admit(
  model: UnifiedModel,
  params: Any,
  rows: Rows,
  row: jax.Array,
  tokens_S: jax.Array,
  slots_ZD: jax.Array,
  image_index_S: jax.Array,
  length: jax.Array,
  limit: jax.Array,
  temperature: jax.Array,
  top_p: jax.Array,
  seed: jax.Array,
  *,
  eos: int,
  greedy: bool,
) -> tuple[Rows, jax.Array]:
  """Prefills row `row` with one prompt and picks the first token of its answer.

  Args:
    tokens_S, image_index_S, length: see `prefill`; S is at most the slots of the cache.
    limit, temperature, top_p, seed: see `Rows`.
    greedy: the temperature is 0.

  Returns:
    (rows, int32[] the first token).
  """
  hidden, prompt = prefill(model, params, tokens_S[None], slots_ZD, image_index_S[None], length[None])
  logits = model.apply({"params": params}, hidden, method="logits")
  sampling = [x[None] for x in (seed, jnp.zeros((), jnp.int32), temperature, top_p)]
  first = (most_likely(logits) if greedy else pick(logits, *sampling))[0]
  cache = rows.cache
  # Into the row, or into its kv heads.
  put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, row * len(new), 0)
  filled = jnp.arange(cache.filled.shape[1]) < length
  cache = Cache(
    keys=tuple(map(put, cache.keys, prompt.keys)),
    values=tuple(map(put, cache.values, prompt.values)),
    filled=put(cache.filled, filled[None]),
    length=put(cache.length, length[None]),
  )
  one = lambda old, new: put(old, jnp.asarray(new, old.dtype)[None])
  return Rows(
    cache=cache,
    tokens=one(rows.tokens, first),
    active=one(rows.active, (first != eos) & (limit > 1)),
    made=one(rows.made, 1),
    limit=one(rows.limit, limit),
    temperature=one(rows.temperature, temperature),
    top_p=one(rows.top_p, top_p),
    seed=one(rows.seed, seed),
  ), first


@bounded(most=40, donate=("rows",))
def run(
  model: UnifiedModel, params: Any, rows: Rows, steps: jax.Array, *, eos: int, slots: int, greedy: bool
) -> tuple[Rows, jax.Array]:
  """Decodes up to `steps` tokens for every active row.

  Args:
    steps: int32[], at most CHUNK.
    slots: positions of the cache that attention covers; at least the longest active row plus `steps`.
    greedy: the temperature of every active row is 0: a program without draws and without branches.

  Returns:
    (rows, int32[CHUNK, B] new tokens, -1 where a row had ended).
  """
  apply = functools.partial(model.apply, {"params": params})
  whole = rows.cache

  def body(carry: tuple[jax.Array, Rows, jax.Array]) -> tuple[jax.Array, Rows, jax.Array]:
    i, rows, out = carry
    x = apply(rows.tokens[:, None], method="embed")
    visible = rows.active.astype(jnp.int32)[:, None]
    result = apply(x, rows.cache.length[:, None], visible, rows.cache, method="backbone")
    logits = apply(result.hidden[:, 0], method="logits")
    tokens = most_likely(logits) if greedy else pick(logits, rows.seed, rows.made, rows.temperature, rows.top_p)
    made = rows.made + rows.active
    # A row that has ended does not advance: its next slot is written again and never attended to.
    cache = result.cache.replace(length=jnp.where(rows.active, result.cache.length, rows.cache.length))
    out = out.at[i].set(jnp.where(rows.active, tokens, -1))
    active = rows.active & (tokens != eos) & (made < rows.limit)
    tokens = jnp.where(rows.active, tokens, rows.tokens)
    return i + 1, rows.replace(cache=cache, tokens=tokens, active=active, made=made), out

  going = lambda carry: (carry[0] < steps) & jnp.any(carry[1].active)
  out = jnp.full((CHUNK, len(rows.tokens)), -1, jnp.int32)
  _, rows, out = jax.lax.while_loop(going, body, (0, rows.replace(cache=whole.first(slots)), out))
  return rows.replace(cache=whole.with_first(rows.cache)), out


def pick(
  logits_BV: jax.Array, seed_B: jax.Array, made_B: jax.Array, temperature_B: jax.Array, top_p_B: jax.Array
) -> jax.Array:
  """Picks the next tokens: the most likely at temperature 0, else sampled from the nucleus of mass `top_p`.

  A row's draw depends only on its own seed and count. The logits are sorted only where a row of the batch needs it.

  Args:
    made_B: int32, tokens decoded before this one.
    temperature_B: f32, at least 0.
    top_p_B: f32 in (0, 1]; the smallest set of most likely tokens with at least this mass is kept, together with
      tokens as likely as its last.

  Returns:
    int32[B].
  """
  log_p = jax.nn.log_softmax(logits_BV / jnp.maximum(temperature_B, 1e-6)[:, None], axis=-1)

  def nucleus() -> jax.Array:
    falling = -jnp.sort(-log_p, axis=-1)
    p = jnp.exp(falling)
    inside = (jnp.cumsum(p, axis=-1) - p < top_p_B[:, None]).at[:, 0].set(True)  # a top_p of 1e-50 is 0 here
    least = jnp.min(jnp.where(inside, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where((log_p >= least) | (top_p_B[:, None] >= 1), log_p, -jnp.inf)

  kept = jax.lax.cond(jnp.any((top_p_B < 1) & (temperature_B > 0)), nucleus, lambda: log_p)
  draw = lambda seed, made, kept: jax.random.categorical(jax.random.fold_in(jax.random.key(seed), made), kept)
  drawn = jax.vmap(draw)(seed_B, made_B, kept).astype(jnp.int32)
  return jnp.where(temperature_B > 0, drawn, most_likely(logits_BV))


def most_likely(logits_BV: jax.Array) -> jax.Array:
  """The most likely tokens, int32[B]; the first of equals."""
  return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
