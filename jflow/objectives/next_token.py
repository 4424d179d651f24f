"""The LLM's head and its cross entropy in one pass, without a [tokens, vocabulary] array and only where the mask holds.

Legend: B batch, S sequence, T positions of a device, Q positions of a chunk, D embed, V vocab (a device's share of it).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jflow import sharding

CHUNK = 512  # positions whose logits exist at once: 200 MiB of f32 at a vocabulary of 102,400

SCOPE = "head_loss_chunks"  # marks the loop in a compiled program: its length depends on the batch


def chunks(positions: int, size: int = CHUNK) -> int:
  """The number of chunks for so many positions with loss."""
  return -(-positions // size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def loss(
  hidden_BSD: jax.Array, kernel_DV: jax.Array, targets_BS: jax.Array, mask_BS: jax.Array, chunk: int = CHUNK
) -> jax.Array:
  """The sum over masked positions of -log softmax(hidden @ kernel)[target] (eq. 6).

  Each device gathers its positions that carry loss and loops over as many chunks as they fill, so that the work follows
  the mask and no position is left out. The same pass computes the gradients, while the logits of a chunk exist; the
  kernel's is summed in f32.

  Args:
    hidden_BSD: after the final norm; its dtype is that of the matmuls.
    kernel_DV: the head's f32 master. Cut over the mesh, it is gathered once, in the dtype of `hidden_BSD`.
    targets_BS: int32.
    mask_BS: bool; positions that count.
    chunk: positions per chunk.

  Returns:
    f32[].
  """
  total: Any = _sharded(hidden_BSD, kernel_DV, targets_BS, mask_BS, chunk, gradients=False)
  return total


def _forward(hidden_BSD, kernel_DV, targets_BS, mask_BS, chunk):
  loss, d_hidden, d_kernel = _sharded(hidden_BSD, kernel_DV, targets_BS, mask_BS, chunk, gradients=True)
  return loss, (d_hidden, d_kernel)


def _backward(chunk, gradients, scale):
  d_hidden, d_kernel = gradients
  return (scale * d_hidden).astype(d_hidden.dtype), scale * d_kernel, None, None


loss.defvjp(_forward, _backward)


def _sharded(hidden_BSD, kernel_DV, targets_BS, mask_BS, chunk, gradients) -> Any:
  """Runs `_pass` on each device's rows; the sums over devices are taken once, at the end."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return _pass(hidden_BSD, kernel_DV, targets_BS, mask_BS, chunk, gradients, (), (), ())
  hidden = sharding.named(mesh, ("batch", None, None), hidden_BSD.shape).spec
  kernel = sharding.named(mesh, ("embed", "vocab"), kernel_DV.shape).spec
  axes = lambda entry: () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
  rows, width, vocabulary = axes(hidden[0]), axes(kernel[0]), axes(kernel[1])
  body = functools.partial(_pass, chunk=chunk, gradients=gradients, rows=rows, width=width, vocabulary=vocabulary)
  flat = PartitionSpec(hidden[0], None)
  out = (PartitionSpec(), hidden, kernel) if gradients else PartitionSpec()
  run = jax.shard_map(body, in_specs=(hidden, kernel, flat, flat), out_specs=out, check_vma=False)
  return run(hidden_BSD, kernel_DV, targets_BS, mask_BS)


def _pass(hidden_BSD, kernel_DV, targets_BS, mask_BS, chunk, gradients, rows, width, vocabulary):
  """One device's pass; `rows`, `width`, `vocabulary` name the mesh axes that cut B, D and V."""
  dtype = hidden_BSD.dtype
  # Pinned: the compiler would otherwise gather the f32 master, twice the bytes, and cast afterwards.
  kernel = jax.lax.optimization_barrier(kernel_DV.astype(dtype))
  for axis in width:
    kernel = jax.lax.all_gather(kernel, axis, axis=0, tiled=True)
  hidden_TD, targets_T = hidden_BSD.reshape(-1, hidden_BSD.shape[-1]), targets_BS.reshape(-1)
  mask_T = mask_BS.reshape(-1)
  n, count, v = mask_T.size, jnp.sum(mask_T, dtype=jnp.int32), kernel.shape[1]
  chunk = min(chunk, n)
  order = jnp.nonzero(mask_T, size=chunks(n, chunk) * chunk, fill_value=n)[0]  # positions with loss first
  first_id = 0
  for axis in vocabulary:
    first_id = first_id * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
  first_id = first_id * v
  across = lambda x, reduce: reduce(x, vocabulary) if vocabulary else x

  def step(carry):
    i, loss, d_hidden, d_kernel = carry
    where_Q = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
    real_Q = where_Q < n
    x_QD = jnp.take(hidden_TD, where_Q, axis=0, mode="fill", fill_value=0)
    ids_Q = jnp.take(targets_T, where_Q, mode="fill", fill_value=0) - first_id
    logits_QV = jnp.dot(x_QD, kernel, preferred_element_type=jnp.float32)
    top_Q = across(jnp.max(logits_QV, axis=-1), jax.lax.pmax)
    exp_QV = jnp.exp(logits_QV - top_Q[:, None])
    total_Q = across(jnp.sum(exp_QV, axis=-1), jax.lax.psum)
    hit_QV = jnp.arange(v)[None] == ids_Q[:, None]
    picked_Q = across(jnp.sum(jnp.where(hit_QV, logits_QV, 0.0), axis=-1), jax.lax.psum)
    loss = loss + jnp.sum(jnp.where(real_Q, jnp.log(total_Q) + top_Q - picked_Q, 0.0))
    if gradients:
      d_QV = exp_QV / total_Q[:, None] - hit_QV
      d_QV = jnp.where(real_Q[:, None], d_QV, 0.0).astype(dtype)
      d_x = across(jnp.dot(d_QV, kernel.T, preferred_element_type=jnp.float32), jax.lax.psum)
      d_hidden = d_hidden.at[where_Q].set(d_x.astype(dtype), mode="drop", unique_indices=False)
      d_kernel = d_kernel + jnp.dot(x_QD.T, d_QV, preferred_element_type=jnp.float32)
    return i + 1, loss, d_hidden, d_kernel

  d_hidden = jnp.zeros_like(hidden_TD) if gradients else None
  d_kernel = jnp.zeros(kernel.shape, jnp.float32) if gradients else None
  start = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32), d_hidden, d_kernel)
  with jax.named_scope(SCOPE):
    _, loss, d_hidden, d_kernel = jax.lax.while_loop(lambda c: c[0] * chunk < count, step, start)
  loss = jax.lax.psum(loss, rows) if rows else loss
  if not gradients:
    return loss
  scattered = tuple(axis for axis in width if axis in rows)  # these devices hold different rows
  for axis in reversed(width):
    if axis in scattered:
      d_kernel = jax.lax.psum_scatter(d_kernel, axis, scatter_dimension=0, tiled=True)
    else:
      size = d_kernel.shape[0] // jax.lax.axis_size(axis)
      d_kernel = jax.lax.dynamic_slice_in_dim(d_kernel, jax.lax.axis_index(axis) * size, size)
  rest = tuple(axis for axis in rows if axis not in scattered)
  d_kernel = jax.lax.psum(d_kernel, rest) if rest else d_kernel
  return loss, d_hidden.reshape(hidden_BSD.shape), d_kernel
