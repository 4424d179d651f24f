"""Sizes of the embedding and the head of codes around the LLM."""

import dataclasses
from typing import Any

from jflow import checks, values
from jflow.errors import UserError
from jflow.models.autoencoders.base import CodebookConfig
from jflow.strict_json import shown

_MOST = 2**16  # a stored code is a uint16


@dataclasses.dataclass(frozen=True)
class CodesExploration:
  """The section `rl.explore`: how the policy draws codes.

  Attributes:
    guidance: w on logits; 1: none.
    temperature: of each draw.

  Raises:
    UserError: a value out of its range.
  """

  guidance: float
  temperature: float

  def __post_init__(self) -> None:
    checks.need("config.rl.explore.guidance", self.guidance, values.number(least=1.0))
    checks.need("config.rl.explore.temperature", self.temperature, values.number(above=0.0))


@dataclasses.dataclass(frozen=True)
class CodesConfig:
  """The section `model.generation` of a model that writes codes (gen_embed, gen_aligner, gen_head)."""

  kind: str  # "codes"
  hidden_dim: int  # middle width of gen_head
  projector_layers: int  # linear maps of gen_aligner, GELU between them

  def check(self, model: Any) -> None:
    """Raises UserError where the section does not fit the rest of the model."""
    codec = model.autoencoder
    if not isinstance(codec, CodebookConfig):
      raise UserError(
        f"model.autoencoder.kind={shown(getattr(codec, 'kind', None))} must be a kind with a codebook where "
        "model.generation.kind='codes'"
      )
    if codec.codebook_size > _MOST:
      raise UserError(f"model.autoencoder.codebook_size={codec.codebook_size} must be at most {_MOST}")
    if model.image_size % codec.factor:
      raise UserError(f"image_size={model.image_size} must be a multiple of the autoencoder's factor {codec.factor}")
    if model.latent_size**2 != model.patches:
      raise UserError(
        f"a written image has {model.latent_size**2} codes, a read one {model.patches} patches: they must be equal, "
        "since both take the same slots of a row"
      )
