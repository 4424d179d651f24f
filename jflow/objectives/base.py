"""The protocol of an objective besides next-token prediction and the writer's own; one file each.

`OBJECTIVES` holds the names that `model.objectives` may have. An objective may have a head of its own, and reads the
LLM after any block. Its weight has the same name in the run's config (`objective.weights`).
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from jflow import registry

if TYPE_CHECKING:
  import jax

  from jflow.batch import Batch


class Forward(NamedTuple):
  """The results of one forward pass over packed rows, the input of an objective.

  Legend: B rows, S tokens, M images of a row, I places for images to write, P patches, D embed, E SigLIP's width.
  """

  batch: "Batch"
  hidden: "jax.Array"  # [B, S, D], after the LLM's last norm
  layer: Any  # [B, S, D], after the block that the objective's config names; None where none does
  features: Any  # [I, P, E], SigLIP's; None where no objective in use declares `Part.features`
  written: "jax.Array"  # bool[I], the places that hold an image to write; only they count
  patches: Callable[["jax.Array"], "jax.Array"]  # [B, S, D] -> [I, P, D], at the patches of images
  images: Callable[[Any], "jax.Array"]  # [B, M, ...] -> [I, ...], values of the batch's images


class Objective(Protocol):
  """A Linen module, made as `Module(model config, its own config, dtype)`.

  Its parameters are siblings of the LLM's: name them after the objective. The sum that it returns is divided by
  `count` of the global batch, so that microbatches and shards add up.
  """

  def __call__(self, forward: Forward) -> "jax.Array":
    """The sum of the loss over rows, f32[]."""

  @staticmethod
  def count(batch: "Batch") -> "jax.Array":
    """The number of terms of the sum, f32[], at least 1."""


@dataclasses.dataclass(frozen=True)
class Part:
  """The description of an objective: its config, a frozen dataclass, and its Linen module or "package.module:Class".

  An objective whose config has a field `layer` reads the LLM after that block, counted from 1.
  """

  config: type
  module: Any
  heads: tuple[str, ...] = ()  # first parts of the paths of its parameters, which inference does without
  features: bool = False  # it compares with SigLIP's features of images to write, which are computed for it alone
  flops: Any = None  # (model config, its own, trained parts, `models.flops.Work`) -> FLOPs of a step; None: not counted


OBJECTIVES = registry.Registry(
  "model.objectives", "jflow.objectives", {"alignment": "jflow.objectives.alignment:PART"}, needs=("config",)
)
