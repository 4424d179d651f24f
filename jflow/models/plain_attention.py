"""Softmax attention in plain XLA, causal within segments.

Legend: B batch, S queries, T keys, N query heads, K kv heads, G = N / K, H head dim.
"""

import jax
import jax.numpy as jnp

QUERY_BLOCK = 1024  # longer query sequences are cut into blocks, so that the S x T matrix of a long row is never formed


def attention(
  q_BSNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  q_segments_BS: jax.Array,
  kv_segments_BT: jax.Array,
  q_start: jax.Array | int,
) -> jax.Array:
  """Softmax attention: query i sees key j iff j <= q_start + i and both lie in one segment.

  Segment 0 is padding: a padded query gets the mean of all values, finite and unused.

  Args:
    q_BSNH, k_BTKH, v_BTKH: queries, keys, values; N is a multiple of K (grouped-query attention).
    q_segments_BS, kv_segments_BT: int32 segment ids.
    q_start: slot of the first query among the keys (0 for a packed row, the fill of the cache otherwise).

  Returns:
    [B, S, N, H] in the dtype of q; logits and softmax in f32.
  """
  seq = q_BSNH.shape[1]
  if seq <= QUERY_BLOCK:
    return _plain(q_BSNH, k_BTKH, v_BTKH, q_segments_BS, kv_segments_BT, q_start + jnp.arange(seq))
  count = -(-seq // QUERY_BLOCK)
  size = -(-seq // count)  # blocks of one size, so that little is padded
  pad = lambda x: jnp.pad(x, [(0, 0), (0, count * size - seq)] + [(0, 0)] * (x.ndim - 2))
  q_padded, segments_padded = pad(q_BSNH), pad(q_segments_BS)

  def block(index: jax.Array) -> jax.Array:
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=1)
    slots = q_start + index * size + jnp.arange(size)
    return _plain(cut(q_padded), k_BTKH, v_BTKH, cut(segments_padded), kv_segments_BT, slots)

  out = jax.lax.map(jax.checkpoint(block, prevent_cse=False), jnp.arange(count))
  return jnp.moveaxis(out, 0, 1).reshape(q_padded.shape)[:, :seq]


def _plain(q_BSNH, k_BTKH, v_BTKH, q_segments_BS, kv_segments_BT, q_slots_S) -> jax.Array:
  b, s, n, h = q_BSNH.shape
  k = k_BTKH.shape[2]
  q_BKGSH = jnp.moveaxis(q_BSNH.reshape(b, s, k, n // k, h), 1, 3)  # heads in front: plain batched matmuls
  k_BKTH, v_BKTH = jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2)
  logits = jnp.einsum("BKGSH,BKTH->BKGST", q_BKGSH, k_BKTH, preferred_element_type=jnp.float32) * h**-0.5
  causal_ST = q_slots_S[:, None] >= jnp.arange(k_BTKH.shape[1])[None, :]
  same_BST = (q_segments_BS[:, :, None] == kv_segments_BT[:, None, :]) & (q_segments_BS[:, :, None] > 0)
  mask = (same_BST & causal_ST)[:, None, None]
  weights = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1).astype(v_BTKH.dtype)
  out_BKGSH = jnp.einsum("BKGST,BKTH->BKGSH", weights, v_BKTH)
  return jnp.moveaxis(out_BKGSH, 3, 1).reshape(b, s, n, h)
