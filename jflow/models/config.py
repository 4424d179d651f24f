"""The configuration of the whole model: one frozen dataclass, its parts as fields.

It is hashable (a static argument of jit), travels as JSON, and holds no default: the presets stand in
`configs/models.py`, the sizes of a published checkpoint come from its config.json.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from jflow.errors import UserError
from jflow.models.autoencoders import base as autoencoders
from jflow.models.autoencoders.base import AutoencoderConfig
from jflow.strict_json import shown

# The most that a size may be. No model comes near; without an end, one number in a file from elsewhere would have a
# program build blocks or compute with numbers for hours.
_MOST = 2**24
_MOST_OF = {
  "layers": 1024,
  "encoder_blocks": 128,
  "decoder_blocks": 128,
  "layers_per_block": 32,
  "heads": 2**14,
  "kv_heads": 2**14,
  "image_size": 2**14,
  "patch_size": 2**12,
  "window": 2**12,
  "latent_channels": 2**14,
}


def most(field: str) -> int:
  """The largest value of a whole-numbered field, by its name."""
  return _MOST_OF.get(field, _MOST)


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
  """A decoder of Llama layout."""

  vocabulary_size: int
  width: int
  mlp_width: int
  layers: int
  heads: int
  kv_heads: int  # fewer than heads: grouped-query attention
  head_width: int
  rms_norm_epsilon: float
  rope_theta: float
  context: int  # longest sequence, in tokens


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
  """A SigLIP vision tower."""

  image_size: int  # pixels, square
  patch_size: int
  width: int
  mlp_width: int
  layers: int
  heads: int
  layer_norm_epsilon: float
  gelu: str  # "erf" (the release) or "tanh" (Hugging Face checkpoints)

  @property
  def patches(self) -> int:
    return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
  """The ConvNeXt encoder and decoder around the LLM (g_enc, g_dec)."""

  width: int  # channels of g_enc and of the sinusoidal time embedding; g_dec works at twice that
  encoder_blocks: int
  decoder_blocks: int
  patch_size: int  # latents per side of a patch
  norm_epsilon: float


@dataclasses.dataclass(frozen=True)
class JanusFlowConfig:
  """JanusFlow: one LLM that reads images through SigLIP and writes images by rectified flow."""

  language_model: LanguageModelConfig
  understanding_encoder: SiglipConfig
  generation: GenerationConfig
  autoencoder: AutoencoderConfig
  alignment_layer: int  # REPA reads the LLM's features after this block, counted from 1 (paper section 4.1)
  alignment_width: int  # hidden width of the REPA head; 0: the model has none
  # What images are read with: "siglip", or for ablations the VAE and ConvNeXt blocks, "shared" with painting or
  # "separate". Checkpoints older than the field have no choice, hence its default.
  reader: str = "siglip"

  def __post_init__(self) -> None:
    """Checks what can be checked without a device; raises UserError naming field and value."""
    lm, vision, gen, vae = self.language_model, self.understanding_encoder, self.generation, self.autoencoder
    if self.reader not in ("siglip", "shared", "separate"):
      raise UserError(f"model.reader={shown(self.reader)} must be 'siglip', 'shared' or 'separate'")
    for section in ("language_model", "understanding_encoder", "generation", "autoencoder"):
      for name, value in vars(getattr(self, section)).items():
        if isinstance(value, (int, float)) and not 0 < value < math.inf:
          raise UserError(f"model.{section}.{name}={shown(value)} must be positive")
        if any(isinstance(x, int) and x > most(name) for x in (value if isinstance(value, tuple) else (value,))):
          raise UserError(f"model.{section}.{name}={shown(value)} must be at most {most(name)}")
    vae.check()
    for name, value in (("alignment_layer", self.alignment_layer), ("alignment_width", self.alignment_width)):
      if not 0 <= value <= _MOST:
        raise UserError(f"model.{name}={shown(value)} must be in 0..{_MOST}")
    if lm.heads % lm.kv_heads:
      raise UserError(f"model.language_model.heads={lm.heads} must be a multiple of kv_heads={lm.kv_heads}")
    if lm.head_width % 2:
      raise UserError(f"model.language_model.head_width={lm.head_width} must be even (rotary halves)")
    if vision.image_size % vision.patch_size:
      raise UserError(
        f"model.understanding_encoder.image_size={vision.image_size} must be a multiple of "
        f"patch_size={vision.patch_size}"
      )
    if vision.width % vision.heads:
      raise UserError(f"model.understanding_encoder.width={vision.width} must be a multiple of heads={vision.heads}")
    if vision.gelu not in ("erf", "tanh"):
      raise UserError(f"model.understanding_encoder.gelu={shown(vision.gelu)} must be 'erf' or 'tanh'")
    if gen.width % 2:
      raise UserError(f"model.generation.width={gen.width} must be even (cosines and sines of the time)")
    if vision.image_size % (vae.factor * gen.patch_size):
      raise UserError(
        f"image_size={vision.image_size} must be a multiple of autoencoder factor {vae.factor} x "
        f"model.generation.patch_size={gen.patch_size}"
      )
    if self.patches != vision.patches:
      raise UserError(
        f"a written image has {self.patches} patches, a read one {vision.patches}: they must be equal, since "
        "the alignment loss (eq. 8) compares them position by position"
      )
    if not 1 <= self.alignment_layer <= lm.layers:
      raise UserError(f"model.alignment_layer={self.alignment_layer} must be in 1..{lm.layers}")

  @property
  def image_size(self) -> int:
    return self.understanding_encoder.image_size

  @property
  def latent_size(self) -> int:
    """Latents along one side of an image."""
    return self.image_size // self.autoencoder.factor

  @property
  def patches(self) -> int:
    """P: patches of a written image, equal to those of a read one."""
    return (self.latent_size // self.generation.patch_size) ** 2

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> "JanusFlowConfig":
    """Builds the configuration from nested mappings; names a missing, unknown or mistyped field."""
    if isinstance(values, Mapping):  # checkpoints of older versions say whether stage 0's sigmoid loss had its heads
      values = {name: value for name, value in values.items() if name != "contrastive"}
    return _build(cls, values, "model")


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
  if not isinstance(values, Mapping):
    raise UserError(f"{path} must be a mapping of fields, not {shown(values)}")
  hints = typing.get_type_hints(cls)
  newer = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
  values = {**newer, **values}
  unknown, missing = sorted(map(str, set(values) - set(hints))), sorted(set(hints) - set(values))
  if unknown:
    raise UserError(f"unknown field {path}.{shown(unknown[0])[1:-1]}; known: {', '.join(hints)}")
  if missing:
    raise UserError(f"missing field {path}.{missing[0]}")
  return cls(**{name: _field(hint, values[name], f"{path}.{name}") for name, hint in hints.items()})


def _field(hint: Any, value: Any, path: str) -> Any:
  if hint is AutoencoderConfig and isinstance(value, Mapping):
    hint, value = autoencoders.config_class(value)
  if dataclasses.is_dataclass(hint):
    return _build(hint, value, path)
  if isinstance(hint, types.GenericAlias):  # tuple[int, ...]
    if not isinstance(value, (tuple, list)) or not all(type(v) is int for v in value):
      raise UserError(f"{path} must be a list of integers, not {shown(value)}")
    return tuple(value)
  if hint is float and type(value) is int and abs(value) < 2**63:
    value = float(value)
  if type(value) is not hint:
    raise UserError(f"{path} must be of type {hint.__name__}, not {shown(value)}")
  if hint is int and value < 0:
    raise UserError(f"{path} must not be negative, not {shown(value)}")
  return value
