"""VQ-16, the tokenizer of LlamaGen (kind "vq"): convolutions around a codebook that is compared by direction.

Legend: B images, H x W pixels, h x w codes of an image, C channels, E numbers of a code, V rows of the codebook.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow.errors import UserError
from jflow.models.autoencoders.base import CodebookConfig
from jflow.models.autoencoders.kl import MOST_LEVELS, UPSAMPLED, Conv, Decoder, Encoder, decoder_flops, encoder_flops
from jflow.models.initial import Normal
from jflow.models.layers import parameter
from jflow.strict_json import shown

_PUBLISHED_GROUPS = 32  # of VQ-16's norms
_SHORTEST = 1e-12  # a vector is divided by its L2 norm, at least this


@dataclasses.dataclass(frozen=True)
class VQConfig(CodebookConfig):
  """The sizes of a `VQ`."""

  used_in_float32 = rf"(encoder|quant_conv)/.*|decoder/{UPSAMPLED}"  # a code is exact, so its encoder is

  channels: int  # of the first convolution
  multipliers: tuple[int, ...]  # of `channels`, per resolution; the factor is 2 ** (len - 1)
  blocks_per_level: int
  latent_channels: int  # between the convolutions and the 1x1 ones around the codebook
  norm_groups: int

  @property
  def factor(self) -> int:
    return 2 ** (len(self.multipliers) - 1)

  @property
  def widths(self) -> tuple[int, ...]:
    """Channels per resolution."""
    return tuple(self.channels * m for m in self.multipliers)

  def check(self, model: Any) -> None:
    multipliers = self.multipliers
    if len(multipliers) > MOST_LEVELS:
      raise UserError(f"model.autoencoder.multipliers={shown(multipliers)} must hold at most {MOST_LEVELS} numbers")
    if not multipliers or any(m < 1 for m in multipliers):
      raise UserError(f"model.autoencoder.multipliers={shown(multipliers)} must hold positive integers")
    if self.channels % self.norm_groups:
      raise UserError(
        f"model.autoencoder.channels={self.channels} must be a multiple of norm_groups={self.norm_groups}"
      )

  def rows(self, codebook: Any) -> Any:
    """The rows at length 1."""
    return unit(codebook)

  def make(self, dtype: Any) -> "VQ":
    return VQ(self, dtype)

  def encoder_identity(self) -> tuple[Any, ...]:
    more = () if self.norm_groups == _PUBLISHED_GROUPS else (self.norm_groups,)  # keeps fingerprints of existing codes
    return self.kind, self.codebook_size, self.code_dim, *more

  def encoder_flops(self, image_size: int) -> float:
    sizes = (self.widths, self.blocks_per_level, self.latent_channels)
    stack = encoder_flops(image_size, *sizes, attention=True, first=self.channels)
    codes = (image_size // self.factor) ** 2
    return stack + 2.0 * codes * self.code_dim * (self.latent_channels + self.codebook_size)

  def decoder_flops(self, latent_size: int) -> float:
    stack = decoder_flops(latent_size, self.widths, self.blocks_per_level, self.latent_channels, attention=True)
    return stack + 2.0 * latent_size**2 * self.code_dim * self.latent_channels


class VQ(nn.Module):
  """The tokenizer; its encoder, the norms, the comparison of codes and the pixels are f32, the decoder in `dtype`."""

  config: VQConfig
  dtype: Any

  def setup(self) -> None:
    c = self.config
    # In f32 whatever the model computes in: rounding would choose other codes than those that were made ahead.
    self.encoder = Encoder(
      c.widths, c.blocks_per_level, c.norm_groups, c.latent_channels, jnp.float32, attention=True, first=c.channels
    )
    self.quant_conv = Conv(c.code_dim, 1, jnp.float32)
    shape = (c.codebook_size, c.code_dim)
    self.codebook = parameter(self, "codebook", Normal(1.0), shape, (None, None))
    self.post_quant_conv = Conv(c.latent_channels, 1, self.dtype)
    self.decoder = Decoder(c.widths, c.blocks_per_level, c.norm_groups, self.dtype, attention=True)

  def __call__(self, pixels_BHWC: jax.Array) -> jax.Array:
    """The reconstruction of pixels, encoded and decoded."""
    return self.decode(self.encode(pixels_BHWC))

  def encode(self, pixels_BHWC: jax.Array) -> jax.Array:
    """f32[B, H, W, 3] in [-1, 1] -> codes int32[B, h, w]."""
    return nearest(self.latents(pixels_BHWC), self.codebook)

  def latents(self, pixels_BHWC: jax.Array) -> jax.Array:
    """f32[B, H, W, 3] in [-1, 1] -> f32[B, h, w, E], not quantised."""
    return self.quant_conv(self.encoder(pixels_BHWC)).astype(jnp.float32)

  def lookup(self, codes_Bhw: jax.Array) -> jax.Array:
    """The rows of codes, of length 1: int32[B, h, w] -> f32[B, h, w, E]."""
    return self.config.rows(self.codebook.astype(jnp.float32)[codes_Bhw])

  def decode(self, codes_Bhw: jax.Array) -> jax.Array:
    """int32[B, h, w] -> f32[B, H, W, 3], about [-1, 1], not clipped."""
    return self.decoder(self.post_quant_conv(self.lookup(codes_Bhw))).astype(jnp.float32)


def unit(x: jax.Array) -> jax.Array:
  """x over its L2 norm, along the last axis."""
  return x / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True)), _SHORTEST)


def nearest(z_BhwE: jax.Array, codebook_VE: jax.Array) -> jax.Array:
  """The row of the largest cosine, the lowest of equal ones: f32[B, h, w, E] -> int32[B, h, w]."""
  rows_EV = unit(codebook_VE.astype(jnp.float32)).T

  def line(z_BwE: jax.Array) -> jax.Array:  # one line of a map at a time: all cosines would be [B, h, w, V]
    return jnp.argmax(jnp.dot(z_BwE, rows_EV, precision="highest"), axis=-1).astype(jnp.int32)

  return jnp.moveaxis(jax.lax.map(line, jnp.moveaxis(unit(z_BhwE), 1, 0)), 0, 1)
