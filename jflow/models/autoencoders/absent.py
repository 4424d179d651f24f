"""A placeholder for the autoencoder that a checkpoint lacks (kind "absent"): its sizes only, for a model that reads."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow.errors import UserError
from jflow.models.autoencoders.base import AutoencoderConfig


@dataclasses.dataclass(frozen=True)
class AbsentConfig(AutoencoderConfig):
  """The sizes that the rest of the model implies."""

  pixels_per_latent: int  # along one side

  @property
  def factor(self) -> int:
    return self.pixels_per_latent

  def make(self, dtype: Any) -> "Absent":
    return Absent(self)

  def encoder_identity(self) -> tuple[Any, ...]:
    return (self.kind,)

  def encoder_flops(self, image_size: int) -> float:
    return 0.0

  def decoder_flops(self, latent_size: int) -> float:
    return 0.0


class Absent(nn.Module):
  """A module without parameters; its methods raise UserError, except during `init`, which calls every part."""

  config: AbsentConfig

  def __call__(self, pixels_BHWC: jax.Array) -> jax.Array:
    return pixels_BHWC

  def encode(self, pixels_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    self._need_init()
    b, h, w, _ = pixels_BHWC.shape
    k = self.config.factor
    return (jnp.zeros((b, h // k, w // k, self.config.latent_channels)),) * 2

  def decode(self, latents_BHWC: jax.Array) -> jax.Array:
    self._need_init()
    b, h, w, _ = latents_BHWC.shape
    return jnp.zeros((b, h * self.config.factor, w * self.config.factor, 3))

  def _need_init(self) -> None:
    if not self.is_initializing():
      raise UserError("the model has no autoencoder (model.autoencoder.kind='absent'): it reads images and writes none")
