"""The parts that fuzzers share: the pieces of the layouts of `fuzz_importers`, and ways to spoil values."""

import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Layout(NamedTuple):
  """How a format holds records, and how one of them is spoiled."""

  format: str
  task: str
  sound: Callable[[int], Any]  # number -> a record that holds `mark(number)`
  spoil: Callable[[random.Random, Any], Any]  # a sound record -> one that may be unusable
  write: Callable[[pathlib.Path, list[Any]], pathlib.Path]  # folder, records -> the input
  options: dict[str, Any] = {}
  exact: bool = True  # whether a spoiled record is still one record


def mark(number: int) -> str:
  """A text that no other record holds."""
  return f"Sound {number:04d}."


def places(value: Any) -> Iterator[tuple[Any, Any]]:
  """Yields (list or object, index or key) of every value in a value."""
  items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  for key, inner in list(items):
    yield value, key
    yield from places(inner)


def spoil_bytes(rng: random.Random, data: bytes) -> bytes:
  """Returns bytes of which some were changed, left out, put in, doubled or cut off."""
  changed = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 8))):
    at = rng.randrange(len(changed) + 1)
    length = rng.choice((1, 1, 2, 16, 400))
    change = rng.randrange(6)
    if change == 0 and at < len(changed):
      changed[at] ^= 1 << rng.randrange(8)
    elif change == 1:
      del changed[at : at + length]
    elif change == 2:
      changed[at:at] = rng.randbytes(length)
    elif change == 3:
      changed[at:at] = changed[at : at + length]
    elif change == 4:
      del changed[at:]
    else:
      changed[at : at + length] = bytes([rng.randrange(256)]) * length
  return bytes(changed)
