"""Model FLOPs of a training step, by formula: what the mathematics needs, whatever the program computes.

The rule: a multiply-add is 2 FLOPs. A trained matrix costs 6 per weight and token (2 forward, 4 backward), a
frozen one that gradients pass through 4, a frozen one that they do not reach 2. Attention costs the pairs that a
token may see. Only positions that carry loss cost a head; only images that are there cost an encoder. Padding,
recomputation, norms and activations cost nothing. For stage 2 at 384 and the paper's mixture this gives 9.34 GFLOP
per token.
"""

import dataclasses
from collections.abc import Collection

from jflow.models.config import JanusFlowConfig


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
  body = lm.layers * lm.width * lm.head_width * (2 * lm.heads + 2 * lm.kv_heads)
  body += 3 * lm.layers * lm.width * lm.mlp_width
  # Scores and their sum: 4 per pair and width forward; twice that backward, also through frozen layers.
  attention = 12 * lm.layers * lm.heads * lm.head_width * work.pairs
  llm = factor("language_model") * body * work.tokens + attention
  head = factor("language_model") * lm.width * lm.vocabulary_size * work.loss_tokens if head_trained else 0.0
  reads_back = 3 if "understanding_encoder" in trained else 1
  vision = siglip(config) * (reads_back * work.read + (work.written if alignment else 0))
  vision_width = config.understanding_encoder.width
  heads = factor("understanding_projector", False) * patches * vision_width * lm.width * work.read
  heads += factor("generation_encoder") * convnext(config) * work.written
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


def convnext(config: JanusFlowConfig) -> float:
  """Multiply-adds of one pass of g_enc, g_dec and their projectors over one image."""
  g, d = config.generation, config.language_model.width
  block = lambda c: 49 * c + 8 * c * c
  latent = g.patch_size**2 * config.autoencoder.latent_channels
  per_patch = latent * g.width + g.encoder_blocks * block(g.width) + g.width * d
  per_patch += d * g.width + g.decoder_blocks * block(2 * g.width) + 2 * g.width * latent
  modulation = 2 * d * (g.encoder_blocks * g.width + g.decoder_blocks * 2 * g.width)
  return float(per_patch * config.patches + modulation + g.width * d + d * d)
