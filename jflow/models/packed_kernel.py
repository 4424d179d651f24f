"""Packed causal attention on any GPU, in Pallas-Triton: a tile of queries meets only tiles of its own segments.

The flash attention of https://arxiv.org/abs/2307.08691 with bounds: query i sees the keys from its segment's first to
i, key j is seen by the queries from j to its segment's last. Segments are runs of one id; padding is one of them.

Legend: B batch, S sequence, N heads, H head dim, Q queries of a tile, T keys of a tile.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

_LOG2E = math.log2(math.e)
_FORWARD = (128, 64)  # queries and keys of a tile
_BACKWARD = {
  64: (64, 64),
  128: (64, 32),
}  # by the largest head dim, whose tiles fit shared memory with f32 accumulators


def bounds(segments_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The first position of each position's segment, and one past its last; int32[B, S] each."""
  seq = segments_BS.shape[1]
  at = jnp.arange(seq, dtype=jnp.int32)
  changes = segments_BS[:, 1:] != segments_BS[:, :-1]
  begins = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
  ends = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
  first = jax.lax.cummax(jnp.where(begins, at, 0), axis=1)
  last = jax.lax.cummin(jnp.where(ends, at + 1, seq), axis=1, reverse=True)
  return first, last


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(q_BSNH, k_BSNH, v_BSNH, segments_BS, interpret: bool = False) -> jax.Array:
  """Attention over packed rows; S is a multiple of 128, H a power of two from 16 to 128."""
  return _forward(q_BSNH, k_BSNH, v_BSNH, segments_BS, interpret)[0]


