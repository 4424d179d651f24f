"""The protocol of a way to write images; a family is one folder beside this file.

`FAMILIES` holds the values of `model.generation.kind`. Data workers use a family's layout, so this file and a family's
description import neither jax nor flax: the Linen module and the sampler are given as "package.module:attribute".

A family has
  config      the frozen dataclass of the section `model.generation`
  layout      the place of an image in a row: tokens, positions, slots (numpy)
  settings    the frozen dataclass of its sampling settings
  writer      the Linen module: targets, embeddings of the image slots, losses (`Writer`)
  sampler     prompts to pixels (`Sampler`)
  policy      how it learns from rewards (`Policy`)
  stored      what its frozen encoder makes of an image, which may be computed ahead of training (`Stored`)
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
  """The sequence of a prompt and its image; the image's tokens are the last.

  Attributes:
    tokens: int32[n].
    positions: int32[n], for RoPE.
    image_start: position in the sequence of the first slot that the writer fills.
  """

  tokens: np.ndarray
  positions: np.ndarray
  image_start: int


class Layout(Protocol):
  """The layout of an image to write in a row. Numpy only, since the loader's processes run it."""

  loss_from: (
    int  # offset from the image's first slot of the first of P positions that carry a loss; for pictures of rows
  )

  def slots(self, patches: int) -> int:
    """Number of positions that the writer fills for an image of so many patches."""

  def sequence(self, prompt: np.ndarray, drop: bool, tokenizer: Any, patches: int) -> Written:
    """The tokens of a training sample.

    Args:
      prompt: int32[n], BOS and the text.
      drop: whether the prompt is left out, which trains the unconditional half of guidance.
      tokenizer: see `data.tokenizer.Tokenizer`.
      patches: P.
    """


class Config(Protocol):
  """The section `model.generation`; a frozen dataclass whose first field is `kind`."""

  kind: str

  def check(self, model: Any) -> None:
    """Raises UserError, naming the field, where the section does not fit the rest of the model."""


class Writer(Protocol):
  """The Linen module of a family. Its parameters are siblings of the LLM's, under the names that it gives them.

  Legend: I images of a batch, K slots of an image, D embed.
  """

  losses_made: tuple[str, ...]  # names of the losses that `losses` returns
  patches_from: int  # offset of the first of P patches from the image's first slot; for alignment

  def draw(self, key: "jax.Array", batch: "Batch", objective: Any) -> Any:
    """Draws the randomness of a batch, a pytree of arrays [B, M, ...], before it is cut into microbatches.

    `objective` is the section `objective` of the run's config.
    """

  def example_draws(self, batch: "Batch") -> Any:
    """Returns draws of the right shapes, with any values, for `init`."""

  def write(self, pixels_IHWC: "jax.Array", stored: "jax.Array", draws: Any) -> tuple["jax.Array", Any]:
    """Embeddings of the slots of images to write.

    Args:
      pixels_IHWC: f32 in [-1, 1].
      stored: [I, ...] as `Family.stored` says, or [I, 0] where the step runs the encoder itself.
      draws: of the same images, [I, ...].

    Returns:
      (slots [I, K, D], context for `losses`).
    """

  def losses(self, hidden_at: Callable[[int, int], "jax.Array"], context: Any, written: "jax.Array") -> dict[str, Any]:
    """The sum over written images of each loss in `losses_made`, f32[] each.

    Args:
      hidden_at: (first, count) -> [I, count, D], the LLM's output at the positions first, first + 1, ... counted from
        the image's first slot; -1 is the position before it.
      context: from `write`.
      written: bool[I], mask of the images to write.
    """

  def initialise(self) -> None:
    """Uses the parameters that training does not, so that `init` creates them."""


class Sampler(Protocol):
  """A sampler from prompts to pixels, made as `Sampler(model, params, tokenizer)` with a model for inference.

  Of the tokenizer it takes the ids of special tokens. Where its work has two halves, `halves` may name them, and the
  methods `write`, with the arguments of `sample`, and `decode`, of what `write` returns, are `sample` in two calls:
  `bench` then times each.

  Legend: I images, S prompt slots.
  """

  def start(self, seeds: Sequence[int]) -> np.ndarray:
    """The initial state [I, ...] of the images of these seeds; an image depends only on its own seed."""

  def given(self, noise: Any, count: int) -> np.ndarray:
    """The initial state of `count` images from noise in PyTorch's layout; raises UserError where there is none."""

  def evaluations(self, settings: Any) -> int:
    """Evaluations of the LLM for one image, guidance aside; what a progress bar counts."""

  def sample(
    self,
    tokens_IS: np.ndarray,
    lengths_I: np.ndarray,
    start: np.ndarray,
    settings: Any,
    on_step: Callable[[int, int], None] | None = None,
  ) -> np.ndarray:
    """Generates pixels, f32[I, H, W, 3], about [-1, 1], not clipped.

    Args:
      tokens_IS: int32 prompts, BOS first, padded on the right.
      lengths_I: int32 true lengths.
      start: the initial state, from `start` or `given`.
      settings: the family's own.
      on_step: called with (steps done, steps) about ten times.
    """

  def round_trip(self, pixels_IHW3: np.ndarray) -> np.ndarray:
    """Pixels as `sample` gives them, of uint8 images that the family's encoder and decoder have seen.

    Never called for a family without an encoder, see `Family.stored`.
    """

  def prepare(self, rows: int, slots: int, settings: Any, compile: bool = True) -> bool:
    """Compiles the programs of `sample` for `rows` prompts of `slots` tokens, or only checks that they are compiled.

    Returns:
      Whether all of them are compiled.
    """

  def loop(self, rows: int, slots: int, settings: Any) -> "Loop":
    """The program that runs the steps of `rows` pictures behind prompts of `slots` tokens, to compile it elsewhere."""


