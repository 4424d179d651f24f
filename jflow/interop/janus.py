"""The official layout of Janus and Janus-Pro: config.json both ways; its tensors are in generation/codes/weights.py."""

from collections.abc import Mapping
from typing import Any

from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.generation.codes import weights
from jflow.generation.codes.config import CodesConfig
from jflow.interop import release, sizes
from jflow.interop.fields import Fields
from jflow.interop.layouts import Layout
from jflow.interop.safetensors_io import Tensor
from jflow.interop.transformers_config import language_model_config
from jflow.models.autoencoders.kl import MOST_LEVELS
from jflow.models.autoencoders.vq import VQConfig
from jflow.models.config import ModelConfig, ReaderConfig, SiglipConfig
from jflow.models.sizes import most
from jflow.models.weights import SAME, Entry
from jflow.strict_json import shown

# VQ-16 as the release builds it, whatever config.json says.
_VQ = dict(ch=128, ch_mult=[1, 1, 2, 2, 4], num_res_blocks=2, z_channels=256)
_NORM_GROUPS = 32
_USED = "gen_vision_model.quantize.codebook_used"  # a usage statistic, which a strict load of the release asks for
_USED_LENGTH = 65_536


def config_from_official(values: Mapping[str, Any], where: str, autoencoder: None = None) -> ModelConfig:
  """Reads a config.json of the official layout.

  The LLM's section holds only what differs from LlamaConfig's defaults. Beyond the release's fields, SigLIP's sizes and
  the tokenizer's `ch`, `ch_mult`, `num_res_blocks` and `z_channels` may be given.

  Args:
    values: its contents.
    where: name of the file, for messages.
    autoencoder: not used; the VQ is inside.

  Raises:
    UserError: a field is missing, mistyped, or asks for something that jflow does not compute.
  """
  root = Fields(values, where)
  release.check_header(root)
  language = root.sub("language_config")
  lm = language_model_config(language)
  vision = release.siglip_config(release.params(root, "vision", "CLIPVisionTower"))
  vq = release.params(root, "gen_vision", "VQ-16")
  fields = ("image_token_size", "n_embed", "ch", "ch_mult", "num_res_blocks", "z_channels")
  codec = vq_config(vq, fields, _VQ.get, vision)
  vq.close()
  reading = _projector(root, "aligner", vision.embed_dim, lm.embed_dim, language)
  writing = _projector(root, "gen_aligner", codec.code_dim, lm.embed_dim, language)
  head = release.params(root, "gen_head", "vision_head")
  hidden = head.get("image_token_embed", int)
  head.only("image_token_size", codec.codebook_size)
  need_width(language, head, "n_embed", lm.embed_dim)
  head.close()
  release.is_tied(root)
  root.close()
  return ModelConfig(
    language_model=lm,
    understanding_encoder=vision,
    generation=CodesConfig(kind="codes", hidden_dim=hidden, projector_layers=writing),
    autoencoder=codec,
    objectives=(),
    reader=ReaderConfig(kind="siglip", start="token", layers=reading),
  )


def vq_config(f: Fields, names: tuple[str, ...], default: Any, vision: SiglipConfig) -> VQConfig:
  """Reads the sizes of a VQ tokenizer, which must give a picture as many codes as SigLIP has patches.

  Args:
    f: the section.
    names: of the fields: rows of the codebook, numbers of a row, channels, multipliers, blocks per level, channels
      between the convolutions.
    default: field -> its value where it is absent; None: it must be there.
    vision: SigLIP's sizes.
  """
  rows, dim, channels, multipliers, blocks, between = names
  levels = f.get(multipliers, list, default(multipliers))
  width = f.get(channels, int, default(channels))
  if width % _NORM_GROUPS:
    raise UserError(f"{f.where}: {channels}={width} must be a multiple of {_NORM_GROUPS}")
  if not 0 < len(levels) <= MOST_LEVELS or not all(type(m) is int and 0 < m <= most("multipliers") for m in levels):
    raise UserError(f"{f.where}: {multipliers}={shown(levels)} must hold 1 to {MOST_LEVELS} positive integers")
  side = vision.image_size // 2 ** (len(levels) - 1)
  if side**2 != vision.patches:
    raise UserError(
      f"{f.where}: {multipliers}={shown(levels)} gives a picture {side**2} codes, and SigLIP has {vision.patches} patches"
    )
  return VQConfig(
    kind="vq",
    codebook_size=f.get(rows, int, default(rows)),
    code_dim=f.get(dim, int, default(dim), "code_dim"),
    channels=width,
    multipliers=tuple(levels),
    blocks_per_level=f.get(blocks, int, default(blocks), "blocks_per_level"),
    latent_channels=f.get(between, int, default(between), "latent_channels"),
    norm_groups=_NORM_GROUPS,
  )


def need_width(language: Fields, f: Fields, name: str, width: int) -> None:
  """Checks that a field holds the LLM's width; the message says where that is a default."""
  if language.values.get("hidden_size") is None and f.values.get(name) not in (None, width):
    raise UserError(
      f"{language.where} has no field hidden_size, which then is {width}; {f.where}: {name}={shown(f.values[name])}"
    )
  f.only(name, width)


def _projector(root: Fields, part: str, into: int, out: int, language: Fields) -> int:
  """The depth of a projector; the other kinds of the release's MlpProjector are refused by name."""
  f = release.params(root, part, "MlpProjector")
  f.only("projector_type", "mlp_gelu")
  f.only("input_dim", into)
  need_width(language, f, "n_embed", out)
  depth = f.get("depth", int, 1, "projector_layers")
  f.close()
  return depth


