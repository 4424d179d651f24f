"""The place of an autoencoder that a checkpoint came without (kind "absent"): its sizes alone, for a model that reads."""

import dataclasses
from typing import Any, NoReturn

import flax.linen as nn
import jax

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
    return Absent()

  def encoder_identity(self) -> tuple[Any, ...]:
    return (self.kind,)

  def encoder_flops(self, image_size: int) -> float:
    return 0.0

  def decoder_flops(self, latent_size: int) -> float:
    return 0.0


class Absent(nn.Module):
  """No parameters; raises UserError where it is asked to work."""

  def __call__(self, pixels_BHWC: jax.Array) -> jax.Array:
    return pixels_BHWC

  def encode(self, pixels_BHWC: jax.Array) -> NoReturn:
    raise UserError("the model has no autoencoder (model.autoencoder.kind='absent'): it reads images and writes none")

  def decode(self, latents_BHWC: jax.Array) -> NoReturn:
    self.encode(latents_BHWC)