class Loop(NamedTuple):
  """A loop that is to be compiled, and how it is called."""

  program: Any  # programs.Programs
  args: tuple[Any, ...]  # shapes, after the params
  static: dict[str, Any]
  step: str  # what one step of it makes, in words: "solver step"
  large: bool  # whether a step multiplies matrices by many positions of each row, not by one


class Trajectory(NamedTuple):
  """Drawn pictures and what they were drawn by; every array has the leading axis I."""

  latents: "jax.Array"  # what `Policy.decode` turns into pictures
  drawn: Any  # a pytree of the actions, and of the policy's numbers at each


class Compared(NamedTuple):
  """The drawn actions of a trajectory under other parameters; an image has A actions."""

  log_ratio: "jax.Array"  # f32[I, A]; 0 under the parameters that drew them
  divergence: "jax.Array"  # f32[I, A]; KL to the reference, at least 0; zeros without one


class Policy(Protocol):
  """A family as a policy of reinforcement learning, made as `Policy(model, exploration, tokenizer)`.

  Every method is pure, to be traced into a program of its own. The model is that of training, and its parameters may
  hold adapters. Of the tokenizer it takes the ids of special tokens.

  Legend: I images, S prompt slots, A actions of an image.
  """

  def sample(
    self, params: Any, tokens_IS: "jax.Array", lengths_I: "jax.Array", key: "jax.Array", group: int
  ) -> Trajectory:
    """Draws an image for each prompt.

    Args:
      params: nested.
      tokens_IS, lengths_I: prompts, as for `Sampler.sample`; the `group` images of a prompt are consecutive.
      key: of all draws.
      group: images of a prompt; what is no action may be shared within a group.
    """

  def decode(self, params: Any, latents: "jax.Array") -> "jax.Array":
    """Pixels f32[I, H, W, 3], about [-1, 1], not clipped."""

  def compare(
    self, params: Any, reference: Any, tokens_IS: "jax.Array", lengths_I: "jax.Array", drawn: Any
  ) -> Compared:
    """Compares the policy of `params` with the one that drew, and with that of `reference`, or None.

    Reverse mode differentiates it by `params`.
    """

  def likelihood(
    self, params: Any, tokens_IS: "jax.Array", lengths_I: "jax.Array", pixels_IHWC: "jax.Array", draws: Any
  ) -> "jax.Array":
    """Log-likelihoods of given pictures behind their prompts, f32[I], the mean over a picture's latents or codes.

    Of flow an estimate at the times and the noise of `draws`, up to a constant. Reverse mode differentiates it.

    Args:
      params, tokens_IS, lengths_I: see `sample`.
      pixels_IHWC: f32 in [-1, 1].
      draws: of the same images, see `draw`.
    """

  def draw(self, key: "jax.Array", count: int) -> Any:
    """Draws what `likelihood` of so many pictures needs, a pytree of arrays [count, ...]; None where it is exact."""


@dataclasses.dataclass(frozen=True)
class Stored:
  """The output of a family's frozen encoder, which training reads from disk where it was computed ahead.

  Attributes:
    name: of the folder ("latents-384") and of the flag of `prepare` ("--latents").
    array: name of the array in the header of the folder.
    dtype: of the array, as NumPy names it; also bfloat16.
    shape: model config -> the array's shape for one image.
    part: the part of the parameters that holds the encoder; it must be frozen.
    weights: names below `part` of the parameters that the output depends on.
    encode: (model config, parameters of `part`, f32 pixels[N, H, W, 3] in [-1, 1]) -> [N, *shape], to be jitted; or
      "package.module:attribute".
    about: what the files hold, for `prepare --help`.
  """

  name: str
  array: str
  dtype: str
  shape: Callable[[Any], tuple[int, ...]]
  part: str
  weights: tuple[str, ...]
  encode: Any
  about: str


