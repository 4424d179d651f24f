"""The protocol of the frozen autoencoder between pixels and latents or codes, and its kinds by name.

A kind is one file: a subclass of `AutoencoderConfig` (latents) or of `CodebookConfig` (codes), and the Linen module
that it makes. The module has

  encode: f32[B, H, W, 3] in [-1, 1] -> what an image is written as
    latents: mean, log variance of the posterior, f32[B, h, w, latent_channels], not scaled
    codes: int32[B, h, w], rows of the codebook
  decode: f32[B, h, w, latent_channels], not scaled, or int32[B, h, w] -> f32[B, H, W, 3], about [-1, 1], not clipped
  __call__: decodes the encoded mean or codes, which makes every parameter

The caller multiplies latents by `config.scaling` after `encode` and divides before `decode`. The module of a
`CodebookConfig` has a parameter `codebook`, f32[codebook_size, code_dim].
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jflow import registry
from jflow.errors import UserError

# kind -> its config class.
KINDS = registry.Registry(
  "model.autoencoder.kind",
  "jflow.autoencoders",
  {
    "autoencoder_kl": "jflow.models.autoencoders.kl:AutoencoderKLConfig",
    "vq": "jflow.models.autoencoders.vq:VQConfig",
    "absent": "jflow.models.autoencoders.absent:AbsentConfig",
    "patch_pca": "jflow.world.codec:PatchPCAConfig",
    "patch_codes": "jflow.world.patch_codes:PatchCodesConfig",
  },
)
# In older versions a section held the fields of both kinds: those of the other one are left out.
_SHARED_SECTION = ("block_channels", "layers_per_block", "norm_groups", "patch_size", "window")


@dataclasses.dataclass(frozen=True)
class CodecConfig:
  """The field that every kind has, and what each can say."""

  # A regular expression of paths below the codec's parameters: kernels that it uses in f32 whatever it computes in.
  used_in_float32: ClassVar[str] = ""

  kind: str  # a key of KINDS

  @property
  def factor(self) -> int:
    """Pixels per latent or code, along one side."""
    raise NotImplementedError

  def check(self, model: Any) -> None:
    """Raises UserError naming a field and its value, once all numbers are known to be positive and in bounds."""

  def make(self, dtype: Any) -> Any:
    """Returns the module, which computes in `dtype`."""
    raise NotImplementedError

  def encoder_identity(self) -> tuple[Any, ...]:
    """The values that determine an image's posterior or codes, besides the encoder's parameters."""
    raise NotImplementedError

  def encoder_flops(self, image_size: int) -> float:
    """FLOPs of encoding one image of image_size x image_size pixels."""
    raise NotImplementedError

  def decoder_flops(self, latent_size: int) -> float:
    """FLOPs of decoding one image of latent_size x latent_size latents or codes."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(CodecConfig):
  """The fields of every kind of latents; a kind adds its own."""

  latent_channels: int
  scaling: float  # latents are multiplied by it after encoding


@dataclasses.dataclass(frozen=True)
class CodebookConfig(CodecConfig):
  """The fields of every kind of codes; a kind adds its own."""

  codebook_size: int
  code_dim: int  # numbers of a row of the codebook

  def rows(self, codebook: Any) -> Any:
    """The codebook f32[codebook_size, code_dim] as the decoder reads it."""
    return codebook


def config_class(section: Mapping[str, Any]) -> tuple[type[CodecConfig], dict[str, Any]]:
  """Returns the config class of a section's kind, and the section without the fields of other kinds.

  Raises:
    UserError: an unknown kind.
  """
  if "kind" not in section:
    raise UserError("missing field model.autoencoder.kind")
  cls = KINDS.get(section["kind"])
  own = {field.name for field in dataclasses.fields(cls)}
  return cls, {field: value for field, value in section.items() if field in own or field not in _SHARED_SECTION}
