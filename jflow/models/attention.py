"""Attention for packed rows and for cached decoding: causal, within segments.

Legend: B batch, S queries, T keys, N query heads, K key heads, G = N / K, H head dim.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jflow import sharding
from jflow.errors import UserError
from jflow.models import kernels

# Names that a config may choose; "auto" becomes one of the others by `choose`.
IMPLEMENTATIONS = ("auto", "xla", *kernels.KERNELS)

_QUERY_BLOCK = 1024  # longer query sequences are cut, so that no S x T matrix of a long row ever exists


def choose(name: str, device: jax.Device, dtype: Any, head_width: int) -> str:
  """Resolves "auto" for a device, and checks that a kernel named outright can run there.

  TPU: splash. GPU: Pallas-Triton, which passed its test (`pytest -m gpu`) on an H200; cuDNN's packed kernel has to be
  asked for, since it failed there, and what was wrong, its table of segments, has been mended without a GPU at hand.
  Everything else, and whatever those kernels do not take (odd head widths): xla.

  Raises:
    UserError: the named kernel cannot run on this device, in this dtype or at this width.
  """
  if name not in IMPLEMENTATIONS:
    raise UserError(f"config.compute.attention={name!r} must be one of {', '.join(IMPLEMENTATIONS)}")
  if name == "auto":
    kernel = {"tpu": "splash", "gpu": "triton"}.get(device.platform)
    return kernel if kernel and not kernels.obstacle(kernel, device, dtype, head_width) else "xla"
  why = "" if name == "xla" else kernels.obstacle(name, device, dtype, head_width)
  if why:
    raise UserError(f"config.compute.attention={name!r} {why}; use 'auto' or 'xla'")
  return name


def packed_attention(
  q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments_BS: jax.Array, implementation: str
) -> jax.Array:
  """Attention over a packed row: query i sees key j iff j <= i and both lie in the same segment.

  Segments are consecutive runs; 0 is padding, whose outputs are finite and read by nobody.

  Args:
    q_BSNH, k_BSKH, v_BSKH: queries, keys, values of the row.
    segments_BS: int32 segment ids.
    implementation: "xla" or a key of `kernels.KERNELS`, as `choose` returns it.
  """
  if implementation == "xla":
    return attention(q_BSNH, k_BSKH, v_BSKH, segments_BS, segments_BS, 0)
  return over_shards(kernels.KERNELS[implementation], q_BSNH, k_BSKH, v_BSKH, segments_BS)


def over_shards(kernel: Callable[..., jax.Array], q_BSNH, k_BSKH, v_BSKH, segments_BS) -> jax.Array:
  """Runs a kernel on each device's rows and heads: the compiler cannot cut a kernel by itself."""
  groups = q_BSNH.shape[2] // k_BSKH.shape[2]
  repeat = lambda x: jnp.repeat(x, groups, axis=2) if groups > 1 else x
  args = (q_BSNH, repeat(k_BSKH), repeat(v_BSKH), segments_BS)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return kernel(*args)
  spec = sharding.named(mesh, ("batch", None, "heads", None), q_BSNH.shape).spec
  rows = sharding.named(mesh, ("batch", None), segments_BS.shape).spec
  return jax.shard_map(kernel, in_specs=(spec, spec, spec, rows), out_specs=spec, check_vma=False)(*args)


def attention(
  q_BSNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  q_segments_BS: jax.Array,
  kv_segments_BT: jax.Array,
  q_start: jax.Array | int,
) -> jax.Array:
  """Softmax attention in plain XLA; query i sees key j iff j <= q_start + i and both lie in one segment.

  Segment 0 is padding: a padded query gets the mean of all values (finite, and read by nobody).

  Args:
    q_BSNH, k_BTKH, v_BTKH: queries, keys, values; N is a multiple of K (grouped-query attention).
    q_segments_BS, kv_segments_BT: int32 segment ids.
    q_start: slot of the first query among the keys (0 for a packed row, the fill of the cache otherwise).

  Returns:
    [B, S, N, H] in the dtype of q; logits and softmax in f32.
  """
  seq = q_BSNH.shape[1]
  if seq <= _QUERY_BLOCK:
    return _plain(q_BSNH, k_BTKH, v_BTKH, q_segments_BS, kv_segments_BT, q_start + jnp.arange(seq))
  count = -(-seq // _QUERY_BLOCK)
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
