"""Strict JSON for untrusted files: bounded in bytes, depth and numbers, and nothing that parsers read differently."""

import json
import math
import pathlib
import reprlib
import stat
from typing import Any

from jflow import git_lfs
from jflow.errors import UserError, one_line

MOST_BYTES = 16 * 2**20  # a config.json has some KB, the index of the largest published models 10 MB
_DEEPEST = 64  # levels
_DIGITS = 40  # of a whole number; tokenizer_config.json writes 10**30 for "no limit"

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxdict = _short.maxlist = _short.maxtuple = 8


class Malformed(ValueError):
  """Text that is not JSON, or not within the bounds; the message says why, and names the key where there is one."""


class _Refused:
  """Placeholder of a refused number, until the object that holds it is parsed and its key is known."""

  def __init__(self, what: str):
    self.what = what


def shown(value: Any) -> str:
  """Formats a value of any size for a message, as one short line."""
  try:
    text = _short.repr(value)
  except (ValueError, RecursionError):  # a whole number of more digits than Python writes
    text = f"a {type(value).__name__} too large to show"
  text = " ".join(text.split())
  return text if len(text) <= 160 else text[:157] + "..."


def _whole(text: str) -> Any:
  digits = len(text.lstrip("-"))
  return int(text) if digits <= _DIGITS else _Refused(f"a whole number of {digits} digits")


def _fraction(text: str) -> Any:
  value = float(text)
  return value if math.isfinite(value) else _Refused(f"{text[:20]}, which no float64 holds")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) != len(pairs):
    seen: set[str] = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))
    raise Malformed(f"the key {shown(twice)} occurs twice")
  for key, value in pairs:
    if isinstance(value, _Refused):
      raise Malformed(f"{' '.join(key.split())[:60]} is {value.what}")
  return values


def _check_depth(value: Any) -> None:
  level = [value]
  for _ in range(_DEEPEST):
    if any(isinstance(x, _Refused) for x in level):
      raise Malformed(f"a list holds {next(x for x in level if isinstance(x, _Refused)).what}")
    nested = (x for x in level if isinstance(x, (dict, list)) and x)
    level = [y for x in nested for y in (x.values() if isinstance(x, dict) else x)]
    if not level:
      return
  raise Malformed(f"it is nested more than {_DEEPEST} levels deep")


def parse(content: bytes) -> Any:
  """Parses JSON text in UTF-8.

  Raises:
    Malformed: not JSON, a duplicate key, a number that is not finite or too long, too many levels.
  """
  if git_lfs.is_pointer(content):
    raise Malformed("it is a git-lfs pointer, not the file: run `git lfs pull` in its folder")
  if content.startswith(b"\xef\xbb\xbf"):
    raise Malformed("it begins with a byte order mark: save it as UTF-8 without one")
  try:
    value = json.loads(
      content.decode("utf-8"),
      object_pairs_hook=_object,
      parse_int=_whole,
      parse_float=_fraction,
      parse_constant=lambda name: _Refused(f"{name}, which is not a JSON number"),
    )
  except Malformed:
    raise
  except UnicodeDecodeError:
    raise Malformed("it is not UTF-8 text") from None
  except RecursionError:
    raise Malformed(f"it is nested more than {_DEEPEST} levels deep") from None
  except ValueError as error:
    raise Malformed(one_line(error)) from None
  _check_depth(value)
  return value


def read_bytes(path: str | pathlib.Path, most: int = MOST_BYTES) -> bytes:
  """Returns the content of a file of at most `most` bytes.

  Raises:
    UserError: it is missing, not a regular file, too large, or cannot be read.
  """
  try:
    found = pathlib.Path(path).stat()
    if not stat.S_ISREG(found.st_mode):
      raise UserError(f"{path} must be a file, and it is a {'directory' if stat.S_ISDIR(found.st_mode) else 'device'}")
    if found.st_size > most:
      raise UserError(f"{path} has {found.st_size:,} bytes, and such a file has at most {most:,}: another file?")
    with open(path, "rb") as file:
      content = file.read(most + 1)
  except FileNotFoundError:
    raise UserError(f"{path} not found") from None
  except (OSError, ValueError) as error:  # ValueError: a NUL in the name
    raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
  if len(content) > most:
    raise UserError(f"{path} has more than {most:,} bytes: another file?")
  return content


def read(path: str | pathlib.Path, most: int = MOST_BYTES) -> Any:
  """Returns the value in a JSON file.

  Raises:
    UserError: see `read_bytes` and `parse`; the message names the file.
  """
  content = read_bytes(path, most)
  try:
    return parse(content)
  except Malformed as error:
    raise UserError(f"{path} cannot be read: {error}") from None


def read_object(path: str | pathlib.Path, most: int = MOST_BYTES) -> dict[str, Any]:
  """Returns the object in a JSON file.

  Raises:
    UserError: see `read`; also if it holds something else.
  """
  value = read(path, most)
  if not isinstance(value, dict):
    raise UserError(f"{path} must hold a JSON object")
  return value
