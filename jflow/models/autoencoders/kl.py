"""The autoencoder of SDXL (kind "autoencoder_kl"): convolutions with one attention in the middle.

Legend: B images, H x W pixels or latents, C channels, P positions of an image.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow.errors import UserError
from jflow.models.autoencoders.base import AutoencoderConfig
from jflow.models.initial import Normal
from jflow.models.layers import Linear, parameter
from jflow.strict_json import shown

_EPSILON = 1e-6  # group norms
_LOG_VARIANCE = (-30.0, 20.0)  # range to which the posterior's log variance is clamped
MOST_LEVELS = 12  # a factor of 2048 between pixels and latents
UPSAMPLED = r"up_\d+_sample/kernel"  # of a `Decoder`, whose taps are added before they are cast


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig(AutoencoderConfig):
  """The sizes of diffusers' AutoencoderKL."""

  used_in_float32 = rf"decoder/{UPSAMPLED}"

  block_channels: tuple[int, ...]  # channels per resolution; the factor is 2 ** (len - 1)
  layers_per_block: int
  norm_groups: int

  @property
  def factor(self) -> int:
    return 2 ** (len(self.block_channels) - 1)

  def check(self, model: Any) -> None:
    channels = self.block_channels
    if len(channels) > MOST_LEVELS:
      raise UserError(f"model.autoencoder.block_channels={shown(channels)} must hold at most {MOST_LEVELS} numbers")
    if not channels or any(c < 1 or c % self.norm_groups for c in channels):
      raise UserError(
        f"model.autoencoder.block_channels={channels} must hold multiples of norm_groups={self.norm_groups}"
      )

  def make(self, dtype: Any) -> "AutoencoderKL":
    return AutoencoderKL(self, dtype)

  def encoder_identity(self) -> tuple[Any, ...]:
    return self.kind, self.latent_channels, 0, 0  # the zeros keep the fingerprints of existing latents

  def encoder_flops(self, image_size: int) -> float:
    out = 2 * self.latent_channels
    side = image_size // self.factor
    stack = encoder_flops(image_size, self.block_channels, self.layers_per_block, out)
    return stack + 2.0 * side**2 * out * out

  def decoder_flops(self, latent_size: int) -> float:
    latents = self.latent_channels
    stack = decoder_flops(latent_size, self.block_channels, self.layers_per_block, latents)
    return stack + 2.0 * latent_size**2 * latents * latents


def encoder_flops(
  side: int, widths: Sequence[int], blocks: int, out: int, attention: bool = False, first: int = 0
) -> float:
  """FLOPs of an `Encoder` on one image of side x side pixels."""
  channels = first or widths[0]
  total = _conv_flops(side, 3, channels)
  for level, width in enumerate(widths):
    lowest = level + 1 == len(widths)
    for _ in range(blocks):
      total, channels = total + _resnet_flops(side, channels, width), width
      total += _attention_flops(side, width) if attention and lowest else 0.0
    if not lowest:
      side //= 2
      total += _conv_flops(side, width, width)
  return total + _middle_flops(side, channels) + _conv_flops(side, channels, out)


def decoder_flops(side: int, widths: Sequence[int], blocks: int, into: int, attention: bool = False) -> float:
  """FLOPs of a `Decoder` on one map of side x side; `into` channels."""
  channels = widths[-1]
  total = _conv_flops(side, into, channels) + _middle_flops(side, channels)
  for level, width in enumerate(reversed(widths)):
    for _ in range(blocks + 1):
      total, channels = total + _resnet_flops(side, channels, width), width
      total += _attention_flops(side, width) if attention and not level else 0.0
    if level + 1 < len(widths):
      side *= 2
      total += _conv_flops(side, width, width)
  return total + _conv_flops(side, channels, 3)


def _conv_flops(side: int, inputs: int, outputs: int, size: int = 3) -> float:
  return 2.0 * side**2 * size**2 * inputs * outputs


def _resnet_flops(side: int, inputs: int, outputs: int) -> float:
  shortcut = _conv_flops(side, inputs, outputs, 1) if inputs != outputs else 0.0
  return _conv_flops(side, inputs, outputs) + _conv_flops(side, outputs, outputs) + shortcut


def _attention_flops(side: int, width: int) -> float:
  return 4 * _conv_flops(side, width, width, 1) + 4.0 * side**4 * width


def _middle_flops(side: int, width: int) -> float:
  return 2 * _resnet_flops(side, width, width) + _attention_flops(side, width)


