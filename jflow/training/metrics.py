"""Metrics of a run: one JSON object per step in metrics.jsonl."""

import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from jflow import files, progress
from jflow.errors import Stopped, UserError
from jflow.interop import steps
from jflow.strict_json import Malformed, parse

FILE = "metrics.jsonl"
Row = dict[str, Any]


class _Read(NamedTuple):
  """The contents of a file of JSON lines."""

  rows: list[tuple[bytes, Row]]  # text and content of each sound line
  damaged: list[tuple[int, str]]  # number of each other line, from 1, and what is wrong


def wrong_metrics(row: Row) -> str | None:
  """Returns what is wrong with a line of metrics.jsonl; None for a sound one."""
  step = row.get("step")
  if isinstance(step, bool) or not isinstance(step, int) or not 0 < step < 2**31:
    return f"step must be a positive integer, got {str(step)[:20]!r}"
  loss = row.get("loss")
  if isinstance(loss, bool) or not isinstance(loss, (int, float, type(None))):
    return f"loss must be a number or null, got {str(loss)[:20]!r}"
  return None


def read_metrics(workdir: pathlib.Path) -> list[Row]:
  """Returns the lines of a run's metrics.jsonl, each step once (its last line); see `read_lines`."""
  return _unique(read_lines(workdir / FILE, wrong_metrics))


def read_lines(path: pathlib.Path, wrong: Callable[[Row], str | None] | None = None) -> list[Row]:
  """Reads a file of JSON lines, each an object; a missing file has none.

  Damaged lines are left out and reported on stderr; an incomplete last line, which a kill leaves, is left out silently.

  Args:
    path: the file.
    wrong: returns what is wrong with the content of a line; None for a sound one.

  Raises:
    UserError: the file cannot be read.
  """
  read = _read(path, wrong)
  if read.damaged:
    print(f"jflow: {path}: {_said(read.damaged)}; left out", file=sys.stderr)
  return [row for _, row in read.rows]


def _unique(rows: list[Row]) -> list[Row]:
  """Each step once: its last line, in the order of the file."""
  last = {row["step"]: number for number, row in enumerate(rows)}
  return [rows[number] for number in sorted(last.values())]


def _read(path: pathlib.Path, wrong: Callable[[Row], str | None] | None) -> _Read:
  try:
    content = files.read_bytes(path)
  except FileNotFoundError:
    return _Read([], [])
  except Malformed as error:
    raise UserError(f"{path}: {error}: move it away") from error
  read = _Read([], [])
  lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
  for number, line in enumerate(lines, 1):
    text = line.strip(b"\0 \t\r")  # a power cut may leave NUL bytes around a line
    ended, problem = number < len(lines), None
    if not text:
      problem = "it holds NUL bytes alone" if ended and b"\0" in line else None
    else:
      try:
        row = parse(text)
        problem = _problem(row, wrong)
        if not problem:
          read.rows.append((text, row))
      except Malformed as error:
        problem = str(error) if ended else None
    if problem:
      read.damaged.append((number, problem))
  return read


def _problem(row: Any, wrong: Callable[[Row], str | None] | None) -> str | None:
  if not isinstance(row, dict):
    return f"it holds a {type(row).__name__} instead of an object"
  return wrong(row) if wrong else None


def _said(damaged: list[tuple[int, str]]) -> str:
  (number, why), more = damaged[0], len(damaged) - 1
  return f"line {number} is damaged ({why})" + (f", and {more} more" if more else "")


def amend(workdir: pathlib.Path, step: int, values: Row) -> None:
  """Adds values to the line of a step of metrics.jsonl, if there is one; `Lines` has mended the file, and is closed."""
  rows = _read(workdir / FILE, wrong_metrics).rows
  lines = [json.dumps(row | values).encode() if row["step"] == step else line for line, row in rows]
  files.write_bytes(workdir / FILE, b"".join(line + b"\n" for line in lines))


class Lines:
  """A file of JSON lines to append to, each line atomically. Floats parse back to the same float32."""

  def __init__(
    self,
    path: pathlib.Path,
    before: int | None = None,
    wrong: Callable[[Row], str | None] | None = None,
    keep_dropped: bool = False,
  ):
    """Opens the file, or creates it. A copy of one with damaged lines is kept beside it.

    Args:
      path: the file.
      before: for metrics: drops the lines of this step and later ones, which will be computed again, and duplicate
        steps.
      wrong: for another file: see `read_lines`.
      keep_dropped: keeps a copy of the file if `before` drops any line.

    Raises:
      UserError: an existing file cannot be read.
      OSError: it cannot be written.
    """
    wrong = wrong_metrics if before is not None else wrong
    read = _read(path, wrong)
    rows = read.rows
    if before is not None:
      last = {row["step"]: number for number, (_, row) in enumerate(rows)}
      rows = [rows[number] for number in sorted(last.values()) if rows[number][1]["step"] < before]
    if read.damaged:
      copy = files.keep_copy(path, "damaged")
      print(f"jflow: {path}: {_said(read.damaged)}; left out, and kept in {copy.name}", file=sys.stderr)
    elif keep_dropped and any(row["step"] >= before for _, row in read.rows):
      copy = files.keep_copy(path, "replaced")
      print(f"jflow: {path}: steps from {before} on are computed again, and kept in {copy.name}", file=sys.stderr)
    files.write_bytes(path, b"".join(line + b"\n" for line, _ in rows))
    self.rows = len(rows)
    self._path, self._file = path, os.open(path, os.O_WRONLY | os.O_APPEND)

  def write(self, row: dict[str, Any]) -> None:
    """Appends a line.

    Raises:
      Stopped: it cannot be written, as on a full disk.
    """
    line = (json.dumps(row) + "\n").encode()
    try:
      written = os.write(self._file, line)
    except OSError as error:
      raise Stopped(f"{self._path} cannot be written: {error.strerror}; the checkpoints are as they were") from error
    if written != len(line):
      raise Stopped(f"{self._path} cannot be written: the disk is full; the checkpoints are as they were")

  def sync(self) -> None:
    """Waits until the lines are on the disk, so that no checkpoint is newer than they are."""
    os.fsync(self._file)

  def close(self) -> None:
    os.close(self._file)


def resumed(workdir: pathlib.Path, first: int) -> Lines:
  """Opens the metrics of a run after step `first`, on process 0; where a later checkpoint was skipped, a copy is
  kept."""
  later = any(step > first for step in steps.steps_of(workdir / "checkpoints"))
  lines = Lines(workdir / FILE, first + 1, keep_dropped=later)
  if first and not lines.rows:
    progress.say(f"{workdir / FILE} has no line of the steps up to {first}: it begins with the next")
  return lines


def number(x: Any) -> float | int | None:
  """Converts a device scalar to a JSON number; one that is not finite becomes null, since JSON cannot hold it."""
  x = np.asarray(x)
  if np.issubdtype(x.dtype, np.integer):
    return int(x)
  return float(x) if np.isfinite(x) else None


class Rejected:
  """The first records that a process leaves out, named on stderr, each once; the others are only counted."""

  _MOST = 20

  def __init__(self) -> None:
    self._named: set[str] = set()

  def name(self, place: str, messages: Iterable[str]) -> None:
    """Names those of a place, such as a step."""
    for message in messages:
      if message not in self._named and len(self._named) < self._MOST:
        self._named.add(message)
        print(f"jflow: {place}: left out {message}", file=sys.stderr, flush=True)
