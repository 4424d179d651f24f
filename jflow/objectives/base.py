"""The protocol of an objective beside next-token prediction and the writer's own; one file each.

`OBJECTIVES` holds what `model.objectives` may name. An objective may have a head of its own, and reads the LLM after
any block. Its weight stands in the run's config under the same name (`objective.weights`).
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from jflow import registry

if TYPE_CHECKING:
  import jax

  from jflow.batch import Batch


class Forward(NamedTuple):
  """What one pass of the model over packed rows gives an objective.

  Legend: B rows, S tokens, M image slots of a row, I = B * M images, P patches, D width, E SigLIP's width.
  """

  batch: "Batch"
  hidden: "jax.Array"  # [B, S, D], after the LLM's last norm
  layer: Any  # [B, S, D], after the block that the objective's config names; None where none does
  features: "jax.Array"  # [I, P, E], SigLIP's, of every image
  written: "jax.Array"  # bool[B, M], the images that are written
  patches: Callable[["jax.Array"], "jax.Array"]  # [B, S, D] -> [I, P, D], at the patches of images


class Objective(Protocol):
  """A Linen module, made as `Module(model config, its own config, dtype)`.

  Its parameters stand beside the LLM's: name them after the objective. The sum it returns is divided by `count`, which
  is taken over the whole batch, so that microbatches and shards add up.
  """

  def __call__(self, forward: Forward) -> "jax.Array":
    """The sum of the loss over rows, f32[]."""

  @staticmethod
  def count(batch: "Batch") -> "jax.Array":
    """How many terms the sum has, f32[], at least 1."""


@dataclasses.dataclass(frozen=True)
class Part:
  """The description of an objective: the frozen dataclass of its config, and its Linen module or where that is.

  A config with a field `layer` reads the LLM after that block, counted from 1.
  """

  config: type
  module: Any
  features: bool = False  # it compares with SigLIP's features of images to write, which are computed for it alone
  flops: Any = None  # (model config, its own, trained parts, `model_flops.Work`) -> FLOPs of a step; None: not counted


OBJECTIVES = registry.Registry("model.objectives", "jflow.objectives", {"alignment": "jflow.objectives.alignment:PART"})
