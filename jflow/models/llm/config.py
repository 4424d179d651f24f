"""The sizes of a Llama decoder, and of those that differ from it in a few places; all are computed by `llama.py`."""

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np

from jflow.errors import UserError
from jflow.models.llm.base import Architecture


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
  """The section `model.language_model` of a Llama, or of a Mistral, which computes the same within its window."""

  qkv_bias: ClassVar[bool] = False  # whether the maps to queries, keys and values have biases
  qk_norm: ClassVar[bool] = False  # whether each head's queries and keys are normalised before they are rotated

  kind: str  # "llama"
  vocab_size: int
  embed_dim: int
  mlp_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int  # fewer than heads: grouped-query attention
  head_dim: int
  rms_norm_epsilon: float
  rope_theta: float
  max_length: int  # longest sequence, in tokens

  def check(self, model: Any) -> None:
    """Raises UserError naming field and value."""
    if self.num_heads % self.num_kv_heads:
      raise UserError(
        f"model.language_model.num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
      )
    if self.head_dim % 2:
      raise UserError(f"model.language_model.head_dim={self.head_dim} must be even (rotary halves)")

  def rope_scales(self) -> np.ndarray | None:
    """Factors f32[H/2] of the rotary frequencies theta^(-2i/H); None: all are 1."""
    return None


@dataclasses.dataclass(frozen=True)
class Qwen2Config(LanguageModelConfig):
  """The section of a Qwen2 or Qwen2.5 (https://arxiv.org/abs/2407.10671): a Llama with biases of q, k and v."""

  qkv_bias: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Qwen3Config(LanguageModelConfig):
  """The section of a Qwen3 (https://arxiv.org/abs/2505.09388): a Llama with an RMSNorm of each query and key."""

  qk_norm: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Llama3Config(LanguageModelConfig):
  """The section of a Llama 3.1 or later (https://arxiv.org/abs/2407.21783), whose slow rotations are slower still.

  A frequency that turns less than `rope_low` times within `rope_original_length` is divided by `rope_factor`, one that
  turns more than `rope_high` times is kept, and between the two the factor moves with the number of turns.
  """

  rope_factor: float
  rope_low: float
  rope_high: float
  rope_original_length: int  # tokens that the model was pretrained with

  def check(self, model: Any) -> None:
    """Raises UserError naming field and value."""
    super().check(model)
    if self.rope_low >= self.rope_high:
      raise UserError(f"model.language_model.rope_low={self.rope_low:g} must be below rope_high={self.rope_high:g}")

  def rope_scales(self) -> np.ndarray:
    """See `LanguageModelConfig.rope_scales`."""
    frequency = self.rope_theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
    turns = self.rope_original_length * frequency / (2 * math.pi)
    share = np.clip((turns - self.rope_low) / (self.rope_high - self.rope_low), 0.0, 1.0)
    return ((1 - share) / self.rope_factor + share).astype(np.float32)


def _architecture(config: type) -> Architecture:
  return Architecture(
    config=config,
    module="jflow.models.llm.llama:LanguageModel",
    remat="jflow.models.llm.llama:remat_policy",
    matmul=("dtype", "fp8"),
  )


LLAMA, LLAMA3 = _architecture(LanguageModelConfig), _architecture(Llama3Config)
QWEN2, QWEN3 = _architecture(Qwen2Config), _architecture(Qwen3Config)
