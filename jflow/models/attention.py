"""Attention over packed rows, causal within segments, by the fused kernel of the device or plain XLA.

Legend: B batch, S queries, T keys, N query heads, K kv heads, G = N / K, H head dim.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jflow import sharding
from jflow.errors import UserError
from jflow.models import kernels
from jflow.models.plain_attention import attention

# Names that a config may choose; "auto" becomes one of the others by `choose`.
IMPLEMENTATIONS = ("auto", "xla", *kernels.KERNELS)


def choose(name: str, device: jax.Device, dtype: Any, head_dim: int) -> str:
  """Resolves "auto" for a device, and checks that a kernel named outright can run there.

  "auto" is what `kernels.AUTO` names; on other devices, and for inputs that it does not take (odd head dims), xla.

  Raises:
    UserError: the named kernel cannot run on this device, in this dtype or with this head dim.
  """
  if name not in IMPLEMENTATIONS:
    raise UserError(f"config.compute.attention={name!r} must be one of {', '.join(IMPLEMENTATIONS)}")
  if name == "auto":
    kernel = kernels.AUTO.get(device.platform)
    return kernel if kernel and not kernels.obstacle(kernel, device, dtype, head_dim) else "xla"
  why = "" if name == "xla" else kernels.obstacle(name, device, dtype, head_dim)
  if why:
    raise UserError(f"config.compute.attention={name!r} {why}; use 'auto' or 'xla'")
  return name


def packed_attention(
  q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments_BS: jax.Array, implementation: str
) -> jax.Array:
  """Packed causal attention within segments: query i sees key j iff j <= i and both lie in the same segment.

  Segments are consecutive runs; 0 is padding, whose outputs are finite and unused.

  Args:
    q_BSNH, k_BSKH, v_BSKH: queries, keys, values of the row.
    segments_BS: int32 segment ids.
    implementation: "xla" or a key of `kernels.KERNELS`, as `choose` returns it, or "cudnn:Z" as `with_segments` does;
      "fused" is plain here, see `cache.Prefix`.
  """
  if implementation in ("xla", "fused"):
    return attention(q_BSNH, k_BSKH, v_BSKH, segments_BS, segments_BS, 0)
  name, _, table = implementation.partition(":")
  kernel = kernels.KERNELS[name]
  run = (lambda q, k, v, s: kernels.cudnn(q, k, v, s, int(table))) if table else kernel
  return over_shards(run, q_BSNH, k_BSKH, v_BSKH, segments_BS)


def with_segments(implementation: str, most: int) -> str:
  """The implementation for rows of at most `most` segments: cuDNN gets a table of that size, in place of any it has.

  Raises:
    UserError: the rows have more than its largest table.
  """
  if implementation.partition(":")[0] != "cudnn":
    return implementation
  table = kernels.table_for(most)
  if table is None:
    raise UserError(
      f"config.compute.attention='cudnn' takes rows of at most {kernels.MOST_SEGMENTS} samples, the data's have {most}; "
      "use 'auto' or 'xla'"
    )
  return f"cudnn:{table}"


def over_shards(kernel: Callable[..., jax.Array], q_BSNH, k_BSKH, v_BSKH, segments_BS) -> jax.Array:
  """Runs a kernel on each device's rows and heads by shard_map: the compiler cannot partition a kernel."""
  groups = q_BSNH.shape[2] // k_BSKH.shape[2]
  repeat = lambda x: jnp.repeat(x, groups, axis=2) if groups > 1 else x
  args = (q_BSNH, repeat(k_BSKH), repeat(v_BSKH), segments_BS)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return kernel(*args)
  spec = sharding.named(mesh, ("batch", None, "heads", None), q_BSNH.shape).spec
  rows = sharding.named(mesh, ("batch", None), segments_BS.shape).spec
  return jax.shard_map(kernel, in_specs=(spec, spec, spec, rows), out_specs=spec, check_vma=False)(*args)


def unmasked(packed: str, dtype: Any, head_dim: int) -> str:
  """The implementation of attention without a mask beside that of packed rows: "cudnn" or "xla".

  "cudnn" where a config names a kernel of a GPU and the heads fit; not beside "triton", which "auto" takes there.
  """
  chosen = packed.partition(":")[0] in ("cudnn", "packed")
  return "cudnn" if chosen and kernels.fuses_causal(dtype, head_dim) else "xla"


def unmasked_attention(q_BSNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, implementation: str) -> jax.Array:
  """Softmax attention of every query to every key, [B, S, N, H] in the dtype of v; logits and softmax in f32.

  `implementation`: as `unmasked` returns it.
  """
  if implementation == "cudnn":
    return jax.nn.dot_product_attention(q_BSNH, k_BTNH, v_BTNH, implementation="cudnn")
  scale = q_BSNH.shape[-1] ** -0.5
  logits = jnp.einsum("BSNH,BTNH->BNST", q_BSNH, k_BTNH, preferred_element_type=jnp.float32) * scale
  weights = jax.nn.softmax(logits, axis=-1).astype(v_BTNH.dtype)
  return jnp.einsum("BNST,BTNH->BSNH", weights, v_BTNH)
