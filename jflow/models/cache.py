"""KV caches and attention over them: growing (`Cache`) or fixed (`Prefix`).

Both are arguments and results, never hidden state. Both matmuls of attention read the cache in its own layout: the
slots of keys are the last axis, and the heads of all rows share one axis. (With two axes, XLA:CPU copies each layer's
cache several times per token.)

Legend: B batch, S queries, T slots, N query heads, K kv heads, R = B K, G = N / K, H head dim.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jflow.models import kernels
from jflow.models.llm.config import LanguageModelConfig
from jflow.models.plain_attention import QUERY_BLOCK

# (q_BSNH, k_BSKH, v_BSKH) of new positions -> (attended [B, S, N, H], the layer's grown keys and values).
MANY_ROWS = 8  # from which keys and values outweigh the matrices: attention must not cover many slots that are empty
_FUSED_FROM = 128  # positions from which the fused kernel is taken

Layer = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, tuple[jax.Array, jax.Array] | None]]


class Cache(struct.PyTreeNode):
  """A KV cache of static size, filled from the left; updated in place where the program donates it."""

  keys: tuple[jax.Array, ...]  # per layer [R, H, T]
  values: tuple[jax.Array, ...]  # per layer [R, T, H]
  filled: jax.Array  # bool[B, T]; False where a slot is empty or padding
  length: jax.Array  # int32[] or int32[B]; slots in use (of each row); the next positions go there

  @classmethod
  def empty(cls, config: LanguageModelConfig, batch: int, slots: int, dtype: Any, rows: bool = False) -> "Cache":
    """An empty cache; `rows`: each row counts its own length."""
    heads, width = batch * config.num_kv_heads, config.head_dim
    blank = lambda *shape: tuple(jnp.zeros((heads, *shape), dtype) for _ in range(config.num_layers))
    length = jnp.zeros((batch,) if rows else (), jnp.int32)
    return cls(
      keys=blank(width, slots), values=blank(slots, width), filled=jnp.zeros((batch, slots), bool), length=length
    )

  def layer(self, index: int, segments_BS: jax.Array, kernel: str) -> Layer:
    """The attention of layer `index` for new positions: writes them, and attends to all slots up to each.

    Always plain: a `kernel` has nothing to win on one query, or once per prompt.
    """
    del kernel
    slots = self._slots(segments_BS.shape[1])
    seen_BT = _write(self.filled, segments_BS > 0, slots, 1)

    def attend(q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array):
      write = lambda old, new, axis: _write(old, _heads_first(new.astype(old.dtype)), slots, axis)
      k_RHT, v_RTH = write(self.keys[index], k_BSKH, 2), write(self.values[index], v_BSKH, 1)
      return _blocks(q_BSNH, k_RHT, v_RTH, seen_BT, slots), (k_RHT, v_RTH)

    return attend

  def grown(self, layers: Sequence[tuple[jax.Array, jax.Array]], segments_BS: jax.Array) -> "Cache":
    """The cache with the new positions, from the keys and values of all layers."""
    seq = segments_BS.shape[1]
    keys, values = zip(*layers)
    filled = _write(self.filled, segments_BS > 0, self._slots(seq), 1)
    return Cache(keys=keys, values=values, filled=filled, length=self.length + seq)

  def first(self, slots: int) -> "Cache":
    """The cache's first slots alone, all of those in use among them, so that attention covers no more."""
    return self.replace(
      keys=tuple(x[..., :slots] for x in self.keys),
      values=tuple(x[:, :slots] for x in self.values),
      filled=self.filled[:, :slots],
    )

  def with_first(self, near: "Cache") -> "Cache":
    """The cache with its first slots and its length from `near`."""
    put = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim)
    return Cache(
      keys=tuple(map(put, self.keys, near.keys)),
      values=tuple(map(put, self.values, near.values)),
      filled=put(self.filled, near.filled),
      length=near.length,
    )

  def _slots(self, seq: int) -> jax.Array:
    """int32[S] or int32[B, S]: where the next positions go."""
    return self.length[..., None] + jnp.arange(seq)


