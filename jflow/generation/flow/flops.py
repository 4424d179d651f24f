"""Model FLOPs of rectified flow, counted by the rule of jflow/models/flops.py."""

from collections.abc import Collection

from jflow.generation.flow.settings import Settings
from jflow.models import flops as model_flops
from jflow.models.config import ModelConfig


def step(config: ModelConfig, trained: Collection[str], work: model_flops.Work, stored: bool) -> dict[str, float]:
  """FLOPs of one training step, forward and backward: g_enc and g_dec ("heads"), and the VAE's encoder ("vae").

  Args:
    config: the model.
    trained: first parts of the paths of trained parameters.
    work: of the batch.
    stored: the batch holds latents, so that the VAE does not run.
  """
  factor = 6 if "generation_encoder" in trained else 4
  heads = factor * (encoder(config) + decoder(config)) * work.written
  vae = 0.0 if stored else config.autoencoder.encoder_flops(config.image_size) * work.written
  return {"heads": heads, "vae": vae}


def image(config: ModelConfig, settings: Settings, prompt: int) -> float:
  """FLOPs of one generated image with its prompt's keys kept: the velocities, then the VAE's decoder.

  Args:
    config: the model.
    settings: of the sampler. The unconditional half sees BOS alone; the encoder's output serves both halves.
    prompt: its tokens, BOS included.
  """
  lm, slots, weights = (
    config.language_model,
    config.written_patches + 1,
    model_flops.body_weights(config.language_model),
  )

  def llm(before: int) -> float:
    pairs = slots * before + slots * (slots + 1) / 2
    return 2 * weights * slots + 4 * lm.num_layers * lm.num_heads * lm.head_dim * pairs

  halves = (prompt, 1) if settings.guidance != 1.0 else (prompt,)
  velocity = 2 * encoder(config) + sum(llm(before) + 2 * decoder(config) for before in halves)
  latents = config.autoencoder.decoder_flops(config.latent_size)
  return settings.evaluations * velocity + 2 * weights * prompt + latents


def encoder(config: ModelConfig) -> float:
  """Multiply-adds of one pass of g_enc, its projector and the time embedding over one image."""
  g, d = config.generation, config.language_model.embed_dim
  latent = g.patch_size**2 * config.autoencoder.latent_channels
  per_patch = latent * g.channels + g.encoder_blocks * _block(g.channels) + g.channels * d
  modulation = 2 * d * g.encoder_blocks * g.channels
  return float(per_patch * config.written_patches + modulation + g.channels * d + d * d)


def decoder(config: ModelConfig) -> float:
  """Multiply-adds of one pass of g_dec and its projector over one image."""
  g, d = config.generation, config.language_model.embed_dim
  latent = g.patch_size**2 * config.autoencoder.latent_channels
  per_patch = d * g.channels + g.decoder_blocks * _block(2 * g.channels) + 2 * g.channels * latent
  return float(per_patch * config.written_patches + 2 * d * g.decoder_blocks * 2 * g.channels)


def _block(channels: int) -> int:
  """Multiply-adds of a ConvNeXt block on one patch."""
  return 49 * channels + 8 * channels * channels
