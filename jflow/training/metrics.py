"""Metrics of a run: one JSON object per step in metrics.jsonl, and a progress bar."""

import json
import os
import pathlib
import sys
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from jflow.errors import Stopped
from jflow.training.checkpoint import write_atomically


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads a file of JSON lines; a last line that a kill has cut is left out."""
  if not path.exists():
    return []
  rows = []
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      rows.append(json.loads(line))
    except ValueError:
      break
  return rows


class Lines:
  """A file of JSON lines that is appended to, each line whole or not at all. Floats parse back to the same float32."""

  def __init__(self, path: pathlib.Path, before: int | None = None):
    """`before`: drops lines whose step is not below it: they are about to be computed again."""
    rows = read_lines(path)  # a line that a kill has cut ends here
    kept = [row for row in rows if before is None or row["step"] < before]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
    self._path, self._file = path, os.open(path, os.O_WRONLY | os.O_APPEND)

  def write(self, row: dict[str, Any]) -> None:
    """Appends a line.

    Raises:
      Stopped: the disk does not take it.
    """
    line = (json.dumps(row) + "\n").encode()
    try:
      written = os.write(self._file, line)
    except OSError as error:
      raise Stopped(
        f"{self._path} cannot be written: {error.strerror}; the checkpoints are as they were"
      ) from error
    if written != len(line):
      raise Stopped(f"{self._path} cannot be written: the disk is full; the checkpoints are as they were")

  def sync(self) -> None:
    """Waits until the lines are on the disk, so that no checkpoint is ahead of them."""
    os.fsync(self._file)

  def close(self) -> None:
    os.close(self._file)


def number(x: Any) -> float | int | None:
  """A device scalar as a JSON number; what is not finite becomes null, since JSON has no name for it."""
  x = np.asarray(x)
  if np.issubdtype(x.dtype, np.integer):
    return int(x)
  return float(x) if np.isfinite(x) else None


class Progress:
  """A bar with losses, tokens/s and time left on a terminal; a plain line now and then elsewhere."""

  def __init__(self, total: int, first: int, every_seconds: float, shown: bool = True):
    """`first`: steps done before; `shown`: False on all processes of a run but one."""
    terminal = sys.stderr.isatty()
    self._bar = tqdm(
      total=total, initial=first, unit="step", dynamic_ncols=True, disable=not (shown and terminal)
    )
    self._total, self._every, self._plain = total, every_seconds, shown and not terminal
    self._started, self._next = time.monotonic(), 0.0
    self._first: int | None = None

  def update(self, row: dict[str, Any]) -> None:
    names = {"loss": "loss", "loss_text": "text", "loss_flow": "flow", "loss_alignment": "align"}
    parts = {short: f"{row[name]:.3f}" for name, short in names.items() if row.get(name) is not None}
    parts["tok/s"] = f"{row['tokens_per_second']:,.0f}"
    self._bar.set_postfix(parts, refresh=False)
    self._bar.update()
    now, step = time.monotonic(), row["step"]
    if self._first is None:  # the first step compiles: it says nothing about the time of the others
      text = f"compiled in {(now - self._started) / 60:.1f} min"
      self._started, self._first = now, step
      self._bar.initial, self._bar.start_t = step, time.time()
    else:
      text = f"left {(now - self._started) / (step - self._first) * (self._total - step) / 60:.1f} min"
    if self._plain and (now >= self._next or step == self._total):
      self._next = now + self._every
      losses = " ".join(f"{k} {v}" for k, v in parts.items())
      print(f"step {step}/{self._total} {losses} {text}", file=sys.stderr, flush=True)

  def close(self) -> None:
    self._bar.close()
