"""The pairs of a run: a prompt, a better picture and a worse one; those of a step are a function of the step."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jflow import registry
from jflow.config import RunConfig
from jflow.data import images
from jflow.data.images import ImageError
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.rl import prompts
from jflow.rl.prompts import Asked, Prompts

FILE = "pairs.jsonl"
# Name -> function(section data.shapes as a mapping) -> (prompt, {"better": picture, "worse": picture}) pairs.
BUILT_IN = {"shapes": "jflow.world.prompts:pairs"}
_CHECKED = 16  # pixels a side of a picture that is only tried


class Compared(NamedTuple):
  """The pairs of a step."""

  asked: Asked
  better: np.ndarray  # uint8[I, H, W, 3]
  worse: np.ndarray  # uint8[I, H, W, 3]


def read(named: str, shapes: Mapping[str, Any]) -> list[prompts.Prompt]:
  """The pairs that `rl.pairs` names: prompts, each with its two pictures under "better" and "worse".

  Raises:
    UserError: DIR/pairs.jsonl cannot be read, or a line of it names no picture that is there and can be decoded.
  """
  if named in BUILT_IN:
    return registry.load(BUILT_IN[named])(shapes)
  folder, out = pathlib.Path(named), []
  for text, row in prompts.lines("rl.pairs", folder / FILE):
    found = {}
    for name in ("better", "worse"):
      file = row.get(name)
      if not isinstance(file, str) or not _below(file) or not (folder / file).is_file():
        raise UserError(
          f"rl.pairs: {folder / FILE} must name a file of the folder as {name!r} of {text[:60]!r}, got {file!r}"
        )
      found[name] = folder / file
      decoded(found[name], _CHECKED)
    out.append((text, found))
  return out


class Pairs(Prompts):
  """The data of a run of preferences."""

  def __init__(self, config: RunConfig, read: Sequence[prompts.Prompt], tokenizer: Tokenizer, share: Sequence[int]):
    """See `Prompts`."""
    super().__init__(config, read, tokenizer, share, group=1, named=config.rl.pairs)
    self._size = config.model.image_size

  def batch_of_pairs(self, step: int) -> Compared:
    """This host's share of a step's pairs; of a picture its central square."""
    asked = self.batch(step)
    pictures = ([decoded(self.metadata[n][name], self._size) for n in asked.number] for name in ("better", "worse"))
    return Compared(asked, *map(np.stack, pictures))

  def report(self) -> list[str]:
    """One line on the pairs."""
    return [f"pairs {self._named}: {len(self.texts):,}; a step takes {self._batch:,}"]

  def batches(self, start_step: int, stop_step: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """See `Prompts.batches`."""
    for step, (_, info) in zip(range(start_step, stop_step), super().batches(start_step, stop_step)):
      yield self.batch_of_pairs(step), info


def _below(file: str) -> bool:
  """Whether a path stays in its folder, so that a folder that is copied is whole."""
  path = pathlib.PurePath(file)
  return not path.is_absolute() and ".." not in path.parts


def decoded(picture: Any, size: int) -> np.ndarray:
  """The central square of a picture (a path, or what `images.for_generation` takes), uint8[size, size, 3].

  Raises:
    UserError: it cannot be read.
  """
  try:
    content = picture.read_bytes() if isinstance(picture, pathlib.Path) else picture
    return images.for_generation(content, size, np.random.default_rng(0), "center")
  except (ImageError, OSError) as error:
    raise UserError(f"rl.pairs: {picture} cannot be used: {error}") from error
