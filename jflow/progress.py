"""Progress bars: share, items per second and time left of long work; losses of a training run."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {postfix} [{elapsed}, {remaining} left]"
_LINE_SECONDS = 30.0  # between lines where there is no terminal


def say(message: str) -> None:
  """Prints one line on stderr, above the bar where there is one."""
  tqdm.write(f"jflow: {message}", file=sys.stderr)
  sys.stderr.flush()


class Progress:
  """A bar on a terminal, and an occasional line elsewhere."""

  def __init__(
    self,
    total: float,
    done: float = 0,
    name: str = "prepare",
    unit: str = "records",
    delay: float = 0.0,
    shown: bool = True,
  ):
    """Starts at `done` of `total`, in items or bytes.

    Args:
      total, done: of the work.
      name: of the work, at the start of every line.
      unit: of the items whose rate is shown.
      delay: seconds before there is a bar, for work that is mostly short.
      shown: False on all processes of a run but one.
    """
    self._name, self._unit, self._shown_at_all = name, unit, shown
    self._terminal = sys.stderr.isatty()
    drawn = shown and self._terminal
    self._bar = tqdm(total=total, initial=done, desc=name, bar_format=_FORMAT, delay=delay, disable=not drawn)
    self._total, self._begun = total, done
    self._work = self._records = 0
    self._start = self._shown = time.monotonic()

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def close(self) -> None:
    """Ends the bar."""
    self._print(time.monotonic())
    self._bar.close()

  def add(self, work: float) -> None:
    """Counts a record and its work."""
    self.show(self._work + work, self._records + 1)

  def count(self, items: float) -> None:
    """Counts items that are each one unit of the work."""
    self.show(self._work + items, self._records + items)

  def show(self, work: float, records: float) -> None:
    """Sets the work and the records done since the start."""
    self._work, self._records = work, records
    now = time.monotonic()
    if now - self._shown > (0.2 if self._terminal else _LINE_SECONDS):
      self._print(now)

  def _print(self, now: float) -> None:
    self._shown = now
    rate = self._records / max(now - self._start, 1e-3)
    text = f"{self._records:,.0f} {self._unit}, {rate:,.0f}/s"
    if self._terminal:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(self._begun + self._work - self._bar.n)
    elif self._shown_at_all and now - self._start > _LINE_SECONDS:
      left = (self._total - self._begun - self._work) * (now - self._start) / max(self._work, 1)
      share = (self._begun + self._work) / max(self._total, 1)
      print(f"{self._name}: {share:.0%}, {text}, {left:,.0f} s left", file=sys.stderr, flush=True)


class StepProgress:
  """Steps of a training run: a bar with losses, tokens/s and time left on a terminal; an occasional line elsewhere."""

  def __init__(self, total: int, first: int, every_seconds: float, shown: bool = True):
    """`first`: steps done before; `shown`: False on all processes of a run but one."""
    terminal = sys.stderr.isatty()
    self._bar = tqdm(total=total, initial=first, unit="step", dynamic_ncols=True, disable=not (shown and terminal))
    self._total, self._every, self._plain = total, every_seconds, shown and not terminal
    self._started, self._next = time.monotonic(), 0.0
    self._first: int | None = None
    self._held_out = ""  # the last loss of held-out records

  def update(self, row: Mapping[str, Any]) -> None:
    """Shows a step.

    Args:
      row: its metrics: "step", "tokens_per_second", "loss" and a "loss_NAME" for each objective, None where it is not
        computed; of reinforcement learning "reward" or "preferred".
    """
    shown = lambda name: name.startswith("loss") or name in ("reward", "preferred")
    losses = {name.removeprefix("loss_"): value for name, value in row.items() if shown(name)}
    parts = {name: f"{value:.3f}" for name, value in losses.items() if value is not None}
    if row.get("val_loss") is not None:
      self._held_out = f"{row['val_loss']:.3f} at {row['step']}"
    if self._held_out:
      parts["val"] = self._held_out
    parts["tok/s"] = f"{row['tokens_per_second']:,.0f}"
    self._bar.set_postfix(parts, refresh=False)
    self._bar.update()
    now, step = time.monotonic(), row["step"]
    if self._first is None:  # the first step compiles, so its time is not that of the others
      minutes = (now - self._started) / 60
      text = f"compiled in {minutes:.1f} min" if minutes >= 0.05 else ""
      self._started, self._first = now, step
      self._bar.initial, self._bar.start_t = step, time.time()
    else:
      text = f"left {(now - self._started) / (step - self._first) * (self._total - step) / 60:.1f} min"
    if self._plain and (now >= self._next or step == self._total):
      self._next = now + self._every
      losses = " ".join(f"{k} {v}" for k, v in parts.items())
      print(f"step {step}/{self._total} {losses} {text}".rstrip(), file=sys.stderr, flush=True)

  def close(self) -> None:
    """Ends the bar."""
    self._bar.close()
