"""The published directory layout of JanusFlow: reading and writing.

An official directory holds config.json, the weights, and the tokenizer's and processor's files. The VAE is published
separately (sdxl-vae), and may be in `vae/` inside the directory or anywhere else.
"""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jflow import registry
from jflow.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from jflow.generation.base import family
from jflow.generation.flow import weights as flow_weights
from jflow.interop import budget, processor_config, sizes, tied, transfer
from jflow.interop.fields import Fields
from jflow.interop.official_config import (
  autoencoder_config,
  config_from_official,
  config_to_official,
  is_tied,
  vae_to_diffusers,
)
from jflow.interop.safetensors_io import Checkpoint
from jflow.models import weights as names
from jflow.models.autoencoders.kl import AutoencoderKLConfig
from jflow.models.config import ModelConfig
from jflow.strict_json import read_object

# Files of the processor, copied unread with an official checkpoint so that an export can include them.
SIDECARS = (
  "config.json",
  "preprocessor_config.json",
  "processor_config.json",
  "special_tokens_map.json",
  "generation_config.json",
)


class Loaded(NamedTuple):
  """A model read from disk."""

  config: ModelConfig
  params: dict[str, np.ndarray]  # path, keys joined by "/", -> array; without "vae/..." where there is no VAE
  has_vae: bool
  tokenizer: Tokenizer | None


def is_official(directory: pathlib.Path) -> bool:
  """Whether config.json is one of the published layout."""
  path = directory / "config.json"
  return path.exists() and "language_config" in read_object(path)


def _buffer(name: str) -> bool:
  """Whether a tensor of an old file is a buffer, which is computed here."""
  return name.endswith((".rotary_emb.inv_freq", ".position_ids"))


def describe_vae(directory: pathlib.Path) -> tuple[AutoencoderKLConfig, transfer.Weights]:
  """Reads the configuration and the headers of a diffusers AutoencoderKL.

  Raises:
    UserError: see `transfer.check` and `autoencoder_config`.
  """
  f = Fields(read_object(directory / "config.json"), str(directory / "config.json"))
  config = autoencoder_config(f)
  checkpoint = Checkpoint(directory, ("diffusion_pytorch_model", "model"))
  sizes.check_autoencoder(f, config, checkpoint.tensors, directory)
  old = "encoder.mid_block.attentions.0.query.weight" in checkpoint.tensors
  return config, transfer.Weights.describe(names.autoencoder_kl(config, old), checkpoint, "VAE")


def load_tokenizer(directory: pathlib.Path, vocabulary_size: int) -> Tokenizer | None:
  """The tokenizer of a directory; None where there is none.

  Raises:
    UserError: it is unreadable, lacks a special token, or has more ids than the model.
  """
  if not (directory / "tokenizer.json").is_file():
    return None
  tokenizer = Tokenizer.load(str(directory))
  tokenizer.check_fits(vocabulary_size)
  return tokenizer


class Described(NamedTuple):
  """A model whose files are consistent, as far as can be checked before its weights are read."""

  config: ModelConfig
  has_vae: bool
  tokenizer: Tokenizer | None
  parts: tuple[transfer.Weights, ...]

  def read(self, dtype: np.dtype | None = None) -> dict[str, np.ndarray]:
    """Reads the weights; see `load`."""
    budget.check(sum(part.bytes(dtype) for part in self.parts), self.parts[0].checkpoint.directory)
    return {path: x for part in self.parts for path, x in part.read(dtype).items()}


def _vae_inside(directory: pathlib.Path) -> pathlib.Path | None:
  return directory / "vae" if (directory / "vae" / "config.json").exists() else None


def read_config(directory: pathlib.Path, vae: pathlib.Path | None = None) -> ModelConfig:
  """The model's configuration, from config.json and that of the VAE; see `describe`."""
  path, vae = directory / "config.json", vae or _vae_inside(directory)
  autoencoder = None
  if vae is not None:
    autoencoder = autoencoder_config(Fields(read_object(vae / "config.json"), str(vae / "config.json")))
  return config_from_official(read_object(path), str(path), autoencoder)


def describe(directory: pathlib.Path, vae: pathlib.Path | None = None) -> Described:
  """Reads a directory of the published layout, but only the headers of its weights.

  Args:
    directory: see `load`.
    vae: see `load`.

  Raises:
    UserError: anything missing, damaged, contradictory, or of another model.
  """
  path = directory / "config.json"
  root = Fields(read_object(path), str(path))
  vae = vae or _vae_inside(directory)
  config = read_config(directory, vae)
  checks = {
    "preprocessor_config.json": processor_config.check_images,
    "processor_config.json": processor_config.check_chat,
  }
  for name, check in checks.items():
    if (directory / name).exists():
      check(Fields(read_object(directory / name), str(directory / name)), config)
  tokenizer = load_tokenizer(directory, config.language_model.vocab_size)
  checkpoint = Checkpoint(directory, ("model",))
  _check_sizes(root, config, checkpoint)
  prefix = "language_model."
  from_embedding = tied.check(root.sub("language_config"), is_tied(root), checkpoint, prefix)
  weights = transfer.Weights.describe(flow_weights.official(config, from_embedding), checkpoint, "JanusFlow", _buffer)
  return Described(config, vae is not None, tokenizer, (weights,) if vae is None else (weights, describe_vae(vae)[1]))


