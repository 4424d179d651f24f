"""External scorers of image benchmarks: strict reading of their files, and complete commands to run them."""

import json
import math
import pathlib
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jflow.errors import UserError
from jflow.evaluation.settings import Settings

_GUIDANCE = {
  "flow": "The guidance with which the paper painted for this benchmark is not published (for its FID: w = 2): report "
  "several, --sweep_guidance=2,3,5,7.5 makes them.",
  "codes": "The papers paint with w = 5 and publish no other setting for this benchmark: report several, "
  "--sweep_guidance=2,3,5,7.5 makes them.",
}


def guidance_of(writes: str) -> list[str]:
  """A note on the guidance of the paper's own pictures, for a way to write images that has a paper."""
  return [_GUIDANCE[writes]] if writes in _GUIDANCE else []


def next_command(where: str, words: Sequence[Any], settings: Settings, **more: pathlib.Path) -> str:
  """A note with two command lines to paste: the scorer's, and the evaluation that reads its output.

  Args:
    where: the scorer runs, in words.
    words: of the scorer's command.
    settings: of this evaluation; the second command repeats them.
    more: settings of the second command that name the scorer's output.
  """
  return f"Next, {where}:\n  {shlex.join(map(str, words))}\nthen:\n  {shlex.join(settings.command(**more))}"


def another_number(found: int, published: int, settings: Settings) -> list[str]:
  """A note where the data has another number of prompts than the published benchmark, unless --limit is given."""
  if found == published or settings.limit is not None:
    return []
  return [f"The data holds {found:,} prompts, the published benchmark {published:,}: not comparable with the paper."]


def no_others(wanted: Collection[str], present: Collection[str], what: str, hint: str) -> None:
  """Raises a UserError with the number of unexpected samples and the first of them."""
  known = set(wanted)
  others = [key for key in present if key not in known]
  if others:
    some = ", ".join(map(str, others[:3]))
    raise UserError(f"{what}: {len(others)} of {len(present)} samples are not of this evaluation ({some}...): {hint}")


def need_texts(row: Mapping[str, Any], fields: Collection[str], where: str) -> None:
  """Raises a UserError that names the first field that is not a string, and its place."""
  for field in fields:
    if not isinstance(row[field], str):
      raise UserError(f"{where} has {field}={row[field]!r:.60}, which must be a text")


def number_of(text: str, most: float, where: str) -> float:
  """Parses a number from 0 to `most`; a UserError names its place, `where`."""
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not 0 <= value <= most + 1e-9:
    raise UserError(
      f"{where} has {text!r:.60} where a number from 0 to {most} should stand: give what --res-path "
      "named (not its _detail.txt)"
    )
  return value


def find(data: pathlib.Path, names: Sequence[str], where: str) -> pathlib.Path:
  """`data` if it is a file, else the first of `names` that exists in it; a UserError says what to download."""
  for path in (data, *(data / name for name in names)):
    if path.is_file():
      return path
  raise UserError(f"{data / names[0]} does not exist: {where}")


def rows_of(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields ("FILE, line N,", object) for each line of a JSON lines file."""
  for number, line in enumerate(text_of(path).split("\n"), 1):
    if line.strip():
      yield f"{path}, line {number},", object_of(line, f"{path}, line {number},")


def object_of(text: str, where: str) -> dict[str, Any]:
  """Parses a JSON object; a UserError names its place, `where`."""
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f"{where} must be JSON: {error}") from None
  if not isinstance(value, dict):
    raise UserError(f"{where} must be a JSON object, got {value!r:.60}")
  return value


def text_of(path: pathlib.Path) -> str:
  """The text of a UTF-8 file, without a byte order mark; a UserError names the file and the line that is not UTF-8."""
  try:
    data = path.read_bytes()
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}") from None
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise UserError(f"{path}, line {data[: error.start].count(10) + 1}, is not UTF-8: save the file as UTF-8") from None