def _forward(q_BSNH, k_BSNH, v_BSNH, segments_BS, interpret):
  b, s, n, h = q_BSNH.shape
  size_q, size_k = (min(size, s) for size in _FORWARD)
  first, _ = bounds(segments_BS)
  tile = pl.BlockSpec((None, size_q, None, h), lambda i, j, k: (j, i, k, 0))
  row = pl.BlockSpec((None, s, None, h), lambda i, j, k: (j, 0, k, 0))
  out, statistics = pl.pallas_call(
    functools.partial(_forward_kernel, size_q=size_q, size_k=size_k, scale=h**-0.5),
    grid=(s // size_q, b, n),
    in_specs=[tile, row, row, pl.BlockSpec((None, s), lambda i, j, k: (j, 0))],
    out_specs=[tile, pl.BlockSpec((None, None, size_q), lambda i, j, k: (j, k, i))],
    out_shape=[q_BSNH, jax.ShapeDtypeStruct((b, n, s), jnp.float32)],
    compiler_params=_parameters(h),
    interpret=interpret,
    name="packed_attention",
  )(q_BSNH, k_BSNH, v_BSNH, first)
  out, statistics = checkpoint_name(out, "attended"), checkpoint_name(statistics, "attended")
  return out, (q_BSNH, k_BSNH, v_BSNH, segments_BS, out, statistics)


def _backward(interpret, residuals, d_out):
  q_BSNH, k_BSNH, v_BSNH, segments_BS, out, statistics = residuals
  b, s, n, h = q_BSNH.shape
  size_q, size_k = (min(size, s) for size in _BACKWARD[64 if h <= 64 else 128])
  first, last = bounds(segments_BS)
  delta_BNS = jnp.einsum("BSNH,BSNH->BNS", out, d_out, preferred_element_type=jnp.float32)
  row = pl.BlockSpec((None, s, None, h), lambda i, j, k: (j, 0, k, 0))
  line = pl.BlockSpec((None, None, s), lambda i, j, k: (j, k, 0))
  bound = pl.BlockSpec((None, s), lambda i, j, k: (j, 0))
  of = lambda size: pl.BlockSpec((None, size, None, h), lambda i, j, k: (j, i, k, 0))
  options: dict[str, Any] = dict(compiler_params=_parameters(h), interpret=interpret)
  dk, dv = pl.pallas_call(
    functools.partial(_keys_kernel, size_q=size_q, size_k=size_k, scale=h**-0.5),
    grid=(s // size_k, b, n),
    in_specs=[row, of(size_k), of(size_k), row, line, line, bound],
    out_specs=[of(size_k), of(size_k)],
    out_shape=[k_BSNH, v_BSNH],
    name="packed_attention_keys",
    **options,
  )(q_BSNH, k_BSNH, v_BSNH, d_out, statistics, delta_BNS, last)
  part = pl.BlockSpec((None, None, size_q), lambda i, j, k: (j, k, i))
  dq = pl.pallas_call(
    functools.partial(_queries_kernel, size_q=size_q, size_k=size_k, scale=h**-0.5),
    grid=(s // size_q, b, n),
    in_specs=[of(size_q), row, row, of(size_q), part, part, bound],
    out_specs=of(size_q),
    out_shape=q_BSNH,
    name="packed_attention_queries",
    **options,
  )(q_BSNH, k_BSNH, v_BSNH, d_out, statistics, delta_BNS, first)
  return dq, dk, dv, None


attend.defvjp(_forward, _backward)


def _parameters(head_dim: int) -> Any:
  from jax.experimental.pallas import triton

  return triton.CompilerParams(num_warps=4 if head_dim <= 64 else 8, num_stages=2)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _forward_kernel(q_ref, k_ref, v_ref, first_ref, out_ref, statistics_ref, *, size_q, size_k, scale):
  begin = pl.program_id(0) * size_q
  q_QH, rows_Q = q_ref[...], begin + jnp.arange(size_q)
  first_Q = first_ref[pl.ds(begin, size_q)]

  def tile(j, carry):
    out_QH, top_Q, total_Q = carry
    keys = pl.ds(j * size_k, size_k)
    logits_QT = _dot(q_QH, k_ref[keys, :].T) * (scale * _LOG2E)
    keys_T = j * size_k + jnp.arange(size_k)
    seen_QT = (keys_T[None] >= first_Q[:, None]) & (keys_T[None] <= rows_Q[:, None])
    logits_QT = jnp.where(seen_QT, logits_QT, -1e30)
    higher_Q = jnp.maximum(top_Q, jnp.max(logits_QT, axis=1))
    weights_QT = jnp.where(seen_QT, jnp.exp2(logits_QT - higher_Q[:, None]), 0.0)
    shrink_Q = jnp.exp2(top_Q - higher_Q)
    v_TH = v_ref[keys, :]
    out_QH = out_QH * shrink_Q[:, None] + _dot(weights_QT.astype(v_TH.dtype), v_TH)
    return out_QH, higher_Q, total_Q * shrink_Q + jnp.sum(weights_QT, axis=1)

  zero_QH = jnp.zeros(q_QH.shape, jnp.float32)
  start = (zero_QH, jnp.full(size_q, -1e30, jnp.float32), jnp.zeros(size_q, jnp.float32))
  low, high = jax.lax.div(first_ref[begin], size_k), jax.lax.div(begin + size_q + size_k - 1, size_k)
  out_QH, top_Q, total_Q = jax.lax.fori_loop(low, high, tile, start)
  out_ref[...] = (out_QH / total_Q[:, None]).astype(out_ref.dtype)
  statistics_ref[...] = top_Q + jnp.log2(total_Q)


def _keys_kernel(
  q_ref, k_ref, v_ref, d_out_ref, statistics_ref, delta_ref, last_ref, dk_ref, dv_ref, *, size_q, size_k, scale
):
  begin = pl.program_id(0) * size_k
  k_TH, v_TH, keys_T = k_ref[...], v_ref[...], begin + jnp.arange(size_k)
  last_T = last_ref[pl.ds(begin, size_k)]

  def tile(i, carry):
    dk_TH, dv_TH = carry
    queries = pl.ds(i * size_q, size_q)
    q_QH, d_out_QH, rows_Q = q_ref[queries, :], d_out_ref[queries, :], i * size_q + jnp.arange(size_q)
    logits_QT = _dot(q_QH, k_TH.T) * (scale * _LOG2E)
    seen_QT = (rows_Q[:, None] >= keys_T[None]) & (rows_Q[:, None] < last_T[None])
    weights_QT = jnp.where(seen_QT, jnp.exp2(logits_QT - statistics_ref[queries][:, None]), 0.0)
    dv_TH += _dot(weights_QT.astype(d_out_QH.dtype).T, d_out_QH)
    d_QT = weights_QT * (_dot(d_out_QH, v_TH.T) - delta_ref[queries][:, None]) * scale
    return dk_TH + _dot(d_QT.astype(q_QH.dtype).T, q_QH), dv_TH

  zero_TH = jnp.zeros(k_TH.shape, jnp.float32)
  low, high = jax.lax.div(begin, size_q), jax.lax.div(last_ref[begin + size_k - 1] + size_q - 1, size_q)
  dk_TH, dv_TH = jax.lax.fori_loop(low, high, tile, (zero_TH, zero_TH))
  dk_ref[...], dv_ref[...] = dk_TH.astype(dk_ref.dtype), dv_TH.astype(dv_ref.dtype)


def _queries_kernel(
  q_ref, k_ref, v_ref, d_out_ref, statistics_ref, delta_ref, first_ref, dq_ref, *, size_q, size_k, scale
):
  begin = pl.program_id(0) * size_q
  q_QH, d_out_QH, rows_Q = q_ref[...], d_out_ref[...], begin + jnp.arange(size_q)
  first_Q, statistics_Q, delta_Q = first_ref[pl.ds(begin, size_q)], statistics_ref[...], delta_ref[...]

  def tile(j, dq_QH):
    keys = pl.ds(j * size_k, size_k)
    k_TH, keys_T = k_ref[keys, :], j * size_k + jnp.arange(size_k)
    logits_QT = _dot(q_QH, k_TH.T) * (scale * _LOG2E)
    seen_QT = (keys_T[None] >= first_Q[:, None]) & (keys_T[None] <= rows_Q[:, None])
    weights_QT = jnp.where(seen_QT, jnp.exp2(logits_QT - statistics_Q[:, None]), 0.0)
    d_QT = weights_QT * (_dot(d_out_QH, v_ref[keys, :].T) - delta_Q[:, None]) * scale
    return dq_QH + _dot(d_QT.astype(k_TH.dtype), k_TH)

  low, high = jax.lax.div(first_ref[begin], size_k), jax.lax.div(begin + size_q + size_k - 1, size_k)
  dq_ref[...] = jax.lax.fori_loop(low, high, tile, jnp.zeros(q_QH.shape, jnp.float32)).astype(dq_ref.dtype)
