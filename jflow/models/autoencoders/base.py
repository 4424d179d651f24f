"""The protocol of the frozen autoencoder between pixels and latents, and its kinds by name.

A kind is one file: a subclass of `AutoencoderConfig`, and the Linen module that it makes. The module has

  encode: f32[B, H, W, 3] in [-1, 1] -> mean, log variance of the posterior, f32[B, h, w, latent_channels], not scaled
  decode: f32[B, h, w, latent_channels], not scaled -> f32[B, H, W, 3], about [-1, 1], not clipped
  __call__: decodes the encoded mean, which makes every parameter

The caller multiplies latents by `config.scaling` after `encode` and divides before `decode`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jflow import registry
from jflow.errors import UserError

# kind -> its config class.
KINDS = registry.Registry(
  "model.autoencoder.kind",
  "jflow.autoencoders",
  {
    "autoencoder_kl": "jflow.models.autoencoders.kl:AutoencoderKLConfig",
    "absent": "jflow.models.autoencoders.absent:AbsentConfig",
    "patch_pca": "jflow.world.codec:PatchPCAConfig",
  },
)
# In older versions a section held the fields of both kinds: those of the other one are left out.
_SHARED_SECTION = ("block_channels", "layers_per_block", "norm_groups", "patch_size", "window")


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
  """The fields that every kind has; a kind adds its own."""

  kind: str  # a key of KINDS
  latent_channels: int
  scaling: float  # latents are multiplied by it after encoding

  @property
  def factor(self) -> int:
    """Pixels per latent, along one side."""
    raise NotImplementedError

  def check(self, model: Any) -> None:
    """Raises UserError naming a field and its value, once all numbers are known to be positive and in bounds."""

  def make(self, dtype: Any) -> Any:
    """Returns the module, which computes in `dtype`."""
    raise NotImplementedError

  def encoder_identity(self) -> tuple[Any, ...]:
    """The values that determine an image's posterior, besides the encoder's parameters."""
    raise NotImplementedError

  def encoder_flops(self, image_size: int) -> float:
    """FLOPs of encoding one image of image_size x image_size pixels."""
    raise NotImplementedError

  def decoder_flops(self, latent_size: int) -> float:
    """FLOPs of decoding one image of latent_size x latent_size latents."""
    raise NotImplementedError


def config_class(section: Mapping[str, Any]) -> tuple[type[AutoencoderConfig], dict[str, Any]]:
  """Returns the config class of a section's kind, and the section without the fields of other kinds.

  Raises:
    UserError: an unknown kind.
  """
  if "kind" not in section:
    raise UserError("missing field model.autoencoder.kind")
  cls = KINDS.get(section["kind"])
  own = {field.name for field in dataclasses.fields(cls)}
  return cls, {field: value for field, value in section.items() if field in own or field not in _SHARED_SECTION}
