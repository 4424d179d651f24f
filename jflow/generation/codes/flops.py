"""Model FLOPs of codes, counted by the rule of jflow/models/flops.py."""

from collections.abc import Collection

from jflow.generation.codes.settings import Settings
from jflow.models import flops as model_flops
from jflow.models.config import ModelConfig


def step(config: ModelConfig, trained: Collection[str], work: model_flops.Work, stored: bool) -> dict[str, float]:
  """FLOPs of one training step, forward and backward: gen_aligner and gen_head ("heads"), the VQ's encoder ("vq").

  Args:
    config: the model.
    trained: first parts of the paths of trained parameters.
    work: of the batch.
    stored: the batch holds codes, so that the encoder does not run.
  """
  before = "generation_embed" in trained or "generation_projector" in trained  # else no gradient goes below the LLM
  into = (6 if "generation_projector" in trained else 4 if before else 2) * projector(config)
  out = (6 if "generation_head" in trained else 4) * head(config)
  vq = 0.0 if stored else config.autoencoder.encoder_flops(config.image_size) * work.written
  return {"heads": (into + out) * config.patches * work.written, "vq": vq}


def image(config: ModelConfig, settings: Settings, prompt: int) -> float:
  """FLOPs of one generated image with all keys kept: prompt and codes through the LLM, the VQ's decoder.

  Args:
    config: the model.
    settings: of the sampler. The unconditional half reads as many tokens.
    prompt: its tokens, BOS included, the begin-of-image token not.
  """
  lm, fed = config.language_model, prompt + config.patches  # the last code is not fed, the begin-of-image token is
  pairs = fed * (fed + 1) / 2
  llm = 2 * model_flops.body_weights(lm) * fed + 4 * lm.num_layers * lm.num_heads * lm.head_dim * pairs
  halves = 1 if settings.guidance in (0.0, 1.0) else 2
  codes = halves * (llm + 2 * head(config) * config.patches) + 2 * projector(config) * (config.patches - 1)
  return codes + config.autoencoder.decoder_flops(config.latent_size)


def step_bytes(config: ModelConfig, settings: Settings, prompt: int, images: int, itemsize: int) -> float:
  """Bytes that drawing one code of each image reads: every weight once, keys and values of half of an image's codes.

  Args:
    config: the model.
    settings: of the sampler.
    prompt: tokens of each prompt.
    images: of the batch.
    itemsize: bytes of a weight.
  """
  lm, rows = config.language_model, images * (1 if settings.guidance in (0.0, 1.0) else 2)
  llm = model_flops.token_bytes(lm, prompt + config.patches // 2, rows, itemsize)
  return llm + itemsize * (projector(config) + head(config) - lm.embed_dim * lm.vocab_size)  # its own head


def projector(config: ModelConfig) -> int:
  """Multiply-adds of gen_aligner for one code."""
  d = config.language_model.embed_dim
  return d * (config.autoencoder.code_dim + (config.generation.projector_layers - 1) * d)


def head(config: ModelConfig) -> int:
  """Multiply-adds of gen_head for one code."""
  hidden = config.generation.hidden_dim
  return hidden * (config.language_model.embed_dim + config.autoencoder.codebook_size)
