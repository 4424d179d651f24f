"""config.json of the published layout and diffusers' config.json of the VAE, reading and writing."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jflow.errors import UserError
from jflow.generation.base import family
from jflow.generation.flow.config import FlowConfig
from jflow.interop.fields import Fields
from jflow.interop.transformers_config import language_model_config
from jflow.models.autoencoders.absent import AbsentConfig
from jflow.models.autoencoders.base import AutoencoderConfig
from jflow.models.autoencoders.kl import MOST_LEVELS, AutoencoderKLConfig
from jflow.models.config import ModelConfig, SiglipConfig
from jflow.models.llm.config import LanguageModelConfig
from jflow.models.sizes import most
from jflow.strict_json import shown

# Named presets of the release's SigLIP: embed_dim, num_layers, num_heads, patch size, mlp_dim over embed_dim.
_SIGLIP = {
  "siglip_large_patch16_384": (1024, 24, 16, 16, 4.0),
  "siglip_large_patch16_256": (1024, 24, 16, 16, 4.0),
  "siglip_so400m_patch14_384": (1152, 27, 16, 14, 3.7362),
  "siglip_so400m_patch14_224": (1152, 27, 16, 14, 3.7362),
}
# The VAE of the release, assumed where a checkpoint comes without one.
SDXL_VAE = AutoencoderKLConfig("autoencoder_kl", 4, 0.13025, (128, 256, 512, 512), 2, 32)
_BLOCKS = 2  # ConvNeXt blocks of the release in g_enc and in g_dec


def _siglip_config(f: Fields) -> SiglipConfig:
  """Reads the arguments of the release's CLIPVisionTower, with explicit sizes where it has no preset."""
  f.only("select_feature", "same")
  f.only("select_layers")
  f.only("ckpt_path", "")
  for name in ("pixel_mean", "pixel_std"):
    f.only(name)
  name = f.get("model_name", str, "")
  if name not in _SIGLIP and f.values.get("width") is None:
    raise UserError(f"{f.where}: model_name={shown(name)} is unknown and width is missing; known: {', '.join(_SIGLIP)}")
  preset = _SIGLIP.get(name, (None,) * 5)
  if name in _SIGLIP:
    for field, value in zip(("width", "layers", "heads", "patch_size", "mlp_ratio"), preset, strict=True):
      f.only(field, value)
  width = f.get("width", int, preset[0])
  layers = f.get("layers", int, preset[1], "num_layers")
  f.ignore(("select_layer",))
  select = -2 if f.values.get("select_layer") is None else f.values["select_layer"]  # the release's own default
  if type(select) is not int or not -layers <= select <= layers:
    raise UserError(f"{f.where}: select_layer={shown(select)} should be an integer in {-layers}..{layers}")
  ratio = f.get("mlp_ratio", float, preset[4])
  if not 1 <= width * ratio <= most(""):
    raise UserError(
      f"{f.where}: mlp_ratio={ratio:g} should give a width of the MLP in 1..{most('')}, got {width * ratio:g}"
    )
  config = SiglipConfig(
    image_size=f.get("image_size", int, None, "image_size"),
    patch_size=f.get("patch_size", int, preset[3], "patch_size"),
    embed_dim=width,
    mlp_dim=int(width * ratio),
    num_layers=select if select > 0 else layers + select + 1 if select else layers,
    num_heads=f.get("heads", int, preset[2], "num_heads"),
    layer_norm_epsilon=f.get("norm_eps", float, 1e-6),
    gelu=f.get("gelu", str, "erf"),
  )
  f.close()
  return config


