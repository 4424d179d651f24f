"""Sizes of a decoder of Llama layout."""

import dataclasses
from typing import Any

from jflow.errors import UserError
from jflow.models.llm.base import Architecture


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
  """The section `model.language_model` of a Llama."""

  kind: str  # "llama"
  vocabulary_size: int
  width: int
  mlp_width: int
  layers: int
  heads: int
  kv_heads: int  # fewer than heads: grouped-query attention
  head_width: int
  rms_norm_epsilon: float
  rope_theta: float
  context: int  # longest sequence, in tokens

  def check(self, model: Any) -> None:
    """Raises UserError naming field and value."""
    if self.heads % self.kv_heads:
      raise UserError(f"model.language_model.heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
    if self.head_width % 2:
      raise UserError(f"model.language_model.head_width={self.head_width} must be even (rotary halves)")


LLAMA = Architecture(config=LanguageModelConfig, module="jflow.models.llm.llama:LanguageModel")
