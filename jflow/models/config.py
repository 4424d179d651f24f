"""The configuration of the whole model: one frozen dataclass, its parts as fields.

It is hashable (a static argument of jit), is stored as JSON, and has no defaults: the presets are in
`configs/models.py`, the sizes of a published checkpoint in its config.json. A section's `kind` or name is looked up in
the registries of generation/base.py, objectives/base.py and models/llm/base.py.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from jflow.errors import UserError
from jflow.generation.base import FAMILIES
from jflow.models.autoencoders import base as autoencoders
from jflow.models.autoencoders.base import CodecConfig
from jflow.models.llm.base import ARCHITECTURES
from jflow.models.sizes import check_sizes
from jflow.objectives.base import OBJECTIVES
from jflow.strict_json import shown

READERS = ("siglip", "shared", "separate")
STARTS = ("learned", "token")


@dataclasses.dataclass(frozen=True)
class ReaderConfig:
  """The section `model.reader`: how images that are read enter the LLM."""

  # The encoder: "siglip", or for ablations the VAE and ConvNeXt blocks, "shared" with writing or "separate".
  kind: str
  # What stands in the slot of the begin-of-image token: "learned", a vector of its own (JanusFlow); "token", the
  # token's embedding (Janus).
  start: str
  layers: int  # linear maps of the projector, GELU between them

  def check(self, model: "ModelConfig") -> None:
    """Raises UserError naming field and value."""
    for field, known in (("kind", READERS), ("start", STARTS)):
      value = getattr(self, field)
      if value not in known:
        names = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
        raise UserError(f"model.reader.{field}={shown(value)} must be {names}")
    if self.kind == "siglip":
      return
    if model.generation.kind != "flow":
      raise UserError(
        f"model.reader.kind={shown(self.kind)} needs model.generation.kind='flow', whose encoder it reads with"
      )
    if self.layers != 1:
      raise UserError(f"model.reader.layers={self.layers} must be 1 where model.reader.kind={shown(self.kind)}")


JANUSFLOW_READER = ReaderConfig("siglip", "learned", 1)


def reader_section(kind: str) -> dict[str, Any]:
  """Returns the section for the name that older configs have in its place."""
  return dataclasses.asdict(JANUSFLOW_READER) | {"kind": kind}


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
  """The sizes of a SigLIP vision tower."""

  image_size: int  # pixels, square
  patch_size: int
  embed_dim: int
  mlp_dim: int
  num_layers: int
  num_heads: int
  layer_norm_epsilon: float
  gelu: str  # "erf" (the release) or "tanh" (Hugging Face checkpoints)

  @property
  def patches(self) -> int:
    """Whole patches; what is left at the right and the bottom is not seen, as by a convolution without padding."""
    return (self.image_size // self.patch_size) ** 2

  def check(self, model: "ModelConfig") -> None:
    """Raises UserError naming field and value."""
    if self.image_size < self.patch_size:
      raise UserError(
        f"model.understanding_encoder.image_size={self.image_size} must be at least patch_size={self.patch_size}"
      )
    if self.embed_dim % self.num_heads:
      raise UserError(
        f"model.understanding_encoder.embed_dim={self.embed_dim} must be a multiple of num_heads={self.num_heads}"
      )
    if self.gelu not in ("erf", "tanh"):
      raise UserError(f"model.understanding_encoder.gelu={shown(self.gelu)} must be 'erf' or 'tanh'")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """One LLM that reads images through SigLIP and writes images in the way that `generation.kind` names."""

  language_model: Any  # of `ARCHITECTURES[kind].config`
  understanding_encoder: SiglipConfig
  generation: Any  # of `FAMILIES[kind].config`
  autoencoder: Any  # a `CodecConfig`; None: the writer needs none
  objectives: tuple[tuple[str, Any], ...]  # (name, of `OBJECTIVES[name].config`): losses with heads of their own
  reader: ReaderConfig

  def __post_init__(self) -> None:
    """Checks what can be checked without a device; raises UserError naming field and value."""
    sections = ("reader", "language_model", "understanding_encoder", "autoencoder", "generation")
    parts = [(name, getattr(self, name)) for name in sections if getattr(self, name) is not None]
    parts += [(f"objectives.{name}", config) for name, config in self.objectives]
    for name, config in parts:
      check_sizes(f"model.{name}", config)
    for _, config in parts:
      config.check(self)
    read = self._read_layers
    for name, layer in read.items():
      if not 1 <= layer <= self.language_model.num_layers:
        raise UserError(f"model.objectives.{name}.layer={layer} must be in 1..{self.language_model.num_layers}")
    if len(set(read.values())) > 1:
      named = ", ".join(f"model.objectives.{name}.layer={layer}" for name, layer in read.items())
      raise UserError(f"{named} must be equal: the LLM gives the output of one block")

  @property
  def image_size(self) -> int:
    """Side of every image in pixels."""
    return self.understanding_encoder.image_size

  @property
  def latent_size(self) -> int:
    """Latents, or codes, along one side of an image."""
    return self.image_size // self.autoencoder.factor

  @property
  def patches(self) -> int:
    """P: patches of an image that is read."""
    return self.understanding_encoder.patches

  @property
  def written_patches(self) -> int:
    """Patches of an image that is written; as many as of one that is read, unless the writer counts its own."""
    own = getattr(self.generation, "written_patches", None)
    return own(self) if own else self.patches

  @property
  def hidden_layer(self) -> int:
    """The LLM block whose output an objective reads, counted from 1; 0: none."""
    return next(iter(self._read_layers.values()), 0)

  @property
  def _read_layers(self) -> dict[str, int]:
    """Objective -> the LLM block that it reads, of those that read one."""
    return {name: config.layer for name, config in self.objectives if hasattr(config, "layer")}

  def objective(self, name: str) -> Any:
    """The config of an objective; None where the model has none of this name."""
    return dict(self.objectives).get(name)

  def to_dict(self) -> dict[str, Any]:
    """Returns nested mappings, for JSON and `from_dict`."""
    return dataclasses.asdict(self) | {"objectives": {n: dataclasses.asdict(c) for n, c in self.objectives}}

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
    """Builds the configuration from nested mappings; names a missing, unknown or mistyped field."""
    values = dict(_upgraded(values)) if isinstance(values, Mapping) else values
    _check_names(cls, values, "model")
    language, generation = (_mapping(values[name], f"model.{name}") for name in ("language_model", "generation"))
    autoencoder, objectives = values["autoencoder"], _mapping(values["objectives"], "model.objectives")
    return cls(
      language_model=_build(ARCHITECTURES.get(language.get("kind")).config, language, "model.language_model"),
      understanding_encoder=_build(SiglipConfig, values["understanding_encoder"], "model.understanding_encoder"),
      generation=_build(FAMILIES.get(generation.get("kind")).config, generation, "model.generation"),
      autoencoder=None if autoencoder is None else _autoencoder(_mapping(autoencoder, "model.autoencoder")),
      objectives=tuple(
        (name, _build(OBJECTIVES.get(name).config, section, f"model.objectives.{name}"))
        for name, section in objectives.items()
      ),
      reader=_build(ReaderConfig, values["reader"], "model.reader"),
    )


def _autoencoder(values: Mapping[str, Any]) -> CodecConfig:
  kind, own = autoencoders.config_class(values)
  return _build(kind, own, "model.autoencoder")


# Names of fields as config.json of version 0.1.0 has them, by section.
_SIZES = {"width": "embed_dim", "mlp_width": "mlp_dim", "layers": "num_layers", "heads": "num_heads"}
_RENAMED: dict[str, dict[str, str]] = {
  "language_model": _SIZES
  | {"vocabulary_size": "vocab_size", "kv_heads": "num_kv_heads", "head_width": "head_dim", "context": "max_length"},
  "understanding_encoder": _SIZES,
  "generation": {"width": "channels"},
}


def _upgraded(values: Mapping[str, Any]) -> Mapping[str, Any]:
  """Renames the fields of an older config.json."""
  new = {name: value for name, value in values.items() if name != "contrastive"}  # said how stage 0 was trained
  new.setdefault("reader", "siglip")  # older than the choice
  if isinstance(new["reader"], str):
    new["reader"] = reader_section(new["reader"])
  for name, kind in (("language_model", "llama"), ("generation", "flow")):
    if isinstance(new.get(name), Mapping):
      new[name] = {"kind": kind, **new[name]}
  for section, renamed in _RENAMED.items():
    if isinstance(new.get(section), Mapping) and new[section].get("kind") in ("llama", "flow", None):
      given = new[section]  # an old name beside the new one stays, and is refused as unknown
      new[section] = {now if (now := renamed.get(old, old)) not in given else old: x for old, x in given.items()}
  if "alignment_width" in new and "objectives" not in new:
    width, layer = new.pop("alignment_width"), new.pop("alignment_layer", None)
    new["objectives"] = {"alignment": {"layer": layer, "hidden_dim": width}} if width != 0 else {}
  return new


def _mapping(values: Any, path: str) -> Mapping[str, Any]:
  if not isinstance(values, Mapping):
    raise UserError(f"{path} must be a mapping of fields, not {shown(values)}")
  return values


def _check_names(cls: type, values: Any, path: str) -> None:
  known = [field.name for field in dataclasses.fields(cls)]
  unknown = sorted(map(str, set(_mapping(values, path)) - set(known)))
  missing = sorted(set(known) - set(values))
  if unknown:
    raise UserError(f"unknown field {path}.{shown(unknown[0])[1:-1]}; known: {', '.join(known)}")
  if missing:
    raise UserError(f"missing field {path}.{missing[0]}")


def _build(cls: type, values: Any, path: str) -> Any:
  _check_names(cls, values, path)
  hints = typing.get_type_hints(cls)
  names = [field.name for field in dataclasses.fields(cls)]
  return cls(**{name: _field(hints[name], values[name], f"{path}.{name}") for name in names})


def _field(hint: Any, value: Any, path: str) -> Any:
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