def _generation_config(encoder: Fields, decoder: Fields, lm: LanguageModelConfig) -> tuple[FlowConfig, int]:
  """The configuration of g_enc and g_dec, and the number of latent channels."""
  for f in (encoder, decoder):
    f.only("use_bias", True)
    f.only("elementwise_affine", True)
    f.only("use_mid_block", True)
    f.only("hidden_size", lm.embed_dim)
    f.only("dropout", 0)  # jflow trains without
  patch = encoder.get("stride", int, None, "patch_size")
  encoder.only("kernel_size", patch)
  encoder.only("padding", 0)
  width = encoder.get("block_out_channels", list)
  if len(width) != 1 or type(width[0]) is not int or not 2 <= width[0] <= most("") or width[0] % 2:
    raise UserError(f"{encoder.where}: block_out_channels={shown(width)} should hold one even number")
  latents = encoder.get("input_channels", int, None, "latent_channels")
  epsilon = encoder.get("norm_eps", float, 1e-6)
  decoder.only("norm_eps", epsilon)
  decoder.only("in_channels", width[0])
  decoder.only("block_out_channels", width)
  decoder.only("out_channels", latents)
  decoder.only("upsamples", patch.bit_length() - 1)
  config = FlowConfig(
    kind="flow",
    channels=width[0],
    encoder_blocks=encoder.get("layers_in_middle", int, _BLOCKS, "encoder_blocks"),
    decoder_blocks=decoder.get("layers_in_middle", int, _BLOCKS, "decoder_blocks"),
    patch_size=patch,
    norm_epsilon=epsilon,
  )
  encoder.close()
  decoder.close()
  return config, latents


