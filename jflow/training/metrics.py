"""Metrics of a run: one JSON object per step in metrics.jsonl, and a progress bar."""

import json
import pathlib
import sys
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from jflow.training.checkpoint import write_atomically


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads metrics.jsonl; a last line that a kill has cut is left out."""
  if not path.exists():
    return []
  rows = []
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      rows.append(json.loads(line))
    except ValueError:
      break
  return rows


class MetricsFile:
  """Appends one line per step. Losses are written so that they parse back to the same float32."""

  def __init__(self, path: pathlib.Path, first_step: int):
    """Drops lines of `first_step` and later: they are about to be computed again."""
    kept = [row for row in read_metrics(path) if row["step"] < first_step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
    self._file = open(path, "a", encoding="utf-8")

  def write(self, row: dict[str, Any]) -> None:
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()

  def close(self) -> None:
    self._file.close()


def number(x: Any) -> float | int | None:
  """A device scalar as a JSON number; what is not finite becomes null, since JSON has no name for it."""
  x = np.asarray(x)
  if np.issubdtype(x.dtype, np.integer):
    return int(x)
  return float(x) if np.isfinite(x) else None


class Progress:
  """A bar with losses, tokens/s and time left on a terminal; a plain line now and then elsewhere."""

  def __init__(self, total: int, first: int, every_seconds: float):
    self._bar = tqdm(
      total=total, initial=first, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
    )
    self._total, self._every = total, every_seconds
    self._started, self._first, self._next = time.monotonic(), first, 0.0

  def update(self, row: dict[str, Any]) -> None:
    names = {"loss": "loss", "loss_text": "text", "loss_flow": "flow", "loss_alignment": "align"}
    parts = {short: f"{row[name]:.3f}" for name, short in names.items() if row.get(name) is not None}
    parts["tok/s"] = f"{row['tokens_per_second']:,.0f}"
    self._bar.set_postfix(parts, refresh=False)
    self._bar.update()
    elapsed = time.monotonic() - self._started
    if self._bar.disable and (elapsed >= self._next or row["step"] == self._total):
      self._next = elapsed + self._every
      left = elapsed / (row["step"] - self._first) * (self._total - row["step"])
      text = " ".join(f"{k} {v}" for k, v in parts.items())
      print(f"step {row['step']}/{self._total} {text} left {left / 60:.1f} min", file=sys.stderr, flush=True)

  def close(self) -> None:
    self._bar.close()
