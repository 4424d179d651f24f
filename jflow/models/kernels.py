"""Fused attention kernels for packed rows, one function each, with one signature.

kernel(q_BSNH, k_BSNH, v_BSNH, segments_BS) -> out_BSNH: causal within segments, scaled by H^-1/2, with as many kv heads
as query heads. Each runs on one device's share; see `attention.over_shards`.

Legend: B batch, S sequence, N heads, H head dim, Z segments of a row.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jflow.models import packed_kernel

_TILE = 128  # rows are padded to a multiple of it for the Pallas kernels
_SPLASH_BLOCKS = (1024, 512, 256, 128)  # the largest that divides the row is taken
_CUDNN_SEGMENTS = 128  # the largest table of a row's segments for cuDNN


def obstacle(name: str, device: jax.Device, dtype: Any, head_dim: int) -> str:
  """Returns why a kernel cannot run on a device, as the end of a sentence; empty if it can."""
  platform, half = device.platform, jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
  if platform != {"splash": "tpu"}.get(name, "gpu"):
    return f"does not run on {platform}"
  if name == "splash" and head_dim % 128:
    return f"needs heads of a multiple of 128, not {head_dim}"
  if name == "cudnn":
    if not half:
      return f"needs compute.dtype='bfloat16', not {jnp.dtype(dtype).name!r}"
    if head_dim > 128 or head_dim % 8:
      return f"needs heads of at most 128 and a multiple of 8, not {head_dim}"
    if not _known_cudnn():
      return f"is not known to work with jax {jax.__version__}, whose private functions differ"
    if _capability(device) < 9:
      return f"needs a GPU of compute capability 9.0 or later for packed rows, not {device.compute_capability}"
  if name in ("triton", "packed") and (head_dim & (head_dim - 1) or not 16 <= head_dim <= 128):
    return f"needs heads of 16, 32, 64 or 128, not {head_dim}"
  return ""


def _capability(device: jax.Device) -> float:
  return float(getattr(device, "compute_capability", "0"))


def _known_cudnn() -> bool:
  """Whether this jax has the private function of `_cudnn_backward` as it is called there."""
  try:
    from jax._src.cudnn import fused_attention_stablehlo as fused

    names = list(inspect.signature(fused._dot_product_attention_bwd_rule).parameters)
  except (ImportError, AttributeError):
    return False
  return len(names) == 11 and names[7:10] == ["is_training", "return_residual", "res"]


def _padded(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Pads the row to whole tiles with segment 0 and cuts the result."""

  @functools.wraps(kernel)
  def padded(q_BSNH, k_BSNH, v_BSNH, segments_BS, **options):
    seq = q_BSNH.shape[1]
    extra = -seq % _TILE
    pad = lambda x: jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2)) if extra else x
    return kernel(*map(pad, (q_BSNH, k_BSNH, v_BSNH, segments_BS)), **options)[:, :seq]

  return padded