def _absent_autoencoder(siglip: SiglipConfig, patch_size: int, latents: int) -> AutoencoderConfig:
  """A placeholder for a missing VAE, whose factor gives generated images the number of patches of read ones."""
  factor = max(1, siglip.patch_size // patch_size)
  if factor & (factor - 1):  # no power of two: no AutoencoderKL could do it
    return AbsentConfig("absent", latents, 1.0, factor)
  levels = factor.bit_length()
  channels = (SDXL_VAE.block_channels + SDXL_VAE.block_channels[-1:] * levels)[:levels]
  return dataclasses.replace(SDXL_VAE, latent_channels=latents, block_channels=channels)


def autoencoder_config(f: Fields) -> AutoencoderKLConfig:
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


def _params(root: Fields, part: str, cls: str) -> Fields:
  """The arguments of a part's class."""
  f = root.sub(f"{part}_config")
  f.only("cls", cls)
  f.only("model_type", part)
  params = f.sub("params")
  f.close()
  return params


def is_tied(root: Fields) -> bool:
  """Whether the language model's or the model's config ties the head to the embedding.

  Raises:
    UserError: the two contradict each other.
  """
  inner = root.sub("language_config")
  told = [
    (f, f.get("tie_word_embeddings", bool)) for f in (root, inner) if f.values.get("tie_word_embeddings") is not None
  ]
  root.ignore(("tie_word_embeddings",))
  if len({value for _, value in told}) > 1:
    raise UserError(
      " and ".join(f"{f.where}: tie_word_embeddings={value}" for f, value in told) + " contradict each other"
    )
  return bool(told) and told[0][1]


def config_from_official(values: Mapping[str, Any], where: str, autoencoder: AutoencoderConfig | None) -> ModelConfig:
  """Reads a config.json of the published layout.

  Args:
    values: its contents.
    where: name of the file, for messages.
    autoencoder: of the VAE beside it. None: SDXL's, its levels adapted to the model's patches.

  Raises:
    UserError: a field is missing, mistyped, or asks for something that jflow does not compute.
  """
  root = Fields(values, where)
  root.only("model_type", "multi_modality")
  root.only("architectures", ["MultiModalityCausalLM"])
  language = root.sub("language_config")
  lm = language_model_config(language)
  siglip = _siglip_config(_params(root, "vision_und_enc", "CLIPVisionTower"))
  encoder = _params(root, "vision_gen_enc", "ShallowUViTEncoder")
  decoder = _params(root, "vision_gen_dec", "ShallowUViTDecoder")
  for f in (encoder, decoder):
    if language.values.get("hidden_size") is None and f.values.get("hidden_size") not in (None, lm.embed_dim):
      raise UserError(
        f"{language.where} has no field hidden_size, which then is {lm.embed_dim}; {f.where} has "
        f"{shown(f.values['hidden_size'])}"
      )
  generation, latents = _generation_config(encoder, decoder, lm)
  is_tied(root)
  root.close()
  if autoencoder is None:
    autoencoder = _absent_autoencoder(siglip, generation.patch_size, latents)
  if autoencoder.latent_channels != latents:
    raise UserError(f"{where}: the model writes {latents} latent channels, the VAE has {autoencoder.latent_channels}")
  return ModelConfig(
    language_model=lm,
    understanding_encoder=siglip,
    generation=generation,
    autoencoder=autoencoder,
    objectives=(),
    reader="siglip",
  )


def config_to_official(c: ModelConfig, dtype: str) -> dict[str, Any]:
  """The config.json of a model; SigLIP's sizes are written out where the release has no preset for them."""
  if c.reader != "siglip":
    raise UserError(f"model.reader={c.reader!r} must be 'siglip': the published layout has no other reader")
  if not (family(c.generation).weights and c.language_model.kind == "llama"):
    kinds = f"{c.generation.kind!r} and {c.language_model.kind!r}"
    raise UserError(f"model.generation.kind and model.language_model.kind are {kinds}: they have no published layout")
  lm, vision, gen = c.language_model, c.understanding_encoder, c.generation
  siglip: dict[str, Any] = {
    "image_size": vision.image_size,
    "model_name": f"siglip_large_patch16_{vision.image_size}",
    "select_feature": "same",
    "select_layer": -1,
  }
  ratio = vision.mlp_dim / vision.embed_dim
  if int(vision.embed_dim * ratio) < vision.mlp_dim:  # both sides truncate the product
    ratio = math.nextafter(ratio, math.inf)
  sizes = (vision.embed_dim, vision.num_layers, vision.num_heads, vision.patch_size, ratio)
  if _SIGLIP.get(siglip["model_name"]) != sizes:
    siglip |= {"model_name": "siglip_custom"} | dict(
      zip(("width", "layers", "heads", "patch_size", "mlp_ratio"), sizes, strict=True)
    )
  if vision.gelu != "erf":
    siglip["gelu"] = vision.gelu
  if vision.layer_norm_epsilon != 1e-6:
    siglip["norm_eps"] = vision.layer_norm_epsilon
  shared = {
    "block_out_channels": [gen.channels],
    "hidden_size": lm.embed_dim,
    "norm_eps": gen.norm_epsilon,
    "elementwise_affine": True,
    "use_bias": True,
    "use_mid_block": True,
    "dropout": 0.0,
  }
  latents = c.autoencoder.latent_channels
  encoder = {
    "input_channels": latents,
    "stride": gen.patch_size,
    "kernel_size": gen.patch_size,
    "padding": 0,
    "layers_in_middle": gen.encoder_blocks,
  }
  decoder = {
    "in_channels": gen.channels,
    "out_channels": latents,
    "upsamples": gen.patch_size.bit_length() - 1,
    "layers_in_middle": gen.decoder_blocks,
  }
  return {
    "architectures": ["MultiModalityCausalLM"],
    "model_type": "multi_modality",
    "torch_dtype": dtype,
    "language_config": {
      "model_type": "llama",
      "torch_dtype": dtype,
      "hidden_size": lm.embed_dim,
      "intermediate_size": lm.mlp_dim,
      "num_hidden_layers": lm.num_layers,
      "num_attention_heads": lm.num_heads,
      "num_key_value_heads": lm.num_kv_heads,
      "head_dim": lm.head_dim,
      "vocab_size": lm.vocab_size,
      "max_position_embeddings": lm.max_length,
      "rms_norm_eps": lm.rms_norm_epsilon,
      "rope_theta": lm.rope_theta,
      "tie_word_embeddings": False,
    },
    "vision_und_enc_config": {"cls": "CLIPVisionTower", "model_type": "vision_und_enc", "params": siglip},
    "vision_gen_enc_config": {
      "cls": "ShallowUViTEncoder",
      "model_type": "vision_gen_enc",
      "params": encoder | shared,
    },
    "vision_gen_dec_config": {
      "cls": "ShallowUViTDecoder",
      "model_type": "vision_gen_dec",
      "params": decoder | shared,
    },
  }


def vae_to_diffusers(c: AutoencoderKLConfig, image_size: int) -> dict[str, Any]:
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
