"""What painting benchmarks have to do with scorers outside: read their files strictly, print their commands whole."""

import json
import math
import pathlib
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jflow.errors import UserError
from jflow.evaluation.settings import Settings

GUIDANCE = (
  "The guidance with which the paper painted for this benchmark is not published (for its FID: w = 2): report several, "
  "--sweep_guidance=2,3,5,7.5 makes them."
)


def next_command(where: str, words: Sequence[Any], settings: Settings, **more: pathlib.Path) -> str:
  """What to run now, and then: two command lines to paste.

  Args:
    where: the first one runs.
    words: of the first one.
    settings: of this evaluation; the second command has them all.
    more: settings of the second one that read what the first one writes.
  """
  return f"Next, {where}:\n  {shlex.join(map(str, words))}\nthen:\n  {shlex.join(settings.command(**more))}"


def another_number(found: int, published: int, settings: Settings) -> list[str]:
  """A note where the data holds another number of prompts than the published benchmark, and no --limit says why."""
  if found == published or settings.limit is not None:
    return []
  return [f"The data holds {found:,} prompts, the published benchmark {published:,}: not comparable with the paper."]


def no_others(wanted: Collection[str], present: Collection[str], what: str, hint: str) -> None:
  """Raises a UserError with the number of samples that are not wanted, and the first of them."""
  known = set(wanted)
  others = [key for key in present if key not in known]
  if others:
    some = ", ".join(map(str, others[:3]))
    raise UserError(f"{what}: {len(others)} of {len(present)} samples are not of this evaluation ({some}...): {hint}")


def need_texts(row: Mapping[str, Any], fields: Collection[str], where: str) -> None:
  """Raises a UserError that names the first field which is no text, and where it stands."""
  for field in fields:
    if not isinstance(row[field], str):
      raise UserError(f"{where} has {field}={row[field]!r:.60}, which is no text")


def number_of(text: str, most: float, where: str) -> float:
  """A number from 0 to `most`, or a UserError that says `where` none stands."""
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
  """`data` if it is a file, else the first of `names` in it; a UserError says what to download."""
  for path in (data, *(data / name for name in names)):
    if path.is_file():
      return path
  raise UserError(f"{data / names[0]} does not exist: {where}")


def rows_of(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """("FILE, line N,", object) of a file with a JSON object on each line."""
  for number, line in enumerate(text_of(path).split("\n"), 1):
    if line.strip():
      yield f"{path}, line {number},", object_of(line, f"{path}, line {number},")


def object_of(text: str, where: str) -> dict[str, Any]:
  """A JSON object, or a UserError that says `where` none stands."""
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f"{where} is no JSON: {error}") from None
  if not isinstance(value, dict):
    raise UserError(f"{where} is no JSON object, but {value!r:.60}")
  return value


def text_of(path: pathlib.Path) -> str:
  """A file of UTF-8, without a byte order mark, or a UserError that names the file and the line that is none."""
  try:
    data = path.read_bytes()
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}") from None
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise UserError(f"{path}, line {data[: error.start].count(10) + 1}, is not UTF-8: save the file as UTF-8") from None
