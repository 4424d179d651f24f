"""Directories of published layouts: reading and writing.

A directory holds config.json, the weights, and the tokenizer's and processor's files. The VAE of JanusFlow is published
separately (sdxl-vae), and may be in `vae/` inside the directory or anywhere else.
"""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jflow.data import templates
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.interop import budget, layouts, tied, transfer
from jflow.interop import vae as diffusers_vae
from jflow.interop.fields import Fields
from jflow.interop.layouts import Layout
from jflow.interop.safetensors_io import Checkpoint
from jflow.models import weights as names
from jflow.models.autoencoders.kl import AutoencoderKLConfig
from jflow.models.config import ModelConfig
from jflow.strict_json import read_object

# Files of the processor, copied unread with a published checkpoint so that an export can include them.
SIDECARS = (
  "config.json",
  "preprocessor_config.json",
  "processor_config.json",
  "special_tokens_map.json",
  "generation_config.json",
  "chat_template.jinja",
  "chat_template.json",
)


class Loaded(NamedTuple):
  """A model read from disk."""

  config: ModelConfig
  params: dict[str, np.ndarray]  # path, keys joined by "/", -> array; without "vae/..." where there is no VAE
  has_vae: bool
  tokenizer: Tokenizer | None
  template: str  # of `data.templates`
  sampling: Mapping[str, Any] = {}  # see `generation.base.own_settings`


class Described(NamedTuple):
  """A model whose files are consistent, as far as can be checked before its weights are read."""

  config: ModelConfig
  has_vae: bool
  tokenizer: Tokenizer | None
  template: str
  parts: tuple[transfer.Weights, ...]
  unread: Mapping[str, tuple[int, ...]]  # parameters without a tensor, which become zeros, and their shapes

  def read(self, dtype: np.dtype | None = None) -> dict[str, np.ndarray]:
    """Reads the weights; see `load`."""
    budget.check(sum(part.bytes(dtype) for part in self.parts), self.parts[0].checkpoint.directory)
    params = {path: x for part in self.parts for path, x in part.read(dtype).items()}
    kind = dtype or params["language_model/embed"].dtype
    return params | {path: np.zeros(shape, kind) for path, shape in self.unread.items()}


def _buffer(name: str) -> bool:
  """Whether a tensor of an old file is a buffer, which is computed here."""
  return name.endswith((".rotary_emb.inv_freq", ".position_ids"))


def _vae_of(layout: Layout, directory: pathlib.Path, given: pathlib.Path | None) -> pathlib.Path | None:
  """The directory of the VAE: the one given, else `vae/` inside; None where there is none.

  Raises:
    UserError: one is given to a model that holds its own.
  """
  if not layout.vae_apart:
    if given is not None:
      raise UserError(f"--vae={given} is not read with {directory}: {layout.title} holds the decoder of its pictures")
    return None
  inside = directory / "vae"
  return given or (inside if (inside / "config.json").exists() else None)


def read_config(layout: Layout, directory: pathlib.Path, vae: pathlib.Path | None = None) -> ModelConfig:
  """The model's configuration, from config.json and that of the VAE; see `describe`."""
  path, vae = directory / "config.json", _vae_of(layout, directory, vae)
  autoencoder = None
  if vae is not None:
    autoencoder = diffusers_vae.read_config(Fields(read_object(vae / "config.json"), str(vae / "config.json")))
  return layout.read_config(read_object(path), str(path), autoencoder)


def describe(layout: Layout, directory: pathlib.Path, vae: pathlib.Path | None = None) -> Described:
  """Reads a directory of a published layout, but only the headers of its weights.

  Args:
    layout: from `layouts.found`.
    directory: config.json, weights, and the tokenizer's files if any.
    vae: directory of a diffusers AutoencoderKL, for JanusFlow; None: `vae/` inside, if it is there.

  Raises:
    UserError: anything missing, damaged, contradictory, or of another model.
  """
  path = directory / "config.json"
  root = Fields(read_object(path), str(path))
  vae = _vae_of(layout, directory, vae)
  config = read_config(layout, directory, vae)
  for name, check in layout.checks.items():
    if (directory / name).exists():
      check(Fields(read_object(directory / name), str(directory / name)), config)
  tokenizer = Tokenizer.load(str(directory)) if (directory / "tokenizer.json").is_file() else None
  template = layout.template(tokenizer)
  if tokenizer is not None:
    templates.check_fits(template, tokenizer, config)
  checkpoint = Checkpoint(directory, ("model",), layout.instead)
  layout.check_sizes(root, config, checkpoint.tensors, checkpoint.directory)
  section = root.sub(layout.language)
  from_embedding = tied.check(section, layout.is_tied(root), checkpoint, layout.embedding, layout.head)
  entries = layout.entries(config, from_embedding)
  ignored = lambda name: _buffer(name) or layout.ignored(name)
  parts = [transfer.Weights.describe(entries, checkpoint, layout.title, ignored)]
  if vae is not None:
    parts.append(diffusers_vae.describe(vae)[1])
  has_vae = vae is not None or not layout.vae_apart
  return Described(config, has_vae, tokenizer, template, tuple(parts), layout.unread(config))