class Prefix(struct.PyTreeNode):
  """Fixed keys and values that groups of rows see before their own positions.

  Attributes:
    caches: one per group; the batch is cut into as many equal groups of rows. A cache of one row serves all
      rows of its group.
  """

  caches: tuple[Cache, ...]

  def layer(self, index: int, segments_BS: jax.Array, kernel: str) -> Layer:
    """The attention of layer `index` for new positions: to the prefix, and causally to each other.

    Args:
      index: layer.
      segments_BS: not read: a generated image has no padding.
      kernel: "fused" for the causal part by `kernels.causal` where there are enough positions, else plain.
    """
    del segments_BS

    def attend(q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array):
      if kernel == "fused" and q_BSNH.shape[1] >= _FUSED_FROM:
        held = self._joined(index, len(q_BSNH), k_BSKH.shape[2])
        return _merged(q_BSNH, *kernels.causal(q_BSNH, k_BSKH, v_BSKH), *held), None
      cut = lambda x: jnp.split(x, len(self.caches))
      groups = zip(self.caches, cut(q_BSNH), cut(k_BSKH), cut(v_BSKH), strict=True)
      out = [_prefixed(q, k, v, c.keys[index], c.values[index], c.filled) for c, q, k, v in groups]
      return jnp.concatenate(out), None

    return attend

  def _joined(self, index: int, batch: int, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys [B, K, H, T] and values [B, K, T, H] of layer `index` of all groups, and which are filled, bool[B, T]."""
    rows, longest = batch // len(self.caches), max(c.filled.shape[1] for c in self.caches)

    def joined(arrays: list[jax.Array], axis: int) -> jax.Array:
      wide = [jnp.pad(x, [(0, longest - n if i == axis else 0) for i, n in enumerate(x.shape)]) for x in arrays]
      return jnp.concatenate([jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in wide])

    by_row = lambda x: x.reshape(-1, heads, *x.shape[1:])
    return (
      joined([by_row(c.keys[index]) for c in self.caches], 3),
      joined([by_row(c.values[index]) for c in self.caches], 2),
      joined([c.filled for c in self.caches], 1),
    )


def _write(old: jax.Array, new: jax.Array, slots: jax.Array, axis: int) -> jax.Array:
  """Writes `new` [rows, S, ...] into `old` at slots int32[S] or int32[B, S] along `axis`.

  Slots beyond the end are dropped. `rows` may be a multiple of B, with the heads of each row.
  """
  if slots.ndim == 2 and len(slots) == 1:
    slots = slots[0]  # a single row never runs past its end, and a slice is faster than a scatter on a CPU
  if slots.ndim == 1:
    return jax.lax.dynamic_update_slice_in_dim(old, jnp.moveaxis(new, 1, axis), slots[0], axis)
  at = jnp.repeat(slots, len(old) // len(slots), axis=0)
  return old.at[(jnp.arange(len(old))[:, None], *(slice(None),) * (axis - 1), at)].set(new, mode="drop")


def _heads_first(x_BSKH: jax.Array) -> jax.Array:
  """[B, S, K, H] -> [R, S, H]."""
  b, s, k, h = x_BSKH.shape
  return jnp.swapaxes(x_BSKH, 1, 2).reshape(b * k, s, h)


def _grouped(q_BSNH: jax.Array, key_heads: int) -> jax.Array:
  """[B, S, N, H] -> [B, K, G, S, H]."""
  b, s, n, h = q_BSNH.shape
  return jnp.moveaxis(q_BSNH.reshape(b, s, key_heads, n // key_heads, h), 1, 3)


def _softmax(logits: jax.Array, mask: jax.Array, dtype: Any) -> jax.Array:
  return jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1).astype(dtype)


def _blocks(q_BSNH, k_RHT, v_RTH, seen_BT, slots) -> jax.Array:
  """Attention of queries at `slots` to the filled slots up to them, a block of queries at a time."""
  b, s, n, h = q_BSNH.shape
  slots = jnp.broadcast_to(slots, (b, s))

  def block(q_BSNH: jax.Array, slots_BS: jax.Array) -> jax.Array:
    q_BKGSH = _grouped(q_BSNH, len(k_RHT) // b)
    q_RGSH = q_BKGSH.reshape(-1, *q_BKGSH.shape[2:])
    logits = jnp.einsum("RGSH,RHT->RGST", q_RGSH, k_RHT, preferred_element_type=jnp.float32) * h**-0.5
    mask_BST = seen_BT[:, None] & (slots_BS[..., None] >= jnp.arange(k_RHT.shape[2]))
    logits_BKGST = logits.reshape(*q_BKGSH.shape[:-1], -1)
    weights = _softmax(logits_BKGST, mask_BST[:, None, None], v_RTH.dtype).reshape(logits.shape)
    out_RGSH = jnp.einsum("RGST,RTH->RGSH", weights, v_RTH)
    return jnp.moveaxis(out_RGSH.reshape(q_BKGSH.shape), 3, 1).reshape(q_BSNH.shape)

  if s <= QUERY_BLOCK:
    return block(q_BSNH, slots)
  pad = -s % QUERY_BLOCK
  cut = lambda x: jnp.moveaxis(
    jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)).reshape(b, -1, QUERY_BLOCK, *x.shape[2:]), 1, 0
  )
  out = jax.lax.map(lambda part: block(*part), (cut(q_BSNH), cut(slots)))
  return jnp.moveaxis(out, 0, 1).reshape(b, s + pad, n, h)[:, :s]


def _prefixed(q_BSNH, k_BSKH, v_BSKH, prefix_k, prefix_v, filled) -> jax.Array:
  """Attention to the filled slots [B or 1, T] of a prefix, and causally among the S positions."""
  b, s, n, h = q_BSNH.shape
  k, t = k_BSKH.shape[2], filled.shape[1]
  q_BKGSH, k_BKSH, v_BKSH = _grouped(q_BSNH, k), jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
  shared = len(filled) == 1
  to_prefix = "BKGSH,KHT->BKGST" if shared else "BKGSH,BKHT->BKGST"
  from_prefix = "BKGST,KTH->BKGSH" if shared else "BKGST,BKTH->BKGSH"
  if not shared:
    prefix_k, prefix_v = prefix_k.reshape(b, k, h, t), prefix_v.reshape(b, k, t, h)
  logits = jnp.concatenate(
    [
      jnp.einsum(to_prefix, q_BKGSH, prefix_k, preferred_element_type=jnp.float32),
      jnp.einsum("BKGSH,BKTH->BKGST", q_BKGSH, k_BKSH, preferred_element_type=jnp.float32),
    ],
    axis=-1,
  )
  before_BST = jnp.broadcast_to(filled[:, None], (len(filled), s, t))
  causal_BST = jnp.broadcast_to(jnp.tril(jnp.ones((s, s), bool)), (len(filled), s, s))
  mask = jnp.concatenate([before_BST, causal_BST], axis=-1)[:, None, None]
  weights = _softmax(logits * h**-0.5, mask, v_BSKH.dtype)
  out_BKGSH = jnp.einsum(from_prefix, weights[..., :t], prefix_v)
  out_BKGSH = out_BKGSH + jnp.einsum("BKGST,BKTH->BKGSH", weights[..., t:], v_BKSH)
  return jnp.moveaxis(out_BKGSH, 3, 1).reshape(b, s, n, h)


def _merged(q_BSNH, own_BSNH, own_BNS, k_BKHT, v_BKTH, filled_BT) -> jax.Array:
  """Attention to the filled slots of a prefix, merged into that among the S positions by the log of the sums.

  Args:
    own_BSNH: attention among the S positions.
    own_BNS: f32, the log of the sum of the exponentials of its logits.
  """
  b, s, n, h = q_BSNH.shape
  k, t = k_BKHT.shape[1], k_BKHT.shape[3]
  q_BSKGH = q_BSNH.reshape(b, s, k, n // k, h)
  logits = jnp.einsum("BSKGH,BKHT->BKGST", q_BSKGH, k_BKHT, preferred_element_type=jnp.float32) * h**-0.5
  logits_BNST = jnp.where(filled_BT[:, None, None], logits.reshape(b, n, s, t), -1e30)
  total_BNS = jnp.logaddexp(own_BNS, jax.nn.logsumexp(logits_BNST, axis=-1))
  weights_BNST = jnp.exp(logits_BNST - total_BNS[..., None]).astype(v_BKTH.dtype)
  out = jnp.einsum("BKGST,BKTH->BSKGH", weights_BNST.reshape(b, k, n // k, s, t), v_BKTH)
  share_BSN1 = jnp.swapaxes(jnp.exp(own_BNS - total_BNS), 1, 2)[..., None]
  return (own_BSNH * share_BSN1 + out.reshape(b, s, n, h)).astype(q_BSNH.dtype)
