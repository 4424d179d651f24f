"""The progress of long work: its share, items per second, time left."""

import sys
import time
from typing import Any

from tqdm import tqdm

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {postfix} [{elapsed}, {remaining} left]"
_LINE_SECONDS = 30.0  # between lines where there is no terminal


class Progress:
  """A bar on a terminal, a line now and then elsewhere."""

  def __init__(self, total: int, done: int, name: str = "prepare", unit: str = "records", delay: float = 0.0):
    """Starts at `done` of `total`, in items or bytes.

    Args:
      total, done: of the work.
      name: what is done, before every line.
      unit: of the items whose rate is shown.
      delay: seconds before there is a bar, for work that is mostly short.
    """
    self._name, self._unit = name, unit
    self._terminal = sys.stderr.isatty()
    self._bar = tqdm(total=total, initial=done, desc=name, bar_format=_FORMAT, delay=delay, disable=not self._terminal)
    self._total, self._begun = total, done
    self._work = self._records = 0
    self._start = self._shown = time.monotonic()

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_: Any) -> None:
    self._print(time.monotonic())
    self._bar.close()

  def add(self, work: int) -> None:
    """Counts a record and its work."""
    self.show(self._work + work, self._records + 1)

  def count(self, items: int) -> None:
    """Counts items that are each one unit of the work."""
    self.show(self._work + items, self._records + items)

  def show(self, work: int, records: int) -> None:
    """Sets the work and the records done since the start."""
    self._work, self._records = work, records
    now = time.monotonic()
    if now - self._shown > (0.2 if self._terminal else _LINE_SECONDS):
      self._print(now)

  def _print(self, now: float) -> None:
    self._shown = now
    rate = self._records / max(now - self._start, 1e-3)
    text = f"{self._records:,} {self._unit}, {rate:,.0f}/s"
    if self._terminal:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(self._begun + self._work - self._bar.n)
    elif now - self._start > _LINE_SECONDS:
      left = (self._total - self._begun - self._work) * (now - self._start) / max(self._work, 1)
      share = (self._begun + self._work) / max(self._total, 1)
      print(f"{self._name}: {share:.0%}, {text}, {left:,.0f} s left", file=sys.stderr, flush=True)
