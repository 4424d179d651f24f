"""Model FLOPs of training and of inference, by formula: what the mathematics needs, whatever the program computes.

The rule: a multiply-add is 2 FLOPs. A trained matrix costs 6 per weight and token (2 forward, 4 backward), a
frozen one that gradients pass through 4, a frozen one that they do not reach 2. Attention costs the pairs that a
token may see. Only positions that carry loss cost a head; only images that are there cost an encoder. Padding,
recomputation, norms and activations cost nothing. For stage 2 at 384 and the paper's mixture this gives 9.34 GFLOP
per token.
"""

import dataclasses
from collections.abc import Collection

from jflow.models.config import JanusFlowConfig, LanguageModelConfig


@dataclasses.dataclass(frozen=True)
class Work:
  """What a batch holds."""

  tokens: float  # that are not padding
  pairs: float  # (query, key) that attention sees: n (n + 1) / 2 for a segment of n tokens
  loss_tokens: float  # positions that carry the next-token loss
  read: float  # images read
  written: float  # images written


def step(
  config: JanusFlowConfig,
  trained: Collection[str],
  work: Work,
  alignment: bool,
  latents_given: bool,
  head_trained: bool,
) -> dict[str, float]:
  """FLOPs of one step by part; their sum is the model's.

  Args:
    config: the model.
    trained: first parts of the paths of trained parameters ("language_model", "understanding_encoder", ...).
    work: of the global batch.
    alignment: the alignment loss (eq. 8) is on.
    latents_given: latents come with the batch, so the VAE does not run.
    head_trained: the text loss is on.
  """
  lm, patches = config.language_model, config.patches
  factor = lambda part, reached=True: 6 if part in trained else 4 if reached else 2
  body = body_weights(lm)
  # Scores and their sum: 4 per pair and width forward; twice that backward, also through frozen layers.
  attention = 12 * lm.layers * lm.heads * lm.head_width * work.pairs
  llm = factor("language_model") * body * work.tokens + attention
  head = factor("language_model") * lm.width * lm.vocabulary_size * work.loss_tokens if head_trained else 0.0
  reads_back = 3 if "understanding_encoder" in trained else 1
  vision = siglip(config) * (reads_back * work.read + (work.written if alignment else 0))
  vision_width = config.understanding_encoder.width
  heads = factor("understanding_projector", False) * patches * vision_width * lm.width * work.read
  heads += factor("generation_encoder") * (flow_encoder(config) + flow_decoder(config)) * work.written
  if alignment:
    hidden = config.alignment_width
    mlp = lm.width * hidden + hidden * hidden + hidden * vision_width
    heads += factor("alignment_head") * patches * mlp * work.written
  encoder = 0.0 if latents_given else config.autoencoder.encoder_flops(config.image_size) * work.written
  return {"llm": llm, "head": head, "siglip": vision, "heads": heads, "vae": encoder}


def siglip(config: JanusFlowConfig) -> float:
  """Forward pass of SigLIP over one image."""
  c = config.understanding_encoder
  linear = 4 * c.width**2 + 2 * c.width * c.mlp_width
  per_patch = c.layers * (2 * linear + 4 * c.patches * c.width) + 2 * 3 * c.patch_size**2 * c.width
  return float(per_patch * c.patches)


def body_weights(config: LanguageModelConfig) -> int:
  """Weights of the LLM's matrices without embedding and head."""
  attention = config.width * config.head_width * (2 * config.heads + 2 * config.kv_heads)
  return config.layers * (attention + 3 * config.width * config.mlp_width)


def flow_encoder(config: JanusFlowConfig) -> float:
  """Multiply-adds of one pass of g_enc, its projector and the time embedding over one image."""
  g, d = config.generation, config.language_model.width
  latent = g.patch_size**2 * config.autoencoder.latent_channels
  per_patch = latent * g.width + g.encoder_blocks * _block(g.width) + g.width * d
  modulation = 2 * d * g.encoder_blocks * g.width
  return float(per_patch * config.patches + modulation + g.width * d + d * d)


def flow_decoder(config: JanusFlowConfig) -> float:
  """Multiply-adds of one pass of g_dec and its projector over one image."""
  g, d = config.generation, config.language_model.width
  latent = g.patch_size**2 * config.autoencoder.latent_channels
  per_patch = d * g.width + g.decoder_blocks * _block(2 * g.width) + 2 * g.width * latent
  return float(per_patch * config.patches + 2 * d * g.decoder_blocks * 2 * g.width)


def _block(channels: int) -> int:
  """Multiply-adds of a ConvNeXt block on one patch."""
  return 49 * channels + 8 * channels * channels


def image(config: JanusFlowConfig, evaluations: int, prompt: int, guided: bool) -> float:
  """FLOPs of one painted image with its prompt's keys kept: the velocity `evaluations` times, then the VAE.

  Args:
    config: the model.
    evaluations: of the velocity.
    prompt: its tokens, BOS included; the unconditional half sees BOS alone.
    guided: both halves are computed; the encoder's output serves both.
  """
  lm, slots, weights = config.language_model, config.patches + 1, body_weights(config.language_model)

  def llm(before: int) -> float:
    pairs = slots * before + slots * (slots + 1) / 2
    return 2 * weights * slots + 4 * lm.layers * lm.heads * lm.head_width * pairs

  halves = (prompt, 1) if guided else (prompt,)
  velocity = 2 * flow_encoder(config) + sum(llm(before) + 2 * flow_decoder(config) for before in halves)
  return evaluations * velocity + 2 * weights * prompt + config.autoencoder.decoder_flops(config.latent_size)


def token_bytes(config: LanguageModelConfig, context: int, rows: int, itemsize: int) -> int:
  """Bytes that one decoding step reads: every weight once, and the keys and values of each row."""
  weights = body_weights(config) + config.width * config.vocabulary_size
  cache = 2 * config.layers * config.kv_heads * config.head_width * context * rows
  return itemsize * (weights + cache)
