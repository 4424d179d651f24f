"""Checks of config.json's sizes against the headers of the weights, before anything is built from it.

The table of names (`names`) compares every shape later. It is as large as the claimed numbers of layers, so these are
checked first, and an error can name the wrong field and not the first tensor affected by it.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jflow.errors import UserError
from jflow.generation.flow.config import FlowConfig
from jflow.interop.fields import Fields
from jflow.interop.safetensors_io import Tensor
from jflow.models.autoencoders.kl import AutoencoderKLConfig
from jflow.models.config import SiglipConfig
from jflow.models.llm.config import LanguageModelConfig


class Found(NamedTuple):
  """A size derived from the weights, and its evidence."""

  size: int
  how: str


def check(f: Fields, claimed: Mapping[str, int], found: Mapping[str, Found | None], where: Any) -> None:
  """Compares claimed sizes with those of the weights; sizes that the weights do not determine (None) pass.

  Args:
    f: the configuration, for its file name and for fields left to a default.
    claimed: field -> size, as read.
    found: field -> size of the weights.
    where: file or directory of the weights, for messages.

  Raises:
    UserError: a size differs; the field and both sizes are named.
  """
  for name, value in claimed.items():
    has = found.get(name)
    if has is None or has.size == value:
      continue
    if f.values.get(name) is None:
      raise UserError(f"{f.where} has no field {name}, which then is {value}; in {where} {has.how}")
    raise UserError(f"{f.where}: {name}={value} does not fit the weights: in {where} {has.how}")


def count(names: Collection[str], prefix: str) -> int:
  """The number of distinct integers after a prefix: the layers of a stack."""
  return len({found[1] for name in names if (found := re.match(re.escape(prefix) + r"(\d{1,9})\.", name))})


def count_of(names: Collection[str], prefix: str) -> Found:
  """The evidence of `count`."""
  size = count(names, prefix)
  return Found(size, f"there are {size} of {prefix}*")


def axis(tensors: Mapping[str, Tensor], name: str, number: int) -> Found | None:
  """The size of an axis of a tensor; None where the file has no such tensor."""
  shape = tensors[name].shape if name in tensors else ()
  return Found(shape[number], f"tensor {name} has the shape {list(shape)}") if number < len(shape) else None


def check_llama(f: Fields, c: LanguageModelConfig, tensors: Mapping[str, Tensor], prefix: str, where: Any) -> None:
  """Checks a Llama of transformers, whose tensor names begin with `prefix`."""
  embed, layer = f"{prefix}embed_tokens.weight", f"{prefix}layers.0"
  claimed = {
    "num_hidden_layers": c.num_layers,
    "vocab_size": c.vocab_size,
    "hidden_size": c.embed_dim,
    "intermediate_size": c.mlp_dim,
  }
  found = {
    "num_hidden_layers": count_of(tensors, f"{prefix}layers."),
    "vocab_size": axis(tensors, embed, 0),
    "hidden_size": axis(tensors, embed, 1),
    "intermediate_size": axis(tensors, f"{layer}.mlp.gate_proj.weight", 0),
  }
  check(f, claimed, found, where)
  for field, rows, heads in (("num_attention_heads", "q", c.num_heads), ("num_key_value_heads", "k", c.num_kv_heads)):
    has = axis(tensors, f"{layer}.self_attn.{rows}_proj.weight", 0)
    if has is not None and has.size != heads * c.head_dim:
      raise UserError(
        f"{f.where}: {field}={heads} of head_dim={c.head_dim} do not fit the weights: in {where} {has.how}"
      )


def check_siglip(
  f: Fields,
  c: SiglipConfig,
  tensors: Mapping[str, Tensor],
  fields: tuple[str, str],
  names: tuple[str, str, str],
  where: Any,
) -> None:
  """Checks a vision tower of the release or of transformers.

  Args:
    f: the configuration.
    c: as read.
    tensors: of the weights.
    fields: the configuration's names of the number of layers and of the width.
    names: prefix of the layers' tensors; name of the patch embedding; name of the position table [.., P, D].
    where: file or directory of the weights, for messages.
  """
  layers, patch, positions = names
  side, shape = axis(tensors, patch, 3), tensors[positions].shape if positions in tensors else ()
  image = None
  if side is not None and len(shape) > 1:
    along = math.isqrt(shape[-2])  # whole patches of an image
    size = c.image_size if c.image_size // side.size == along else side.size * along
    image = Found(size, f"tensor {positions} has the shape {list(shape)}")
  claimed = {fields[0]: c.num_layers, fields[1]: c.embed_dim, "patch_size": c.patch_size, "image_size": c.image_size}
  found = {
    fields[0]: count_of(tensors, layers),
    fields[1]: axis(tensors, patch, 0),
    "patch_size": side,
    "image_size": image,
  }
  check(f, claimed, found, where)


def check_generation(
  encoder: Fields, decoder: Fields, c: FlowConfig, tensors: Mapping[str, Tensor], where: Any
) -> None:
  """Checks the ConvNeXt blocks of g_enc and g_dec."""
  for f, blocks, part in ((encoder, c.encoder_blocks, "enc"), (decoder, c.decoder_blocks, "dec")):
    found = count_of(tensors, f"vision_gen_{part}_model.mid_block.res_blocks.")
    check(f, {"layers_in_middle": blocks}, {"layers_in_middle": found}, where)


def check_autoencoder(f: Fields, c: AutoencoderKLConfig, tensors: Mapping[str, Tensor], where: Any) -> None:
  """Checks a diffusers AutoencoderKL."""
  levels = count(tensors, "encoder.down_blocks.")
  if levels != len(c.block_channels):
    raise UserError(
      f"{f.where}: block_out_channels has {len(c.block_channels)} levels, the weights in {where} have {levels}"
    )
  found = {
    "layers_per_block": count_of(tensors, "encoder.down_blocks.0.resnets."),
    "latent_channels": axis(tensors, "post_quant_conv.weight", 0),
  }
  check(f, {"layers_per_block": c.layers_per_block, "latent_channels": c.latent_channels}, found, where)
