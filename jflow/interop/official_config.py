"""config.json of the published layout, of transformers' Llama and diffusers' AutoencoderKL: both ways."""

import math
from collections.abc import Mapping
from typing import Any

from jflow.errors import UserError
from jflow.models.config import (
  AutoencoderConfig,
  GenerationConfig,
  JanusFlowConfig,
  LanguageModelConfig,
  SiglipConfig,
)

# Named presets of the release's SigLIP: width, layers, heads, patch size, mlp width over width.
_SIGLIP = {
  "siglip_large_patch16_384": (1024, 24, 16, 16, 4.0),
  "siglip_large_patch16_256": (1024, 24, 16, 16, 4.0),
  "siglip_so400m_patch14_384": (1152, 27, 16, 14, 3.7362),
  "siglip_so400m_patch14_224": (1152, 27, 16, 14, 3.7362),
}
# The VAE of the release, assumed where none lies beside a checkpoint.
SDXL_VAE = AutoencoderConfig("autoencoder_kl", 4, 0.13025, (128, 256, 512, 512), 2, 32, 0, 0)
_ALIGNMENT_LAYER = 6  # paper section 4.1; the release has no head for it
_BLOCKS = 2  # ConvNeXt blocks of the release in g_enc and in g_dec


def refuse_code(values: Mapping[str, Any], where: str) -> None:
  """Refuses a config.json that names Python code to run."""
  if "auto_map" in values or values.get("trust_remote_code"):
    raise UserError(
      f"{where} asks to run Python code that came with the weights (auto_map, trust_remote_code), which "
      "jflow never does: remove the field if the weights are those of a plain model"
    )


class Fields:
  """Reads fields of a config.json, naming file and field where one is missing or has another type."""

  def __init__(self, values: Any, where: str):
    if not isinstance(values, Mapping):
      raise UserError(f"{where} should be a JSON object")
    self.values, self.where = values, where

  def get(self, name: str, kind: type, default: Any = None) -> Any:
    """The field; absent or null gives `default`, and without a default is an error."""
    value = self.values.get(name)
    if value is None:
      if default is None:
        raise UserError(f"{self.where} has no field {name}")
      return default
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is not kind or (kind in (int, float) and value <= 0):
      raise UserError(
        f"{self.where}: {name}={value!r} should be a positive {kind.__name__}"
        if kind in (int, float)
        else f"{self.where}: {name}={value!r} should be a {kind.__name__}"
      )
    return value

  def only(self, name: str, *allowed: Any) -> None:
    """Refuses a value that this code does not compute; absent or null is fine."""
    value = self.values.get(name)
    if value is not None and value not in allowed:
      raise UserError(f"{self.where}: {name}={value!r} is not supported, only {allowed[0]!r}")

  def sub(self, name: str) -> "Fields":
    """The object in a field."""
    if name not in self.values:
      raise UserError(f"{self.where} has no field {name}")
    return Fields(self.values[name], f"{self.where}: {name}")


