"""Matrix products in 8 bits, `compute.matmul="fp8"`: e4m3 forward, e5m2 for gradients (https://arxiv.org/abs/2209.05433).

A tensor is divided by one scale so that its largest magnitude just fits, cast, multiplied, and the product multiplied
by both scales again; sums are f32 in the backward products, and in the forward ones as a device makes them. The scale
is that of the tensor itself ("current", not "delayed" by an earlier step): so there is no state, a step depends on
nothing but (state, batch), and microbatches and resumption need no care.
Flax's modules for such products keep delayed scales as parameters, which scans, adapters and checkpoints here would
have to know; of them only the cast is used. Scales are powers of two: dividing by one loses nothing, so that another
scale, of another microbatch or share of the rows, changes only what is too small for the type.

Not in the paper: it trains in bfloat16.

Legend: R rows, D inputs, F outputs.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import fp8_ops

from jflow.sharding import constrain, whole

DTYPE, FP8 = "dtype", "fp8"  # the values of `compute.matmul`
FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2
_CAPABILITY = 8.9  # the least of a GPU with such products
_LEAST = 2.0**-60  # a tensor without a larger magnitude may become zeros; the scales of two have a product
_EXPONENT = 0x7F800000  # the bits of a float32's exponent


def obstacle(device: jax.Device) -> str:
  """Returns why a device has no such products, as the end of a sentence; empty if it has, or emulates them (a CPU)."""
  if device.platform == "cpu":
    return ""
  if device.platform != "gpu":
    return f"does not run on {device.platform}"
  found = getattr(device, "compute_capability", "0")
  return "" if float(found) >= _CAPABILITY else f"needs a GPU of compute capability {_CAPABILITY} or later, not {found}"


def scale_of(x: jax.Array, kind: Any) -> jax.Array:
  """The least power of two, f32[], that brings x into the range of `kind` as its divisor; not finite where x is not."""
  most = float(jnp.finfo(kind).max)
  top = jnp.maximum(jnp.max(jnp.abs(x)).astype(jnp.float32), _LEAST)
  bits = jax.lax.bitcast_convert_type(top, jnp.int32) & _EXPONENT
  least = jax.lax.bitcast_convert_type(bits, jnp.float32) * 2.0 ** -math.floor(math.log2(most))
  return jnp.where(top > most * least, 2 * least, least)


def quantized(x: jax.Array, kind: Any) -> tuple[jax.Array, jax.Array]:
  """x / scale in `kind`, rounded to nearest, and the scale."""
  scale = scale_of(x, kind)
  return fp8_ops.quantize(x, kind, scale, jnp.float32), scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x_RD: jax.Array, kernel_DF: jax.Array, axes: tuple[str | None, str | None]) -> jax.Array:
  """x_RD @ kernel_DF in 8 bits, [R, F] in the type of x; so are both products of its gradient.

  `axes`: the kernel's logical axes; it is gathered over `fsdp` in 8 bits.
  """
  return _forward(x_RD, kernel_DF, axes)[0]


def _forward(x_RD, kernel_DF, axes):
  (x, of_x), (kernel, of_kernel) = quantized(x_RD, FORWARD), quantized(kernel_DF, FORWARD)
  like = jnp.zeros((0,), x_RD.dtype), jnp.zeros((0,), kernel_DF.dtype)
  kernel = constrain(kernel, *axes)  # or XLA gathers it before it is rounded
  return _dot(x, whole(kernel, *axes), (1, 0), of_x * of_kernel, x_RD.dtype), (x, of_x, kernel, of_kernel, *like)


def _backward(axes, kept, dy_RF):
  x, of_x, kernel, of_kernel, like_x, like_kernel = kept
  dy, of_dy = quantized(dy_RF, BACKWARD)
  exact = jax.lax.Precision.HIGHEST  # by default cuBLASLt adds up 8-bit products in less than f32
  dx_RD = _dot(dy, whole(kernel, *axes), (1, 1), of_dy * of_kernel, like_x.dtype, exact)
  dkernel_DF = constrain(_dot(x, dy, (0, 0), of_x * of_dy, like_x.dtype, exact), *axes)
  return dx_RD, dkernel_DF.astype(like_kernel.dtype)


product.defvjp(_forward, _backward)


def _dot(
  a: jax.Array, b: jax.Array, over: tuple[int, int], scale: jax.Array, dtype: Any, precision: Any = None
) -> jax.Array:
  """The product of two matrices over one axis of each, times `scale`: on a GPU one call of cuBLASLt."""
  dimensions = (((over[0],), (over[1],)), ((), ()))
  return jax.lax.dot_general(a, b, dimensions, precision, preferred_element_type=dtype) * scale.astype(dtype)
