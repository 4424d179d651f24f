"""The protocol of a way to write images; a family is one folder beside this file.

`FAMILIES` holds what `model.generation.kind` may name. Data workers lay rows out with a family, so this file and a
family's own description import neither jax nor flax: the Linen module and the sampler are named by place.

A family brings
  config      the frozen dataclass of the section `model.generation`
  layout      where an image stands in a row: tokens, positions, slots (numpy)
  settings    the frozen dataclass of what its sampler can be told
  writer      the Linen module: targets, what stands in the slots, losses (`Writer`)
  sampler     prompts to pixels (`Sampler`)
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from jflow import registry
from jflow.errors import UserError
from jflow.strict_json import shown

if TYPE_CHECKING:
  import jax

  from jflow.batch import Batch


class Written(NamedTuple):
  """The sequence of a prompt and the image that is written for it, its last tokens those of the image.

  Attributes:
    tokens: int32[n].
    positions: int32[n], for RoPE.
    image_start: position in the sequence of the first slot that the writer fills.
  """

  tokens: np.ndarray
  positions: np.ndarray
  image_start: int


class Layout(Protocol):
  """Where an image to write stands in a row. Numpy alone: the loader's processes run it."""

  def slots(self, patches: int) -> int:
    """Positions that the writer fills for an image of so many patches."""

  def sequence(self, prompt: np.ndarray, drop: bool, tokenizer: Any, patches: int) -> Written:
    """The tokens of a training sample.

    Args:
      prompt: int32[n], BOS and the text.
      drop: the prompt is left out, so that the model learns to write without one (guidance).
      tokenizer: see `data.tokenizer.Tokenizer`.
      patches: P.
    """


class Config(Protocol):
  """The section `model.generation`; a frozen dataclass whose first field is `kind`."""

  kind: str

  def check(self, model: Any) -> None:
    """Raises UserError, naming the field, where the section does not fit the rest of the model."""

  def stored_shape(self, model: Any) -> tuple[int, ...]:
    """Shape of what the encoder gives for one image, where it was made ahead of time; () if nothing can be."""


class Writer(Protocol):
  """The Linen module of a family. Its parameters stand beside those of the LLM, under the names it gives them.

  Legend: I images of a batch, K slots of an image, D width of the LLM.
  """

  losses_made: tuple[str, ...]  # names of the losses that `losses` returns
  patches_from: int  # where the first of P patches stands, counted from the image's first slot; for alignment

  def draw(self, key: "jax.Array", batch: "Batch", objective: Any) -> Any:
    """The randomness of a batch, a pytree of arrays [B, M, ...]; drawn before it is cut into microbatches.

    `objective` is the section of the run's config with that name.
    """

  def example_draws(self, batch: "Batch") -> Any:
    """Any draws of the right shapes, for `init`."""

  def write(self, pixels_IHWC: "jax.Array", stored: "jax.Array", draws: Any) -> tuple["jax.Array", Any]:
    """What stands in the slots of images to write.

    Args:
      pixels_IHWC: f32 in [-1, 1].
      stored: [I, ...] as `Config.stored_shape`, or [I, 0] where the step runs the encoder itself.
      draws: of the same images, [I, ...].

    Returns:
      (slots [I, K, D], whatever `losses` needs).
    """

  def losses(self, hidden_at: Callable[[int, int], "jax.Array"], context: Any, written: "jax.Array") -> dict[str, Any]:
    """Sums over the images written of each loss in `losses_made`, f32[] each.

    Args:
      hidden_at: (first, count) -> [I, count, D], the LLM's output at the positions first, first + 1, ... counted from
        the image's first slot; -1 is the position before it.
      context: of `write`.
      written: bool[I], the images that count.
    """

  def initialise(self) -> None:
    """Touches the parameters that training does not, so that `init` creates them."""


class Sampler(Protocol):
  """Prompts to pixels. Made with a model for inference and its parameters: `Sampler(model, params)`."""

  def start(self, seeds: Sequence[int]) -> np.ndarray:
    """[N, ...], whatever the images of these seeds start from; an image depends on its own seed alone."""

  def given(self, noise: Any, count: int) -> np.ndarray:
    """The start of `count` images from a caller's noise in PyTorch's layout; raises UserError where it does not fit."""

  def sample(
    self,
    tokens_NS: np.ndarray,
    lengths_N: np.ndarray,
    start: np.ndarray,
    settings: Any,
    on_step: Callable[[int, int], None] | None = None,
  ) -> np.ndarray:
    """f32[N, H, W, 3], about [-1, 1], not clipped.

    Args:
      tokens_NS: int32 prompts, BOS first, padded on the right.
      lengths_N: int32 true lengths.
      start: of the same images.
      settings: the family's own.
      on_step: called with (steps done, steps) about ten times.
    """

  def prepare(self, rows: int, slots: int, settings: Any, compile: bool = True) -> bool:
    """Compiles what `sample` runs for `rows` prompts of `slots` tokens, or looks whether that is done.

    Returns whether nothing is left to compile.
    """


@dataclasses.dataclass(frozen=True)
class Family:
  """The description of a way to write images; places are "package.module:attribute", or the thing itself."""

  name: str
  config: type
  layout: Layout
  settings: type
  writer: Any
  sampler: Any
  flops: Any = None  # module of `step` and `image`, see flow/flops.py; None: its FLOPs are not counted


FAMILIES = registry.Registry("model.generation.kind", "jflow.generation", {"flow": "jflow.generation.flow:FAMILY"})


def setting(default: Any, help: str, **rest: Any) -> Any:
  """A field of sampling settings: its default, its words in `--help`, and what a flag needs to read it.

  `rest`: choices, most (of a number), metavar (names of the parts, where the value is a tuple of numbers).
  """
  return dataclasses.field(default=default, metadata={"help": help, **rest})


def family(config: Any) -> Family:
  """The family of a section `model.generation`."""
  return FAMILIES.get(config.kind)


def settings(family: Family, given: Mapping[str, Any]) -> Any:
  """Typed sampling settings from what a user gave; None stands for a value that was not given.

  Raises:
    UserError: a setting that this family does not have, or a value out of its range.
  """
  known = {field.name for field in dataclasses.fields(family.settings)}
  chosen = {name: value for name, value in given.items() if value is not None}
  for name, value in chosen.items():
    if name not in known:
      raise UserError(
        f"{name}={shown(value)} is no setting of a model that writes images by {family.name}; it has "
        f"{', '.join(sorted(known))}"
      )
  return family.settings(**chosen)