def _check_sizes(root: Fields, config: ModelConfig, checkpoint: Checkpoint) -> None:
  """Checks the sizes in config.json against the weights; errors name its fields."""
  tensors, where = checkpoint.tensors, checkpoint.directory
  sizes.check_llama(root.sub("language_config"), config.language_model, tensors, "language_model.", where)
  und, enc, dec = (root.sub(f"vision_{part}_config").sub("params") for part in ("und_enc", "gen_enc", "gen_dec"))
  tower = "vision_und_enc_model.vision_tower"
  where_of = (f"{tower}.blocks.", f"{tower}.patch_embed.proj.weight", f"{tower}.pos_embed")
  sizes.check_siglip(und, config.understanding_encoder, tensors, ("layers", "width"), where_of, where)
  sizes.check_generation(enc, dec, config.generation, tensors, where)


def load(directory: pathlib.Path, vae: pathlib.Path | None = None, dtype: np.dtype | None = None) -> Loaded:
  """Reads a directory of the published layout.

  Args:
    directory: config.json, weights, and the tokenizer's files if any.
    vae: directory of a diffusers AutoencoderKL; None: `vae/` inside, if it is there.
    dtype: of the parameters; None keeps the file's.

  Raises:
    UserError: anything missing, damaged, or of another model.
  """
  found = describe(directory, vae)
  return Loaded(found.config, found.read(dtype), found.has_vae, found.tokenizer)


def save(
  directory: pathlib.Path,
  config: ModelConfig,
  params: Mapping[str, np.ndarray],
  tokenizer: Tokenizer | None,
  sidecars: pathlib.Path | None,
  dtype: np.dtype | None,
  shard_bytes: int,
) -> None:
  """Writes a directory of the published layout, its VAE in `vae/`, which must not exist yet.

  Args:
    params: flat, see `Loaded`; REPA's head is left out.
    sidecars: directory with the processor's files of the original checkpoint; missing ones are written from the
      configuration.
    dtype: of the tensors; None keeps each parameter's own.
    shard_bytes: largest file.
  """
  directory.mkdir(parents=True)
  torch_dtype = np.dtype(dtype or params["language_model/embed"].dtype).name
  ours = config_to_official(config, torch_dtype)
  files = {
    "config.json": ours,
    "preprocessor_config.json": _preprocessor(config),
    "processor_config.json": _processor(config),
  }
  for name in SIDECARS:
    kept = sidecars / name if sidecars else None
    if kept and kept.is_file() and (name != "config.json" or _same_model(kept, config, torch_dtype)):
      shutil.copyfile(kept, directory / name)
    elif name in files:
      (directory / name).write_text(json.dumps(files[name], indent=2) + "\n", encoding="utf-8")
  if tokenizer is not None:
    tokenizer.save(str(directory))
  entries = registry.load(family(config.generation).weights)(config)
  transfer.save(entries, params, directory, "model", "JanusFlow", dtype, shard_bytes)
  vae = {path: x for path, x in params.items() if path.startswith("vae/")}
  if vae and isinstance(config.autoencoder, AutoencoderKLConfig):
    (directory / "vae").mkdir()
    text = json.dumps(vae_to_diffusers(config.autoencoder, config.image_size), indent=2) + "\n"
    (directory / "vae" / "config.json").write_text(text, encoding="utf-8")
    entries = names.autoencoder_kl(config.autoencoder)
    transfer.save(entries, vae, directory / "vae", "diffusion_pytorch_model", "VAE", dtype, shard_bytes)


def _same_model(path: pathlib.Path, config: ModelConfig, torch_dtype: str) -> bool:
  """Whether the original config.json still describes the weights."""
  values = read_object(path)
  root = Fields(values, str(path))
  if values.get("torch_dtype", torch_dtype) != torch_dtype or is_tied(root):
    return False
  theirs = config_from_official(values, str(path), config.autoencoder)
  parts = ("language_model", "understanding_encoder", "generation")
  return all(getattr(theirs, part) == getattr(config, part) for part in parts)


def _preprocessor(c: ModelConfig) -> dict[str, Any]:
  return {
    "background_color": [127, 127, 127],
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "VLMImageProcessor",
    "image_size": c.image_size,
    "image_std": [0.5, 0.5, 0.5],
    "min_size": 14,
    "processor_class": "VLChatProcessor",
    "rescale_factor": 1 / 255,
  }


def _processor(c: ModelConfig) -> dict[str, Any]:
  return {
    "add_special_token": False,
    "ignore_id": -100,
    "image_end_tag": SPECIAL_TOKENS["image_end"],
    "image_gen_tag": SPECIAL_TOKENS["generation_start"],
    "image_start_tag": SPECIAL_TOKENS["image_start"],
    "image_tag": SPECIAL_TOKENS["image"],
    "mask_prompt": True,
    "num_image_tokens": c.patches,
    "processor_class": "VLChatProcessor",
    "sft_format": "deepseek",
  }
