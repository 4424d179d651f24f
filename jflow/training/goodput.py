"""The time of a run by phase, over all its starts: goodput.jsonl, with a line at each change of phase.

A line {"t", "phase", "step"} books the time since the line before. So the phases always add up to the whole, and a kill
loses only the phase in progress.

  setup, restore, compile, save   compile includes the first step; save is the time that the loop waits
  sample                          generating sample images
  validate                        the losses of held-out records
  steps                           training, up to `step`
  down                            from the last line of a start that was killed to the next start
"""

import json
import pathlib
import time
from typing import Any

from jflow import files
from jflow.training.metrics import Lines, read_lines

FILE = "goodput.jsonl"
_PHASES = ("setup", "restore", "compile", "save", "sample", "validate", "steps", "down")


class Goodput:
  """The writer of one start's record. Steps are booked at most once a second."""

  def __init__(self, workdir: pathlib.Path, started: float):
    """`started`: `time.time()` when the process began; the time up to its first line is setup."""
    self._workdir, self._lines = workdir, Lines(workdir / FILE, wrong=_wrong)
    self._write("down", None, started)
    self._written = started

  def mark(self, phase: str, step: int | None = None, at: float | None = None) -> None:
    """Books the time since the last mark, up to `at` (`time.time()`) or now."""
    self._write(phase, step, time.time() if at is None else at)

  def steps(self, step: int, now: bool = False) -> None:
    """Books training up to `step`, if a second has passed or `now`."""
    if now or time.time() - self._written > 1.0:
      self.mark("steps", step)

  def _write(self, phase: str, step: int | None, at: float) -> None:
    self._written = at
    self._lines.write({"t": at, "phase": phase, "step": step})

  def write_summary(self) -> None:
    """Writes goodput.json: `summary`, rounded to a tenth of a millisecond."""
    rounded = {name: round(value, 4) for name, value in summary(self._workdir).items()}
    files.write_text(self._workdir / "goodput.json", json.dumps(rounded) + "\n")

  def close(self) -> None:
    self._lines.close()


def _wrong(row: dict[str, Any]) -> str | None:
  """Returns what is wrong with a line; None for a sound one."""
  when, phase, step = row.get("t"), row.get("phase"), row.get("step")
  if isinstance(when, bool) or not isinstance(when, (int, float)) or not 0 <= when < 1e12:
    return "t must be a time"
  if phase not in _PHASES:
    return f"phase must be one of {', '.join(_PHASES)}"
  if isinstance(step, bool) or not isinstance(step, int if phase == "steps" else (int, type(None))):
    return "step must be an integer"
  return None


def summary(workdir: pathlib.Path) -> dict[str, float]:
  """Returns the seconds of each phase over all starts.

  Returns:
    productive, save, restore, compile, setup, sample, validate, lost (steps that were computed again, and the time
    between a kill and the next start), wall (their sum), starts, and goodput = productive / wall.
  """
  out = dict.fromkeys(("productive", "save", "restore", "compile", "setup", "sample", "validate", "lost"), 0.0)
  rows = read_lines(workdir / FILE, _wrong)
  done: list[tuple[int, float]] = []  # (last step, seconds) of each booked piece of training
  before = rows[0]["t"] if rows else 0.0
  for row in rows:
    seconds, before = max(row["t"] - before, 0.0), row["t"]
    if row["phase"] == "steps":
      done.append((row["step"], seconds))
    else:
      out["lost" if row["phase"] == "down" else row["phase"]] += seconds
    if row["phase"] == "restore" and row["step"] is not None:
      out["lost"] += sum(s for step, s in done if step > row["step"])
      done = [(step, s) for step, s in done if step <= row["step"]]
  out["productive"] = sum(seconds for _, seconds in done)
  wall = sum(out.values())
  starts = sum(row["phase"] == "down" for row in rows)
  return out | {"wall": wall, "starts": starts, "goodput": out["productive"] / wall if wall else 0.0}
