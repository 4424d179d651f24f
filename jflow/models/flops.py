"""Model FLOPs of training and of inference, by formula: those of the mathematics, not of the program.

A multiply-add is 2 FLOPs. A trained matrix costs 6 per weight and token (2 forward, 4 backward), a frozen one that
gradients pass through 4, a frozen one that they do not reach 2. Attention costs the pairs of query and key that the
mask allows. A head costs only at positions that carry loss, an encoder only for images that are there. Padding,
recomputation, norms and activations cost nothing. Stage 2 at 384 with the paper's mixture: 9.34 GFLOP per token.
"""

import dataclasses
from collections.abc import Collection

from jflow import registry
from jflow.generation.base import family
from jflow.models.config import ModelConfig
from jflow.models.llm.config import LanguageModelConfig
from jflow.objectives.base import OBJECTIVES


@dataclasses.dataclass(frozen=True)
class Work:
  """The counts of a batch that its FLOPs depend on."""

  tokens: float  # that are not padding
  pairs: float  # (query, key) that attention sees: n (n + 1) / 2 for a segment of n tokens
  loss_tokens: float  # positions that carry the next-token loss
  read: float  # images read
  written: float  # images written


def step(
  config: ModelConfig, trained: Collection[str], work: Work, losses: Collection[str], stored: bool
) -> dict[str, float]:
  """FLOPs of one step by part; their sum is the model's.

  Args:
    config: the model.
    trained: first parts of the paths of trained parameters ("language_model", "understanding_encoder", ...).
    work: of the global batch.
    losses: names of the losses that are computed.
    stored: the batch holds the outputs of the writer's encoder, so that it does not run.
  """
  lm = config.language_model
  factor = 6 if "language_model" in trained else 4
  # Scores and their sum: 4 per pair and width forward; twice that backward, also through frozen layers.
  attention = 12 * lm.num_layers * lm.num_heads * lm.head_dim * work.pairs
  parts = {
    "llm": factor * body_weights(lm) * work.tokens + attention,
    "head": factor * lm.embed_dim * lm.vocab_size * work.loss_tokens if "text" in losses else 0.0,
    "siglip": 0.0,
    "heads": (6 if "understanding_projector" in trained else 2) * projector(config) * work.read,
  }
  seen = (3 if "understanding_encoder" in trained else 1) * work.read
  aligned = [(OBJECTIVES.get(name), own) for name, own in config.objectives if name in losses]
  for objective, own in aligned:
    parts["heads"] += registry.load(objective.flops)(config, own, trained, work) if objective.flops else 0.0
  if any(objective.features for objective, _ in aligned):
    seen += work.written
  parts["siglip"] = siglip(config) * seen
  writer = registry.load(family(config.generation).flops)
  own = writer.step(config, trained, work, stored) if writer else {}
  return parts | {name: parts.get(name, 0.0) + flops for name, flops in own.items()}


def projector(config: ModelConfig) -> int:
  """Multiply-adds of the reader's projector over one image."""
  width = config.language_model.embed_dim
  return config.patches * width * (config.understanding_encoder.embed_dim + (config.reader.layers - 1) * width)


def siglip(config: ModelConfig) -> float:
  """Forward pass of SigLIP over one image."""
  c = config.understanding_encoder
  linear = 4 * c.embed_dim**2 + 2 * c.embed_dim * c.mlp_dim
  per_patch = c.num_layers * (2 * linear + 4 * c.patches * c.embed_dim) + 2 * 3 * c.patch_size**2 * c.embed_dim
  return float(per_patch * c.patches)


def body_weights(config: LanguageModelConfig) -> int:
  """Number of weights in the LLM's matrices, without embedding and head."""
  attention = config.embed_dim * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
  return config.num_layers * (attention + 3 * config.embed_dim * config.mlp_dim)


def token_bytes(config: LanguageModelConfig, context: int, rows: int, itemsize: int) -> int:
  """Bytes that one decoding step reads: every weight once, and the keys and values of each row."""
  weights = body_weights(config) + config.embed_dim * config.vocab_size
  cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * context * rows
  return itemsize * (weights + cache)