@_padded
def splash(q_BSNH, k_BSNH, v_BSNH, segments_BS, interpret: bool = False) -> jax.Array:
  """TPU: Pallas splash attention. Skips tiles above the diagonal; masks across segments inside a tile."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  _, seq, heads, width = q_BSNH.shape
  block = next(b for b in _SPLASH_BLOCKS if seq % b == 0)
  compute = min(block, 512)
  sizes = kernel.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=compute,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=compute,
    block_q_dq=block,
    block_kv_dq=block,
  )
  mask = masks.MultiHeadMask([masks.CausalMask((seq, seq))] * heads)
  run = kernel.make_splash_mha(
    mask,
    head_shards=1,
    q_seq_shards=1,
    block_sizes=sizes,
    residual_checkpoint_name="attended",
    interpret=interpret,
  )
  heads_first = lambda x: jnp.swapaxes(x, 1, 2)
  one_row = lambda q, k, v, s: run(q, k, v, segment_ids=kernel.SegmentIds(q=s, kv=s))
  scaled = q_BSNH * jnp.asarray(width**-0.5, q_BSNH.dtype)
  q, k, v = map(heads_first, (scaled, k_BSNH, v_BSNH))
  return heads_first(jax.vmap(one_row)(q, k, v, segments_BS))


@_padded
def triton(q_BSNH, k_BSNH, v_BSNH, segments_BS, interpret: bool = False) -> jax.Array:
  """Any GPU: jax's Pallas-Triton flash attention. Skips tiles above the diagonal.

  Its softmax statistics carry no checkpoint name, so that the backward pass repeats the forward one even where remat
  keeps "attended".
  """
  from jax.experimental.pallas.ops.gpu import attention as pallas

  width = q_BSNH.shape[-1]
  back = 64 if width <= 64 else 32  # tiles of the backward pass, by shared memory
  sizes = pallas.BlockSizes(
    block_q=128, block_k=64, block_q_dkv=back, block_kv_dkv=back, block_q_dq=back, block_kv_dq=back
  )
  return pallas.mha(
    q_BSNH,
    k_BSNH,
    v_BSNH,
    segments_BS,
    sm_scale=width**-0.5,
    causal=True,
    block_sizes=sizes,
    interpret=interpret,
  )


@_padded
def packed(q_BSNH, k_BSNH, v_BSNH, segments_BS, interpret: bool = False) -> jax.Array:
  """Any GPU: our Pallas-Triton kernel, which skips everything across segments, forward and backward."""
  return packed_kernel.attend(q_BSNH, k_BSNH, v_BSNH, segments_BS, interpret)


def segment_table(segments_BS: jax.Array, limit: int) -> tuple[jax.Array, jax.Array]:
  """Lengths int32[B, Z] and starts int32[B, Z + 1] of the segments of each row, -1 where there is none.

  Segments are consecutive runs 1, 2, ..., as the packer makes them, with padding (0) behind them as one more, so that
  no position is left out. Z is `limit`. The last column of the starts is always -1: jax concatenates the starts of all
  rows and appends the end of the last one, so that an end among them would shift every segment of the rows below.
  """
  last_B1 = jnp.max(segments_BS, axis=1, keepdims=True)
  ids_BS = jnp.where(segments_BS > 0, segments_BS, last_B1 + 1)
  lengths_BZ = jnp.sum(ids_BS[:, None, :] == jnp.arange(1, limit + 1)[None, :, None], axis=-1, dtype=jnp.int32)
  starts_BZ = jnp.cumsum(lengths_BZ, axis=1, dtype=jnp.int32) - lengths_BZ
  none = lambda x_BZ: jnp.where(lengths_BZ > 0, x_BZ, -1)
  return none(lengths_BZ), jnp.pad(none(starts_BZ), ((0, 0), (0, 1)), constant_values=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cudnn(q_BSNH, k_BSNH, v_BSNH, segments_BS, table: int = _CUDNN_SEGMENTS) -> jax.Array:
  """GPU from compute capability 9.0: cuDNN's packed flash attention, which skips everything across segments.

  It calls private functions of jax, since the public one takes no segments. cuDNN works on `table` times the batch, and
  its memory grows with it. A batch with a row of more segments, padding counted as one, gives NaN.
  """
  return _cudnn_forward(q_BSNH, k_BSNH, v_BSNH, segments_BS, table)[0]


def _cudnn_forward(q_BSNH, k_BSNH, v_BSNH, segments_BS, table):
  out, statistics = _cudnn_fused(q_BSNH, k_BSNH, v_BSNH, *segment_table(segments_BS, table))
  if table >= _CUDNN_SEGMENTS:  # a smaller one is the caller's, who knows what it holds
    fits = jnp.max(segments_BS) + jnp.any(segments_BS == 0) <= table
    out = jnp.where(fits, out, jnp.full((), jnp.nan, out.dtype))
  out, statistics = checkpoint_name(out, "attended"), checkpoint_name(statistics, "attended")
  return out, (q_BSNH, k_BSNH, v_BSNH, segments_BS, out, statistics)


def _cudnn_backward(table, residuals, d_out):
  from jax._src.cudnn import fused_attention_stablehlo as fused

  q_BSNH, k_BSNH, v_BSNH, segments_BS, out, statistics = residuals
  lengths, starts = segment_table(segments_BS, table)
  unused = jnp.zeros(0, q_BSNH.dtype)
  held = (q_BSNH, k_BSNH, v_BSNH, unused, lengths, lengths, starts, starts, unused, unused, statistics, out)
  layout = fused.AttentionLayout.BTNH.value
  options = (_scale(q_BSNH), 42, 0.0, (False, False), fused.MaskType.PADDING_CAUSAL, layout, None)
  gradients = cast("Any", fused._dot_product_attention_bwd_rule(*options, True, False, held, d_out)[:3])
  return (*gradients, None)


cudnn.defvjp(_cudnn_forward, _cudnn_backward)


def _scale(q_BSNH: jax.Array) -> float:
  return float(q_BSNH.shape[-1] ** -0.5)


def _cudnn_fused(q_BSNH, k_BSNH, v_BSNH, lengths_BZ, starts_BZ) -> Any:
  """The output and the statistics (log of the softmax's sum) of cuDNN's forward pass."""
  from jax._src.cudnn import fused_attention_stablehlo as fused

  return fused.dot_product_attention(
    q_BSNH,
    k_BSNH,
    v_BSNH,
    q_seqlen=lengths_BZ,
    kv_seqlen=lengths_BZ,
    q_offsets=starts_BZ,
    kv_offsets=starts_BZ,
    scale=_scale(q_BSNH),
    mask_type=fused.MaskType.PADDING_CAUSAL,
    return_residual=True,
  )


def causal(q_BSNH, k_BSKH, v_BSKH) -> tuple[jax.Array, jax.Array]:
  """GPU from compute capability 8.0, half precision: cuDNN's causal attention of whole rows, without a gradient.

  It calls a private function of jax: the public one rounds the statistics to half precision.

  Returns:
    ([B, S, N, H], f32[B, N, S] the log of the sum of the exponentials of each query's logits).
  """
  from jax._src.cudnn import fused_attention_stablehlo as fused

  options = dict(scale=_scale(q_BSNH), mask_type=fused.MaskType.CAUSAL, return_residual=True)
  out, statistics = cast("Any", fused.dot_product_attention)(q_BSNH, k_BSKH, v_BSKH, **options)
  return out, statistics.astype(jnp.float32)


def fuses_causal(dtype: Any, head_dim: int) -> bool:
  """Whether `causal` takes such heads on a GPU."""
  return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and head_dim <= 128 and head_dim % 8 == 0


def table_for(segments: int) -> int | None:
  """The size of cuDNN's table for rows of so many segments and padding; None: there is none."""
  return next((size for size in (8, 16, 32, 64, _CUDNN_SEGMENTS) if size > segments), None)


KERNELS: dict[str, Callable[..., jax.Array]] = {
  "cudnn": cudnn,
  "triton": triton,
  "packed": packed,
  "splash": splash,
}
# Platform -> what "auto" takes there: on a GPU only a kernel whose tests have passed on one (`pytest -m gpu`). Splash
# has run in the interpreter, and has been compiled for TPUs.
AUTO = {"tpu": "splash", "gpu": "triton"}
# Likewise for the positions of an image that is generated: "fused" for `causal`, or "xla".
AUTO_BEHIND_PREFIX = {"gpu": "xla"}
MOST_SEGMENTS = _CUDNN_SEGMENTS - 1
