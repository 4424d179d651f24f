"""The sizes of a Llama decoder."""

import dataclasses
from typing import Any

from jflow.errors import UserError
from jflow.models.llm.base import Architecture


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
  """The section `model.language_model` of a Llama."""

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


LLAMA = Architecture(
  config=LanguageModelConfig,
  module="jflow.models.llm.llama:LanguageModel",
  remat="jflow.models.llm.llama:remat_policy",
  matmul=("dtype", "fp8"),
)
