"""bench data --plan: what it costs to plan the rows of many records, of realistic lengths."""

import multiprocessing
import os
import pathlib
import tempfile
import threading
from typing import Any, NamedTuple

import numpy as np

from jflow.batch import TASKS, RowShape
from jflow.data import packing
from jflow.data.store import groups, parts
from jflow.data.store.parts import Part

SHARD = 4096  # records, as `prepare` writes them


class Shards(NamedTuple):
  """The records of a prepared data set by number alone, in shards of equal size; as much of a `Source` as plans
  need."""

  records: int

  def __len__(self) -> int:
    return self.records

  @property
  def shard_lengths(self) -> list[int]:
    return [min(SHARD, self.records - first) for first in range(0, self.records, SHARD)]


class Drawn(groups.Wanted):
  """A plan of records whose lengths are drawn in place of measured."""

  def sizes(self, part: Part | None = None) -> Any:
    first, stop = part[:2] if part else (0, len(self.source))
    return realistic_lengths(self.task, stop - first, self.shape, first), {}

  @classmethod
  def of(cls, task: str, records: int, shape: RowShape, group_records: int) -> "Drawn":
    source: Any = Shards(records)
    none: Any = None
    return cls(source, task, none, "", shape, "", "", 0.0, "", group_records)

  def made(self, folder: str) -> tuple[packing.Plan, np.ndarray | None]:
    """Returns the plan and the first row of each of its groups, None for one group, as `plans.planned` makes them.

    `folder`: an empty one for a plan by groups, which is mapped from there.
    """
    if not self.group_records and len(self.source) <= parts.MOST_AT_ONCE:
      return self.plan()[0], None
    groups.write(self, folder, None)
    arrays = [np.load(os.path.join(folder, n + ".npy"), mmap_mode="r") for n in (*packing.Plan._fields, "groups")]
    return packing.Plan(*arrays[:-1]), arrays[-1]


def measure(records: int, shape: RowShape, group_records: int) -> dict[str, Any]:
  """Plans realistic lengths of each task as `train` would; returns CPU seconds, fill, and the peak memory.

  Args:
    records: of each task.
    shape: the row's budgets.
    group_records: of a group of shards at most; 0: as large as memory allows.
  """
  report = {}
  for task in TASKS:
    start, memory = _cpu_seconds(), _Memory()
    memory.start()
    with tempfile.TemporaryDirectory() as folder:
      plan, _ = Drawn.of(task, records, shape, group_records).made(folder)
      tokens = packing.tokens(plan)
    report[task] = {
      "cpu_seconds": _cpu_seconds() - start,
      "rows": plan.rows,
      "fill": tokens / max(plan.rows * shape.tokens, 1),
      "peak_bytes": memory.end(),
    }
  return report


def _cpu_seconds() -> float:
  """CPU seconds of this process and of those that it has started and that have ended."""
  return sum(os.times()[:4])


class _Memory(threading.Thread):
  """The most memory that this process and those it starts hold at once, mapped files left out (Linux)."""

  def __init__(self) -> None:
    super().__init__(daemon=True)
    self.most, self._ended = 0, threading.Event()

  def run(self) -> None:
    while not self._ended.wait(0.05):
      pids = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
      self.most = max(self.most, sum(map(_held, pids)))

  def end(self) -> int:
    self._ended.set()
    self.join()
    return self.most


def _held(pid: int | None) -> int:
  """The bytes of a process that are no file's; 0 where it has ended."""
  try:
    status = pathlib.Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
  except (OSError, IndexError):
    return 0


def realistic_lengths(task: str, records: int, shape: RowShape, seed: int = 0) -> np.ndarray:
  """Realistic record lengths of a task, int32[records, 2]: tokens and images.

  Captions of 8 to 300 tokens with one image; conversations of 1 to 6 turns about one image; documents of 50 to
  20,000 tokens; each log-uniform.
  """
  rng = np.random.default_rng(seed)
  between = lambda least, most: np.exp(rng.uniform(np.log(least), np.log(most), records)).astype(np.int32)
  if task == "text":
    return np.stack([between(50, 20_000), np.zeros(records, np.int32)], 1)
  if task == "generation":
    return np.stack([1 + between(8, 300) + shape.image_slots, np.ones(records, np.int32)], 1)
  tokens = np.full(records, 1 + shape.image_slots + 1, np.int32)
  turns = rng.integers(1, 7, records)
  for turn in range(6):
    tokens += np.where(turns > turn, rng.integers(8, 40, records, np.int32) + between(8, 300), 0)
  return np.stack([tokens, np.ones(records, np.int32)], 1)