class Conv(nn.Module):
  """Square convolution, `kernel` f32[size, size, in, out]; the VAE is frozen and small: replicated."""

  features: int
  size: int
  dtype: Any
  stride: int = 1
  padding: tuple[int, int] | None = None  # before and after, on both axes; None keeps the size

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    shape = (self.size, self.size, x_BHWC.shape[-1], self.features)
    kernel = parameter(self, "kernel", Normal(), shape, (None,) * 4)
    bias = parameter(self, "bias", nn.initializers.zeros, (self.features,), (None,))
    padding = self.padding or (self.size // 2, self.size // 2)
    y_BHWC = jax.lax.conv_general_dilated(
      x_BHWC.astype(self.dtype),
      kernel.astype(self.dtype),
      window_strides=(self.stride, self.stride),
      padding=(padding, padding),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y_BHWC + bias.astype(self.dtype)


class Upsample(nn.Module):
  """A 3 x 3 convolution of the image with every pixel doubled on both axes; parameters as those of `Conv`.

  Taps that meet the same pixel are added first: 16 products per pixel of the input in place of 36. Of a row w0 w1 w2,
  the even pixels of the output see (w0, w1 + w2) at the pixel before and their own, the odd ones (w0 + w1, w2) at their
  own and the next.
  """

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    b, h, w, c = x_BHWC.shape
    f = self.features
    kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), (3, 3, c, f), (None,) * 4)
    bias = parameter(self, "bias", nn.initializers.zeros, (f,), (None,))
    # A window of two pixels holds the odd pixel of its first and the even one of its second.
    parts = jnp.asarray([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]], jnp.float32)  # [odd or even, tap, of 3]
    merged = jnp.einsum("ysi,xtj,ijcf->stcyxf", parts, parts, kernel.astype(jnp.float32), precision="highest")
    y = jax.lax.conv_general_dilated(
      x_BHWC.astype(self.dtype),
      merged.reshape(2, 2, c, 4 * f).astype(self.dtype),
      window_strides=(1, 1),
      padding=((1, 1), (1, 1)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = jnp.swapaxes(y.reshape(b, h + 1, w + 1, 2, 2, f), 2, 3).reshape(b, 2 * (h + 1), 2 * (w + 1), f)
    return y[:, 1:-1, 1:-1] + bias.astype(self.dtype)


class GroupNorm(nn.Module):
  """Normalises each group of consecutive channels over the whole image, computed in f32."""

  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    b, _, _, c = x_BHWC.shape
    scale = parameter(self, "scale", nn.initializers.ones, (c,), (None,))
    bias = parameter(self, "bias", nn.initializers.zeros, (c,), (None,))
    x = x_BHWC.astype(jnp.float32)
    # Over the image first, then over the channels of a group: faster on a CPU than both at once, and closer to the
    # exact mean, since each sum has fewer terms.
    of_group = lambda mean_BC: jnp.repeat(
      jnp.mean(mean_BC.reshape(b, self.groups, -1), axis=-1), c // self.groups, axis=-1
    )
    x = x - of_group(jnp.mean(x, axis=(1, 2)))[:, None, None]
    variance_BC = of_group(jnp.mean(jnp.square(x), axis=(1, 2)))
    x = x * (jax.lax.rsqrt(variance_BC + _EPSILON) * scale)[:, None, None] + bias
    return x.astype(self.dtype)


class Resnet(nn.Module):
  """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the channels change."""

  features: int
  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    norm = lambda name: GroupNorm(self.groups, self.dtype, name=name)
    y_BHWC = Conv(self.features, 3, self.dtype, name="conv_1")(jax.nn.silu(norm("norm_1")(x_BHWC)))
    y_BHWC = Conv(self.features, 3, self.dtype, name="conv_2")(jax.nn.silu(norm("norm_2")(y_BHWC)))
    if x_BHWC.shape[-1] != self.features:
      x_BHWC = Conv(self.features, 1, self.dtype, name="shortcut")(x_BHWC)
    return x_BHWC + y_BHWC


class MidAttention(nn.Module):
  """Single-head attention over all positions of an image, with a residual."""

  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    b, h, w, c = x_BHWC.shape
    linear = lambda name: Linear(c, (None, None), self.dtype, use_bias=True, name=name)
    x_BPC = GroupNorm(self.groups, self.dtype, name="norm")(x_BHWC).reshape(b, h * w, c)
    q_BPC, k_BPC, v_BPC = linear("query")(x_BPC), linear("key")(x_BPC), linear("value")(x_BPC)
    logits = jnp.einsum("BPC,BQC->BPQ", q_BPC, k_BPC, preferred_element_type=jnp.float32) * c**-0.5
    weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
    y_BPC = linear("output")(jnp.einsum("BPQ,BQC->BPC", weights, v_BPC))
    return x_BHWC + y_BPC.reshape(b, h, w, c)


class Middle(nn.Module):
  """Resnet, attention, resnet at the lowest resolution."""

  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    c = x_BHWC.shape[-1]
    x_BHWC = Resnet(c, self.groups, self.dtype, name="resnet_1")(x_BHWC)
    x_BHWC = MidAttention(self.groups, self.dtype, name="attention")(x_BHWC)
    return Resnet(c, self.groups, self.dtype, name="resnet_2")(x_BHWC)


class Encoder(nn.Module):
  """Resnets at each resolution, the middle at the lowest; the factor is 2 ** (len(widths) - 1).

  Attributes:
    widths: channels per resolution, from the highest.
    blocks: resnets per resolution.
    groups: of the norms.
    out: channels of the result.
    dtype: compute dtype.
    attention: whether attention follows each resnet of the lowest resolution.
    first: channels of the first convolution; 0: those of the highest resolution.
  """

  widths: tuple[int, ...]
  blocks: int
  groups: int
  out: int
  dtype: Any
  attention: bool = False
  first: int = 0

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    """[B, H, W, 3] -> [B, H / factor, W / factor, out]."""
    groups, dtype = self.groups, self.dtype
    x_BHWC = Conv(self.first or self.widths[0], 3, dtype, name="conv_in")(x_BHWC)
    for i, channels in enumerate(self.widths):
      lowest = i + 1 == len(self.widths)
      for j in range(self.blocks):
        x_BHWC = Resnet(channels, groups, dtype, name=f"down_{i}_resnet_{j}")(x_BHWC)
        if self.attention and lowest:
          x_BHWC = MidAttention(groups, dtype, name=f"down_{i}_attention_{j}")(x_BHWC)
      if not lowest:
        x_BHWC = Conv(channels, 3, dtype, stride=2, padding=(0, 1), name=f"down_{i}_sample")(x_BHWC)
    x_BHWC = Middle(groups, dtype, name="middle")(x_BHWC)
    x_BHWC = jax.nn.silu(GroupNorm(groups, dtype, name="norm_out")(x_BHWC))
    return Conv(self.out, 3, dtype, name="conv_out")(x_BHWC)


class Decoder(nn.Module):
  """The middle at the lowest resolution, then resnets at each; attributes as in `Encoder`, `blocks` + 1 resnets
  each."""

  widths: tuple[int, ...]
  blocks: int
  groups: int
  dtype: Any
  attention: bool = False

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    """[B, h, w, C] -> [B, h * factor, w * factor, 3]."""
    groups, dtype = self.groups, self.dtype
    x_BHWC = Conv(self.widths[-1], 3, dtype, name="conv_in")(x_BHWC)
    x_BHWC = Middle(groups, dtype, name="middle")(x_BHWC)
    for i, channels in enumerate(reversed(self.widths)):
      for j in range(self.blocks + 1):
        x_BHWC = Resnet(channels, groups, dtype, name=f"up_{i}_resnet_{j}")(x_BHWC)
        if self.attention and not i:
          x_BHWC = MidAttention(groups, dtype, name=f"up_{i}_attention_{j}")(x_BHWC)
      if i + 1 < len(self.widths):
        x_BHWC = Upsample(channels, dtype, name=f"up_{i}_sample")(x_BHWC)
    x_BHWC = jax.nn.silu(GroupNorm(groups, dtype, name="norm_out")(x_BHWC))
    return Conv(3, 3, dtype, name="conv_out")(x_BHWC)


class AutoencoderKL(nn.Module):
  """The autoencoder of SDXL. Run it in bf16 or f32: fp16 overflows."""

  config: AutoencoderKLConfig
  dtype: Any

  def setup(self) -> None:
    c = self.config
    self.encoder = Encoder(c.block_channels, c.layers_per_block, c.norm_groups, 2 * c.latent_channels, self.dtype)
    self.quant = Conv(2 * c.latent_channels, 1, self.dtype)
    self.post_quant = Conv(c.latent_channels, 1, self.dtype)
    self.decoder = Decoder(c.block_channels, c.layers_per_block, c.norm_groups, self.dtype)

  def __call__(self, pixels_BHWC: jax.Array) -> jax.Array:
    """Reconstructs: the decoded mean of the posterior."""
    return self.decode(self.encode(pixels_BHWC)[0])

  def encode(self, pixels_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f32[B, H, W, 3] in [-1, 1] -> mean, log variance of the posterior, f32[B, h, w, latent_channels]."""
    moments = self.quant(self.encoder(pixels_BHWC)).astype(jnp.float32)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, *_LOG_VARIANCE)

  def decode(self, latents_BHWC: jax.Array) -> jax.Array:
    """f32[B, h, w, latent_channels], not scaled -> f32[B, H, W, 3], about [-1, 1], not clipped."""
    return self.decoder(self.post_quant(latents_BHWC)).astype(jnp.float32)