def config_to_official(c: ModelConfig, dtype: str, tokenizer: Any = None) -> dict[str, Any]:
  """The config.json of a model; `dtype` is the name of the weights' type.

  Raises:
    UserError: the layout cannot hold it.
  """
  check_parts(c, "official")
  d, codec, gen = c.language_model.embed_dim, c.autoencoder, c.generation
  vq: dict[str, Any] = {"image_token_size": codec.codebook_size, "n_embed": codec.code_dim}
  sizes = dict(
    ch=codec.channels,
    ch_mult=list(codec.multipliers),
    num_res_blocks=codec.blocks_per_level,
    z_channels=codec.latent_channels,
  )
  if sizes != _VQ:
    vq |= sizes
  mlp = lambda depth, into: {"depth": depth, "input_dim": into, "n_embed": d, "projector_type": "mlp_gelu"}
  head = {"image_token_embed": gen.hidden_dim, "image_token_size": codec.codebook_size, "n_embed": d}
  parts = (
    ("vision", "CLIPVisionTower", release.siglip_to_official(c.understanding_encoder)),
    ("aligner", "MlpProjector", mlp(c.reader.layers, c.understanding_encoder.embed_dim)),
    ("gen_vision", "VQ-16", vq),
    ("gen_aligner", "MlpProjector", mlp(gen.projector_layers, codec.code_dim)),
    ("gen_head", "vision_head", head),
  )
  header = release.header(c.language_model, dtype)
  return header | {f"{name}_config": release.section(name, *rest) for name, *rest in parts}


def check_parts(c: ModelConfig, name: str) -> None:
  """Raises UserError where the reader or the tokenizer of a model is none that Janus has."""
  reader, codec = c.reader, c.autoencoder
  if (reader.kind, reader.start) != ("siglip", "token"):
    raise UserError(
      f"model.reader.kind={reader.kind!r} and start={reader.start!r} must be 'siglip' and 'token': the {name} layout "
      "of Janus has no other reader"
    )
  if codec.kind != "vq":
    raise UserError(f"model.autoencoder.kind={codec.kind!r} must be 'vq': the {name} layout of Janus has no other")
  if codec.norm_groups != _NORM_GROUPS:
    raise UserError(
      f"model.autoencoder.norm_groups={codec.norm_groups} must be {_NORM_GROUPS}: the {name} layout has no field for it"
    )


def _check_sizes(root: Fields, config: ModelConfig, tensors: Mapping[str, Tensor], where: Any) -> None:
  language = root.sub("language_config")
  sizes.check_llama(language, config.language_model, tensors, "language_model.model.", where)
  tower = "vision_model.vision_tower"
  release.check_siglip(root, "vision", config.understanding_encoder, tower, tensors, where)
  section = lambda part: root.sub(f"{part}_config").sub("params")
  for part, layers in (("aligner", config.reader.layers), ("gen_aligner", config.generation.projector_layers)):
    found = sizes.count_of(tensors, f"{part}.layers.")
    sizes.check(section(part), {"depth": layers}, {"depth": found}, where)
  blocks = sizes.count_of(tensors, "gen_vision_model.encoder.conv_blocks.0.res.")
  head = sizes.axis(tensors, "gen_head.output_mlp_projector.weight", 0)
  sizes.check(
    section("gen_head"), {"image_token_embed": config.generation.hidden_dim}, {"image_token_embed": head}, where
  )
  check_vq(
    section("gen_vision"),
    config.autoencoder,
    {"num_res_blocks": blocks},
    ("image_token_size", "n_embed", "ch_mult"),
    ("gen_vision_model.quantize.embedding.weight", "gen_vision_model.encoder.conv_blocks."),
    tensors,
    where,
  )


def check_vq(
  f: Fields,
  c: VQConfig,
  blocks: Mapping[str, Any],
  fields: tuple[str, str, str],
  names: tuple[str, str],
  tensors: Mapping[str, Tensor],
  where: Any,
) -> None:
  """Compares a tokenizer's sizes with its weights; see `sizes.check`.

  Args:
    f: the section.
    c: as read.
    blocks: the name of the field of blocks per level -> how many there are.
    fields: names of the fields of rows, numbers of a row, and multipliers.
    names: of the codebook; prefix of the encoder's levels.
    tensors: of the weights.
    where: file or directory of the weights, for messages.
  """
  rows, dim, multipliers = fields
  codebook, levels = names
  found = {rows: sizes.axis(tensors, codebook, 0), dim: sizes.axis(tensors, codebook, 1), **blocks}
  sizes.check(f, {rows: c.codebook_size, dim: c.code_dim, next(iter(blocks)): c.blocks_per_level}, found, where)
  if (count := sizes.count(tensors, levels)) != len(c.multipliers):
    raise UserError(f"{f.where}: {multipliers} has {len(c.multipliers)} levels, the weights in {where} have {count}")


def template(tokenizer: Tokenizer | None) -> str:
  """Janus-Pro's prompts where the tokenizer has its speakers, else Janus's."""
  pro = tokenizer is not None and tokenizer.user is not None and tokenizer.assistant is not None
  return "pro" if pro else "chat"


INSTEAD = (
  "take the same model in transformers' layout (deepseek-community/Janus-Pro-1B, deepseek-community/Janus-Pro-7B), or "
  "the safetensors that a pull request of the official repository offers (deepseek-ai/NAME@refs/pr/NUMBER)"
)

LAYOUT = Layout(
  **release.SHARED,
  family="codes",
  title="Janus",
  recognises=lambda values: "gen_vision_config" in values,
  read_config=config_from_official,
  write_config=config_to_official,
  entries=weights.official,
  check_sizes=_check_sizes,
  ignored=lambda name: name == _USED,
  unwritten=lambda config: [Entry(_USED, (_USED_LENGTH,), "codebook_used", SAME)],
  template=template,
  instead=INSTEAD,
)