@dataclasses.dataclass(frozen=True)
class Family:
  """The description of a way to write images; modules may be "package.module:attribute"."""

  name: str
  config: type
  layout: Layout
  settings: type
  writer: Any
  sampler: Any
  tokens: tuple[str, ...] = ()  # special tokens that only some tokenizers have and this family needs, by attribute
  layouts: tuple[Any, ...] = ()  # its published layouts, see interop/layouts.py
  parity: Any = None  # the groups of golden arrays that its models have, see interop/golden.py
  flops: Any = None  # module of `step` and `image`, see flow/flops.py; None: its FLOPs are not counted
  stored: Stored | None = None  # None: it has no encoder that could run ahead
  frozen: tuple[str, ...] = ()  # first parts of the paths of parameters that no loss reaches
  derived: Any = None  # (model config, parameters by path) -> {path: first value} of those that follow from others
  about: str = ""  # how it writes images, for the card of a model; its name by default
  policy: Any = None  # the class of its `Policy`; None: it does not learn from rewards
  explores: type | None = None  # frozen dataclass of the section `rl.explore`, which the policy reads
  draws: type | None = None  # frozen dataclass of the section `objective.draws`, which `Writer.draw` reads; None: {}

  @property
  def setting_names(self) -> set[str]:
    """The names of the sampling settings."""
    return {field.name for field in dataclasses.fields(self.settings)}

  @property
  def served(self) -> list[dataclasses.Field]:
    """The sampling settings that clients of a server may choose: those of one value, unless they say otherwise."""
    fields = dataclasses.fields(self.settings)
    return [f for f in fields if f.metadata.get("served", True) and not isinstance(f.default, tuple)]

  def told(self, chosen: Any) -> dict[str, Any]:
    """The settings that records of pictures name: those of the page, and others that differ from their default."""
    fields = dataclasses.fields(self.settings)
    values = {field.name: getattr(chosen, field.name) for field in fields}
    return {f.name: values[f.name] for f in fields if "page" in f.metadata or values[f.name] != f.default}


FAMILIES = registry.Registry(
  "model.generation.kind",
  "jflow.generation",
  {"flow": "jflow.generation.flow:FAMILY", "codes": "jflow.generation.codes:FAMILY"},
  needs=("config", "settings"),
)


def setting(default: Any, help: str, **rest: Any) -> Any:
  """Declares a field of sampling settings: its default, its text in `--help`, and how a flag parses it.

  Args:
    default: a number, a text or a tuple of numbers.
    help: of the flag.
    rest: choices; most, the largest number; metavar, names of the parts of a tuple; served, (least, most) for clients
      of a server, or False where they may not choose it; page, (least, most, step) of its slider on the page of `demo`,
      or True for a list of choices, where it is shown there.
  """
  return dataclasses.field(default=default, metadata={"help": help, **rest})


def tenths(count: int) -> list[int]:
  """The about ten counts after which a sampler tells its progress; the last is `count`."""
  pieces = min(10, count)
  return [count * (i + 1) // pieces for i in range(pieces)]


def family(config: Any) -> Family:
  """Returns the family of a section `model.generation`."""
  return FAMILIES.get(config.kind)


def check_settings(given: Mapping[str, Any]) -> None:
  """Checks given settings before a checkpoint is read: some family must take them all.

  Raises:
    UserError: no family does, or a value is out of range.
  """
  error = UserError(f"no kind of image generation takes all of {', '.join(map(_name, given))}")
  for family in FAMILIES.all().values():
    if set(given) <= family.setting_names:
      try:
        family.settings(**given)
        return
      except UserError as wrong:
        error = wrong
  raise error


def settings(family: Family, given: Mapping[str, Any]) -> Any:
  """Builds a family's sampling settings from a user's values; None stands for the default.

  Raises:
    UserError: a setting that the family does not have, or a value out of its range.
  """
  known = family.setting_names
  chosen = {name: value for name, value in given.items() if value is not None}
  for name, value in chosen.items():
    if name not in known:
      raise UserError(
        f"{_name(name)}={shown(value)} is not a setting of a model that writes images by {family.name}; it has "
        f"{', '.join(sorted(known))}"
      )
  return family.settings(**chosen)


def own_settings(family: Family, given: Any) -> dict[str, Any]:
  """Checks the sampling settings that a checkpoint sets, as JSON holds them.

  Raises:
    UserError: no section, a setting that the family does not have, or a value out of its range; null is one.
  """
  if not isinstance(given, dict):
    raise UserError(f"sampling={shown(given)} must be a section")
  for name, value in given.items():
    if value is None:
      raise UserError(f"sampling.{_name(name)}=null must be a value: leave it out for the default")
  try:
    settings(family, given)
  except UserError as error:
    raise UserError(f"sampling.{error}") from None
  return dict(given)


def _name(name: str) -> str:
  return shown(name)[1:-1]
