"""Filters of `prepare`, which drop sound records. Drops are counted separately from rejected records."""

import contextlib
import inspect
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jflow import files, registry
from jflow.data.duplicates import Rule
from jflow.data.records import Record
from jflow.errors import UserError, one_line

# Names of the aesthetic score in metadata, in lower case.
AESTHETIC = ("aesthetic", "aesthetic_score", "aesthetics_score", "aesthetic_score_laion_v2", "aesthetic_v2")

_COMPARED: dict[str, Callable[[Any, Any], bool]] = {
  "<=": operator.le,
  ">=": operator.ge,
  "==": operator.eq,
  "!=": operator.ne,
  "<": operator.lt,
  ">": operator.gt,
}
_COUNTED: dict[str, Callable[[Record], int]] = {  # of a record's texts, where its metadata have no such name
  "words": lambda record: sum(len(text.split()) for text in _texts(record)),
  "characters": lambda record: sum(map(len, _texts(record))),
}


class Condition(NamedTuple):
  """A condition on the metadata of a record, as `pwatermark<0.5` or `language==en`."""

  text: str
  column: str
  sign: str
  value: float | str

  @classmethod
  def parse(cls, text: str) -> "Condition":
    """Reads a condition.

    Raises:
      UserError: it is none.
    """
    found = re.fullmatch(r"\s*([^<>=!]+?)\s*(<=|>=|==|!=|<|>)\s*([^<>=!].*?)\s*", text)
    try:
      if not found:
        raise ValueError
      column, sign, value = found.groups()
      if sign not in ("==", "!=") and not math.isfinite(value := float(value)):
        raise ValueError
      return cls(text, column, sign, value)
    except ValueError:
      raise UserError(
        f"--keep={text!r} must be COLUMN, one of {' '.join(_COMPARED)}, and a number, as pwatermark<0.5, or with == and "
        "!= a text, as language==en"
      ) from None

  def drops(self, record: Record, meta: Mapping[str, Any]) -> str | None:
    """Returns the condition where a record does not meet it, "no_COLUMN" where it has no such value; else None."""
    name = self.column.lower()
    value = next((value for key, value in meta.items() if key.lower() == name), None)
    if value is None and name in _COUNTED:
      value = _COUNTED[name](record)
    if value is None:
      return f"no_{self.column}"
    if isinstance(value, bool) and str(self.value).lower() in ("true", "false"):
      return None if _COMPARED[self.sign](str(value).lower(), str(self.value).lower()) else self.text
    if isinstance(self.value, str) and isinstance(value, str):
      return None if _COMPARED[self.sign](value, self.value) else self.text
    try:
      return None if _COMPARED[self.sign](float(value), float(self.value)) else self.text
    except (TypeError, ValueError, OverflowError):
      return f"no_{self.column}"


class Filters(NamedTuple):
  """Limits for every image of a record, and conditions on it; None: no limit."""

  min_size: int | None = None  # pixels of the shorter side
  max_aspect: float | None = None  # longer side over shorter
  min_aesthetic: float | None = None  # score in the record's metadata
  keep: tuple[str, ...] | None = None  # conditions; see `Condition`
  filter: tuple[str, ...] | None = None  # import paths of functions (record, metadata) -> whether it is wanted
  duplicates: str | None = None  # "exact" or "near": records that repeat an earlier one; see duplicates.py
  duplicates_of: str | None = None  # what must be repeated, of `duplicates.KINDS`; None: all of the record
  against: tuple[str, ...] | None = None  # prepared data sets whose records are earlier ones

  def check(self) -> None:
    """Checks conditions and functions.

    Raises:
      UserError: a condition is none, or a function cannot be imported.
    """
    if not self.duplicates and (self.duplicates_of or self.against):
      flag = "--duplicates_of" if self.duplicates_of else "--against"
      raise UserError(f"{flag} is for --duplicates=exact or near, which is not there")
    for text in self.keep or ():
      Condition.parse(text)
    for name in self.filter or ():
      _function(name)

  @property
  def rule(self) -> Rule | None:
    """The meaning of a duplicate; None where none is dropped."""
    return Rule(self.duplicates_of or "records", self.duplicates == "near") if self.duplicates else None

  def told(self) -> dict[str, Any]:
    """The limits that are set, as a JSON value."""
    return {
      name: list(value) if isinstance(value, tuple) else value
      for name, value in self._asdict().items()
      if value is not None
    }

  def sources(self) -> dict[str, str]:
    """The SHA-256 of the file of each user's function, by its name: another version of it may want other records."""
    out = {}
    for name in self.filter or ():
      with contextlib.suppress(TypeError, OSError):  # of a function without a file
        out[name] = files.sha256(inspect.getfile(inspect.unwrap(_function(name))))
    return out

  def drops(self, record: Record, sizes: Sequence[tuple[int, int]], meta: Mapping[str, Any]) -> str | None:
    """Returns the name of the filter that drops a record, or None.

    Args:
      record: with its images encoded.
      sizes: width and height of each image, in any order.
      meta: the metadata; a record without a score is dropped as "no_aesthetic_score".

    Raises:
      UserError: a user's function fails.
    """
    if self.min_aesthetic is not None:
      score = next((value for key, value in meta.items() if key.lower() in AESTHETIC), None)
      try:
        if not float(score) >= self.min_aesthetic:
          return "min_aesthetic"
      except (TypeError, ValueError, OverflowError):
        return "no_aesthetic_score"
    if self.min_size is not None and any(min(size) < self.min_size for size in sizes):
      return "min_size"
    if self.max_aspect is not None and any(max(size) > self.max_aspect * min(size) for size in sizes):
      return "max_aspect"
    for text in self.keep or ():
      if dropped := Condition.parse(text).drops(record, meta):
        return dropped
    return next((name for name in self.filter or () if not _wants(name, record, meta)), None)


def _function(name: str) -> Callable[..., Any]:
  """Returns the function that an import path names; raises UserError where there is none."""
  return registry.imported("--filter", name, "a function of a record and its metadata")


def _wants(name: str, record: Record, meta: Mapping[str, Any]) -> bool:
  function = _function(name)
  try:
    return bool(function(record, dict(meta)))
  except Exception as error:  # of the function: whatever it raises
    raise UserError(
      f"--filter={name} failed on record {record.id!r:.80}: {type(error).__name__}: {one_line(error)}"
    ) from error


def _texts(record: Record) -> list[str]:
  return [record.text, *(turn.text for turn in record.turns)]
