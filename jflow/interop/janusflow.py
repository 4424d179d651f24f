"""The official layout of JanusFlow: config.json both ways; its tensors are in generation/flow/weights.py."""

from collections.abc import Mapping
from typing import Any

from jflow.errors import UserError
from jflow.generation.flow import weights
from jflow.generation.flow.config import FlowConfig
from jflow.interop import release, sizes, vae
from jflow.interop.fields import Fields
from jflow.interop.layouts import Layout
from jflow.interop.safetensors_io import Tensor
from jflow.interop.transformers_config import language_model_config
from jflow.models.autoencoders.base import AutoencoderConfig
from jflow.models.config import JANUSFLOW_READER, ModelConfig
from jflow.models.llm.config import LanguageModelConfig
from jflow.models.sizes import most
from jflow.strict_json import shown

_BLOCKS = 2  # ConvNeXt blocks of the release in g_enc and in g_dec


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
  release.check_header(root)
  language = root.sub("language_config")
  lm = language_model_config(language)
  siglip = release.siglip_config(release.params(root, "vision_und_enc", "CLIPVisionTower"))
  encoder = release.params(root, "vision_gen_enc", "ShallowUViTEncoder")
  decoder = release.params(root, "vision_gen_dec", "ShallowUViTDecoder")
  for f in (encoder, decoder):
    if language.values.get("hidden_size") is None and f.values.get("hidden_size") not in (None, lm.embed_dim):
      raise UserError(
        f"{language.where} has no field hidden_size, which then is {lm.embed_dim}; {f.where} has "
        f"{shown(f.values['hidden_size'])}"
      )
  generation, latents = _generation_config(encoder, decoder, lm)
  release.is_tied(root)
  root.close()
  if autoencoder is None:
    autoencoder = vae.absent(siglip, generation.patch_size, latents)
  if autoencoder.latent_channels != latents:
    raise UserError(f"{where}: the model writes {latents} latent channels, the VAE has {autoencoder.latent_channels}")
  return ModelConfig(
    language_model=lm,
    understanding_encoder=siglip,
    generation=generation,
    autoencoder=autoencoder,
    objectives=(),
    reader=JANUSFLOW_READER,
  )


def config_to_official(c: ModelConfig, dtype: str, tokenizer: Any = None) -> dict[str, Any]:
  """The config.json of a model; `dtype` is the name of the weights' type.

  Raises:
    UserError: the layout cannot hold it.
  """
  if c.reader != JANUSFLOW_READER:
    raise UserError(
      f"model.reader.kind={c.reader.kind!r}, start={c.reader.start!r} and layers={c.reader.layers} must be 'siglip', "
      "'learned' and 1: the published layout has no other reader"
    )
  lm, gen = c.language_model, c.generation
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
  parts = (
    ("vision_und_enc", "CLIPVisionTower", release.siglip_to_official(c.understanding_encoder)),
    ("vision_gen_enc", "ShallowUViTEncoder", encoder | shared),
    ("vision_gen_dec", "ShallowUViTDecoder", decoder | shared),
  )
  return release.header(lm, dtype) | {f"{name}_config": release.section(name, *rest) for name, *rest in parts}


def _check_sizes(root: Fields, config: ModelConfig, tensors: Mapping[str, Tensor], where: Any) -> None:
  sizes.check_llama(root.sub("language_config"), config.language_model, tensors, "language_model.model.", where)
  tower = "vision_und_enc_model.vision_tower"
  release.check_siglip(root, "vision_und_enc", config.understanding_encoder, tower, tensors, where)
  encoder, decoder = (root.sub(f"vision_gen_{part}_config").sub("params") for part in ("enc", "dec"))
  sizes.check_generation(encoder, decoder, config.generation, tensors, where)


LAYOUT = Layout(
  **release.SHARED,
  family="flow",
  title="JanusFlow",
  recognises=lambda values: "language_config" in values and "gen_vision_config" not in values,
  read_config=config_from_official,
  write_config=config_to_official,
  entries=weights.official,
  check_sizes=_check_sizes,
  vae_apart=True,
)