def language_model_config(f: Fields) -> LanguageModelConfig:
  """Reads a LlamaConfig of transformers; fields that it may leave out take its defaults."""
  f.only("model_type", "llama")
  f.only("hidden_act", "silu")
  f.only("attention_bias", False)
  f.only("mlp_bias", False)
  f.only("pretraining_tp", 1)
  rope = f.values.get("rope_parameters") or f.values.get("rope_scaling") or {}
  rope = Fields(rope, f"{f.where}: rope_parameters")
  rope.only("rope_type", "default")
  rope.only("type", "default")
  width, heads = f.get("hidden_size", int), f.get("num_attention_heads", int)
  return LanguageModelConfig(
    vocabulary_size=f.get("vocab_size", int),
    width=width,
    mlp_width=f.get("intermediate_size", int),
    layers=f.get("num_hidden_layers", int),
    heads=heads,
    kv_heads=f.get("num_key_value_heads", int, heads),
    head_width=f.get("head_dim", int, width // heads),
    rms_norm_epsilon=f.get("rms_norm_eps", float, 1e-6),
    rope_theta=f.get("rope_theta", float, rope.get("rope_theta", float, 10_000.0)),
    context=f.get("max_position_embeddings", int, 2048),
  )


def _siglip_config(f: Fields) -> SiglipConfig:
  f.only("select_feature", "same")
  name = f.get("model_name", str, "")
  if name not in _SIGLIP and "width" not in f.values:
    raise UserError(
      f"{f.where}: model_name={name!r} is unknown and width is missing; known: {', '.join(_SIGLIP)}"
    )
  preset = _SIGLIP.get(name, (None,) * 5)
  width = f.get("width", int, preset[0])
  layers = f.get("layers", int, preset[1])
  select = f.values.get("select_layer", -1)
  if type(select) is not int or not -layers <= select <= layers:
    raise UserError(f"{f.where}: select_layer={select!r} should be an integer in {-layers}..{layers}")
  return SiglipConfig(
    image_size=f.get("image_size", int),
    patch_size=f.get("patch_size", int, preset[3]),
    width=width,
    mlp_width=int(width * f.get("mlp_ratio", float, preset[4])),
    layers=select if select > 0 else layers + select + 1 if select else layers,
    heads=f.get("heads", int, preset[2]),
    layer_norm_epsilon=f.get("norm_eps", float, 1e-6),
    gelu=f.get("gelu", str, "erf"),
  )


def _generation_config(
  encoder: Fields, decoder: Fields, lm: LanguageModelConfig
) -> tuple[GenerationConfig, int]:
  """Returns the ConvNeXt heads' configuration and the number of latent channels.

  Fields that only repeat a tensor's shape (such as the decoder's channels) are left to the comparison of all
  shapes, which is stricter.
  """
  for f in (encoder, decoder):
    f.only("use_bias", True)
    f.only("elementwise_affine", True)
    f.only("use_mid_block", True)
    f.only("hidden_size", lm.width)
  patch = encoder.get("stride", int)
  encoder.only("kernel_size", patch)
  encoder.only("padding", 0)
  width = encoder.get("block_out_channels", list)
  if len(width) != 1 or type(width[0]) is not int or width[0] < 2 or width[0] % 2:
    raise UserError(f"{encoder.where}: block_out_channels={width!r} should hold one even number")
  epsilon = encoder.get("norm_eps", float, 1e-6)
  decoder.only("norm_eps", epsilon)
  config = GenerationConfig(
    width=width[0],
    encoder_blocks=encoder.get("layers_in_middle", int, _BLOCKS),
    decoder_blocks=decoder.get("layers_in_middle", int, _BLOCKS),
    patch_size=patch,
    norm_epsilon=epsilon,
  )
  return config, encoder.get("input_channels", int)


def _absent_autoencoder(siglip: SiglipConfig, patch_size: int, latents: int) -> AutoencoderConfig:
  """Stands for a VAE that is not there: the factor makes a written image have the patches of a read one."""
  factor = max(1, siglip.patch_size // patch_size)
  if factor & (factor - 1):  # no power of two: no AutoencoderKL could do it
    return AutoencoderConfig("patch_pca", latents, 1.0, (), 0, 0, patch_size=factor, window=factor)
  levels = factor.bit_length()
  channels = (SDXL_VAE.block_channels + SDXL_VAE.block_channels[-1:] * levels)[:levels]
  return AutoencoderConfig(**SDXL_VAE.__dict__ | {"latent_channels": latents, "block_channels": channels})


def autoencoder_config(f: Fields) -> AutoencoderConfig:
  """Reads the configuration of a diffusers AutoencoderKL.

  Raises:
    UserError: a variant that is not SDXL's.
  """
  f.only("_class_name", "AutoencoderKL")
  f.only("act_fn", "silu")
  for name in ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
    f.only(name, True)
  f.only("shift_factor", 0, 0.0)
  f.only("in_channels", 3)
  f.only("out_channels", 3)
  for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
    if set(f.get(name, list, [block])) != {block}:
      raise UserError(f"{f.where}: {name} may hold {block} alone")
  channels = f.get("block_out_channels", list)
  groups = f.get("norm_num_groups", int, 32)
  if not channels or not all(type(c) is int and c > 0 and c % groups == 0 for c in channels):
    raise UserError(
      f"{f.where}: block_out_channels={channels!r} should hold multiples of norm_num_groups={groups}"
    )
  return AutoencoderConfig(
    kind="autoencoder_kl",
    latent_channels=f.get("latent_channels", int),
    scaling=f.get("scaling_factor", float),
    block_channels=tuple(channels),
    layers_per_block=f.get("layers_per_block", int),
    norm_groups=groups,
    patch_size=0,
    window=0,
  )


def config_from_official(
  values: Mapping[str, Any], where: str, autoencoder: AutoencoderConfig | None
) -> JanusFlowConfig:
  """Reads a config.json of the published layout.

  Args:
    values: its contents.
    where: name of the file, for messages.
    autoencoder: of the VAE beside it. None: SDXL's, its levels adapted to the model's patches.

  Raises:
    UserError: a field that is missing, mistyped, or asks for what jflow does not compute.
  """
  refuse_code(values, where)
  root = Fields(values, where)
  lm = language_model_config(root.sub("language_config"))
  siglip = _siglip_config(root.sub("vision_und_enc_config").sub("params"))
  encoder, decoder = (root.sub(f"vision_gen_{x}_config").sub("params") for x in ("enc", "dec"))
  generation, latents = _generation_config(encoder, decoder, lm)
  if autoencoder is None:
    autoencoder = _absent_autoencoder(siglip, generation.patch_size, latents)
  if autoencoder.latent_channels != latents:
    raise UserError(
      f"{where}: the model writes {latents} latent channels, the VAE has {autoencoder.latent_channels}"
    )
  return JanusFlowConfig(
    language_model=lm,
    understanding_encoder=siglip,
    generation=generation,
    autoencoder=autoencoder,
    alignment_layer=min(_ALIGNMENT_LAYER, lm.layers),
    alignment_width=0,
  )


def config_to_official(c: JanusFlowConfig, dtype: str) -> dict[str, Any]:
  """The config.json of a model; SigLIP's sizes are written out where they are no preset of the release."""
  if c.reader != "siglip":
    raise UserError(
      f"model.reader={c.reader!r}: the published layout has no place for a reader other than SigLIP"
    )
  lm, vision, gen = c.language_model, c.understanding_encoder, c.generation
  siglip: dict[str, Any] = {
    "image_size": vision.image_size,
    "model_name": f"siglip_large_patch16_{vision.image_size}",
    "select_feature": "same",
    "select_layer": -1,
  }
  ratio = vision.mlp_width / vision.width
  if int(vision.width * ratio) < vision.mlp_width:  # both sides truncate the product
    ratio = math.nextafter(ratio, math.inf)
  sizes = (vision.width, vision.layers, vision.heads, vision.patch_size, ratio)
  if _SIGLIP.get(siglip["model_name"]) != sizes:
    siglip |= {"model_name": "siglip_custom"} | dict(
      zip(("width", "layers", "heads", "patch_size", "mlp_ratio"), sizes, strict=True)
    )
  if vision.gelu != "erf":
    siglip["gelu"] = vision.gelu
  if vision.layer_norm_epsilon != 1e-6:
    siglip["norm_eps"] = vision.layer_norm_epsilon
  shared = {
    "block_out_channels": [gen.width],
    "hidden_size": lm.width,
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
    "in_channels": gen.width,
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
      "hidden_size": lm.width,
      "intermediate_size": lm.mlp_width,
      "num_hidden_layers": lm.layers,
      "num_attention_heads": lm.heads,
      "num_key_value_heads": lm.kv_heads,
      "head_dim": lm.head_width,
      "vocab_size": lm.vocabulary_size,
      "max_position_embeddings": lm.context,
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


def vae_to_diffusers(c: AutoencoderConfig, image_size: int) -> dict[str, Any]:
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