def load(directory: pathlib.Path, vae: pathlib.Path | None = None, dtype: np.dtype | None = None) -> Loaded:
  """Reads a directory of a published layout.

  Args:
    directory: see `describe`.
    vae: see `describe`.
    dtype: of the parameters; None keeps the file's.

  Raises:
    UserError: anything missing, damaged, or of another model.
  """
  layout = layouts.found(directory)
  if layout is None:
    raise UserError(f"{directory / 'config.json'} is missing or not of a published layout")
  found = describe(layout, directory, vae)
  return Loaded(found.config, found.read(dtype), found.has_vae, found.tokenizer, found.template)


def save(
  layout: Layout,
  directory: pathlib.Path,
  model: Loaded,
  sidecars: pathlib.Path | None,
  dtype: np.dtype | None,
  shard_bytes: int,
) -> None:
  """Writes a directory of a published layout, a VAE that is apart in `vae/`.

  Args:
    layout: of the result.
    directory: to create.
    model: its parameters that the layout does not have are left out.
    sidecars: directory with the processor's files of the original checkpoint; missing ones are written from the
      configuration.
    dtype: of the tensors; None keeps each parameter's own.
    shard_bytes: largest file.
  """
  config, params = model.config, dict(model.params)
  directory.mkdir(parents=True)
  kind = np.dtype(dtype or params["language_model/embed"].dtype)
  files = {"config.json": layout.write_config(config, kind.name, model.tokenizer)} | layout.files(
    config, model.tokenizer
  )
  if model.tokenizer is not None:
    model.tokenizer.save(str(directory))
  for name in dict.fromkeys((*SIDECARS, *files)):
    kept = sidecars / name if sidecars else None
    if kept and kept.is_file() and (name != "config.json" or _same_model(layout, kept, config, kind.name)):
      shutil.copyfile(kept, directory / name)
    elif name in files:
      (directory / name).write_text(json.dumps(files[name], indent=2) + "\n", encoding="utf-8")
  zeros = layout.unwritten(config)
  params |= {entry.path: np.zeros(entry.shape, kind) for entry in zeros}
  entries = [*layout.entries(config, False), *zeros]
  transfer.save(entries, params, directory, "model", layout.title, dtype, shard_bytes)
  vae = {path: x for path, x in params.items() if path.startswith("vae/")}
  if layout.vae_apart and vae and isinstance(config.autoencoder, AutoencoderKLConfig):
    (directory / "vae").mkdir()
    text = json.dumps(diffusers_vae.write_config(config.autoencoder, config.image_size), indent=2) + "\n"
    (directory / "vae" / "config.json").write_text(text, encoding="utf-8")
    entries = names.autoencoder_kl(config.autoencoder)
    transfer.save(entries, vae, directory / "vae", "diffusion_pytorch_model", "VAE", dtype, shard_bytes)


def left_out(layout: Layout, model: Loaded) -> list[str]:
  """The first part of the paths of parameters that the layout has no place for."""
  kept = {entry.path for entry in layout.entries(model.config, False)}
  whole = {path.split("/")[0] for path in kept}
  parts = [path.split("/") for path in model.params if path not in kept and not path.startswith("vae/")]
  return sorted({"/".join(part[: 2 if part[0] in whole else 1]) for part in parts})


def _same_model(layout: Layout, path: pathlib.Path, config: ModelConfig, dtype: str) -> bool:
  """Whether the original config.json still describes the weights."""
  values = read_object(path)
  root = Fields(values, str(path))
  if values.get("torch_dtype", dtype) != dtype or values.get("dtype", dtype) != dtype or layout.is_tied(root):
    return False
  theirs = layout.read_config(values, str(path), config.autoencoder)
  parts = ("language_model", "understanding_encoder", "generation", "autoencoder", "reader")
  return all(getattr(theirs, part) == getattr(config, part) for part in parts)
