"""The VAE of JanusFlow, published apart as diffusers' AutoencoderKL: its config.json both ways and its headers."""

import dataclasses
import pathlib
from typing import Any

from jflow.errors import UserError
from jflow.interop import sizes, transfer
from jflow.interop.fields import Fields
from jflow.interop.safetensors_io import Checkpoint
from jflow.models import weights as names
from jflow.models.autoencoders.absent import AbsentConfig
from jflow.models.autoencoders.base import AutoencoderConfig
from jflow.models.autoencoders.kl import MOST_LEVELS, AutoencoderKLConfig
from jflow.models.config import SiglipConfig
from jflow.models.sizes import most
from jflow.strict_json import read_object, shown

# The VAE of the release, assumed where a checkpoint comes without one.
SDXL_VAE = AutoencoderKLConfig("autoencoder_kl", 4, 0.13025, (128, 256, 512, 512), 2, 32)


def describe(directory: pathlib.Path) -> tuple[AutoencoderKLConfig, transfer.Weights]:
  """Reads the configuration and the headers of a diffusers AutoencoderKL.

  Raises:
    UserError: see `transfer.check` and `read_config`.
  """
  f = Fields(read_object(directory / "config.json"), str(directory / "config.json"))
  config = read_config(f)
  checkpoint = Checkpoint(directory, ("diffusion_pytorch_model", "model"))
  sizes.check_autoencoder(f, config, checkpoint.tensors, directory)
  old = "encoder.mid_block.attentions.0.query.weight" in checkpoint.tensors
  return config, transfer.Weights.describe(names.autoencoder_kl(config, old), checkpoint, "VAE")


def read_config(f: Fields) -> AutoencoderKLConfig:
  """Reads the configuration of a diffusers AutoencoderKL.

  Raises:
    UserError: the variant differs from SDXL's.
  """
  f.only("_class_name", "AutoencoderKL")
  f.only("act_fn", "silu")
  for name in ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
    f.only(name, True)
  f.only("shift_factor", 0)
  f.only("in_channels", 3)
  f.only("out_channels", 3)
  f.ignore(("sample_size", "force_upcast"))  # of diffusers' pipelines: a size to suggest, a type to compute in
  channels = f.get("block_out_channels", list)
  groups = f.get("norm_num_groups", int, 32)
  if not 0 < len(channels) <= MOST_LEVELS or not all(
    type(c) is int and 0 < c <= most("") and c % groups == 0 for c in channels
  ):
    raise UserError(
      f"{f.where}: block_out_channels={shown(channels)} should hold multiples of norm_num_groups={groups}"
    )
  for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
    kinds = f.get(name, list, [block] * len(channels))
    if any(kind != block for kind in kinds):
      raise UserError(f"{f.where}: {name}={shown(kinds)} is not supported: {name} may hold {block} alone")
    if len(kinds) != len(channels):
      raise UserError(f"{f.where}: {name} names {len(kinds)} blocks, block_out_channels {len(channels)}")
  latents = f.get("latent_channels", int, None, "latent_channels")
  f.only("latents_mean", [0] * latents)
  f.only("latents_std", [1] * latents)
  config = AutoencoderKLConfig(
    kind="autoencoder_kl",
    latent_channels=latents,
    scaling=f.get("scaling_factor", float),
    block_channels=tuple(channels),
    layers_per_block=f.get("layers_per_block", int, None, "layers_per_block"),
    norm_groups=groups,
  )
  f.close()
  return config


def absent(siglip: SiglipConfig, patch_size: int, latents: int) -> AutoencoderConfig:
  """A placeholder for a missing VAE, whose factor gives generated images the number of patches of read ones."""
  factor = max(1, siglip.patch_size // patch_size)
  if factor & (factor - 1):  # no power of two: no AutoencoderKL could do it
    return AbsentConfig("absent", latents, 1.0, factor)
  levels = factor.bit_length()
  channels = (SDXL_VAE.block_channels + SDXL_VAE.block_channels[-1:] * levels)[:levels]
  return dataclasses.replace(SDXL_VAE, latent_channels=latents, block_channels=channels)


def write_config(c: AutoencoderKLConfig, image_size: int) -> dict[str, Any]:
  """The config.json of diffusers' AutoencoderKL."""
  levels = len(c.block_channels)
  return {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": list(c.block_channels),
    "down_block_types": ["DownEncoderBlock2D"] * levels,
    "up_block_types": ["UpDecoderBlock2D"] * levels,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": c.latent_channels,
    "layers_per_block": c.layers_per_block,
    "norm_num_groups": c.norm_groups,
    "sample_size": image_size,
    "scaling_factor": c.scaling,
  }
