"""The mixture: the rows of a step's batch, as a pure function of the step.

The papers' ratios count packed rows. A batch of few rows cannot hold every ratio (6 in 100 of 8 rows is half a row), so
rows are assigned by the remainder that each task is owed: over the steps each task gets its share.
"""

import bisect
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jflow.batch import TASKS
from jflow.config import DataConfig, SourcesConfig
from jflow.errors import UserError

# Period of the interleaving: in rows for the sources of one task, in steps for the tasks.
CYCLE = 1000


Schedule = tuple[tuple[int, tuple[float, ...]], ...]


def without_empty(schedule: Schedule, listed: SourcesConfig) -> tuple[list[str], Schedule]:
  """Returns a schedule without the types that no source is listed for, and a line for each that it had a share of.

  A type with sources and no share has a line, too.

  Args:
    schedule: `data.mixture`; empty: the rows decide, see `Pipeline`.
    listed: `data.sources`.

  Raises:
    UserError: nothing is left from some step on.
  """
  there = [bool(getattr(listed, task)) for task in TASKS]
  if not any(there):
    raise UserError(f"data.sources.{' or data.sources.'.join(TASKS)} must list a source, as (('DIR', 1.0),)")
  left = tuple((int(start), tuple(w if t else 0.0 for w, t in zip(row, there, strict=True))) for start, row in schedule)
  for start, weights in left:
    if not any(weights):
      raise UserError(
        f"data.mixture gives all rows from step {start} on to types without a source: list one in data.sources, or "
        f'write --config.data.mixture="((0,({",".join(str(int(t)) for t in there)})),)"'
      )
  gone = [task for i, task in enumerate(TASKS) if not there[i] and any(row[i] for _, row in schedule)]
  notes = [f"data.sources.{task} is empty, so no row holds {task}: {told(left)}" for task in gone]
  idle = [task for i, task in enumerate(TASKS) if schedule and there[i] and not any(row[i] for _, row in schedule)]
  notes += [f"data.mixture gives no row to {task}, so data.sources.{task} is not read: {told(left)}" for task in idle]
  return notes, left


def drawn(schedule: Schedule) -> list[bool]:
  """Which of the three types a schedule gives rows; an empty one gives them to all."""
  return [not schedule or any(row[i] for _, row in schedule) for i in range(len(TASKS))]


def told(schedule: Schedule) -> str:
  """Describes the shares of a schedule, as "understanding 30 : generation 70, from step 100 on generation 1"."""
  parts = []
  for start, row in schedule:
    shares = " : ".join(f"{task} {weight:g}" for task, weight in zip(TASKS, row, strict=True) if weight)
    parts.append(f"from step {start} on {shares}" if start else shares)
  return ", ".join(parts)


def assumed(data: DataConfig) -> Schedule:
  """The schedule where the sources are not opened: an empty one takes as many rows of each type that is listed."""
  if data.mixture:
    return data.mixture
  listed = tuple(float(bool(getattr(data.sources, task))) for task in TASKS)
  return ((0, listed if any(listed) else (1.0, 1.0, 0.0)),)


def seed_of_part(seed: int, number: int) -> int:
  """Derives the seed of part `number` from `seed`."""
  return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def rows_per_task(weights: Sequence[float], batch_size: int) -> tuple[int, ...]:
  """Returns how many rows of its first batch each task gets: `batch_size` shared by the largest remainder.

  Raises:
    UserError: see `rows_of_steps`.
  """
  return tuple(rows_of_steps(weights, batch_size, 1)[0].tolist())


def rows_of_steps(weights: Sequence[float], batch_size: int, steps: int) -> np.ndarray:
  """Returns how many rows each task gets in each of `steps` batches.

  A batch is shared by the largest remainder of what each task is owed: its exact share of all batches so far, less
  the rows that it had. So every count lies within 1 of the exact share of one batch, and over the steps their sums
  stay near the exact share of all.

  Args:
    weights: of understanding, generation and text; not negative, any sum above 0.
    batch_size: rows of a batch over all hosts.
    steps: number of batches.

  Returns:
    int64[steps, tasks].

  Raises:
    UserError: the weights are not three numbers of that kind.
  """
  weights = np.asarray(weights, np.float64)
  if weights.shape != (len(TASKS),) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum():
    raise UserError(
      f"a mixture needs one weight >= 0 for each of {', '.join(TASKS)}, and not all 0: {weights.tolist()}"
    )
  return _rows_of_steps(tuple(weights.tolist()), batch_size, steps)


@functools.lru_cache(maxsize=64)
def _rows_of_steps(weights: tuple[float, ...], batch_size: int, steps: int) -> np.ndarray:
  """See `rows_of_steps`; cached, since every look at a single batch makes a plan."""
  exact = np.array(weights) / sum(weights) * batch_size
  whole = np.floor(exact + 1e-9).astype(np.int64)
  counts, owed = np.tile(whole, (steps, 1)), np.zeros(len(weights))
  for step in range(steps):
    owed += exact - whole
    more = np.argsort(-np.round(owed, 9), kind="stable")[: batch_size - whole.sum()]
    counts[step, more] += 1
    owed[more] -= 1
  return counts


def largest_remainder(weights: np.ndarray, total: int) -> np.ndarray:
  """Returns int64[n] that sum to `total` and lie within 1 of weights / sum(weights) * total."""
  exact = weights / weights.sum() * total
  counts = np.floor(exact + 1e-9).astype(np.int64)
  order = np.argsort(-(exact - counts), kind="stable")
  counts[order[: total - counts.sum()]] += 1
  return counts


@functools.lru_cache(maxsize=64)
def spread(counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Spreads the rows of each task evenly over the places of a batch, the rarest task first.

  All devices have the same number of consecutive places and wait for the one with the most work, which depends on the
  rows with text loss. With this order, any two devices differ by at most one row of the rarest task and two of another.

  Args:
    counts: rows per task.

  Returns:
    int64[B] task of each place, and int64[B] number of earlier rows of that task.
  """
  tasks = np.full(sum(counts), -1)
  ranks = np.zeros_like(tasks)
  for task in np.argsort(counts, kind="stable"):
    free, count = np.flatnonzero(tasks < 0), int(counts[task])
    taken = free[(2 * np.arange(count) + 1) * len(free) // max(2 * count, 1)]
    tasks[taken], ranks[taken] = task, np.arange(count)
  return tasks, ranks


def most_at_once(
  mixture: Sequence[tuple[int, Sequence[float]]], batch_size: int, shards: int, accumulation: int, held: np.ndarray
) -> np.ndarray:
  """Returns the most that the rows of one device hold in one microbatch of any step.

  Args:
    mixture: (first step, weights), as for `StepPlan`.
    batch_size: rows of a batch over all hosts.
    shards: parts of consecutive rows that a batch is cut into.
    accumulation: microbatches; each takes every `accumulation`-th row of a part.
    held: int[tasks, kinds], the most of each kind that a row of a task holds.

  Returns:
    int[kinds].
  """
  most = np.zeros(held.shape[1], np.int64)
  for _, weights in mixture:
    for counts in np.unique(rows_of_steps(weights, batch_size, CYCLE), axis=0):
      tasks, _ = spread(tuple(counts.tolist()))
      parts = held[tasks].reshape(shards, -1, accumulation, held.shape[1]).sum(axis=1)
      most = np.maximum(most, parts.max(axis=(0, 1)))
  return most


class StepPlan:
  """A map from a step to the rows of this host's share of the batch, each a (task number, row number of that task).

  Row numbers count up from 0 over the whole run; `Interleave` and the epochs turn them into rows of a source.
  The tasks are spread over the batch by `spread`, the same on every mesh, and each host has the places of its devices,
  so that the hosts together have the batch of a single host.
  """

  def __init__(
    self,
    mixture: Sequence[tuple[int, Sequence[float]]],
    batch_size: int,
    steps: int,
    share: Sequence[int] | None = None,
  ):
    """Checks and stores the schedule.

    Args:
      mixture: (first step, weights) in rising order; the first starts at 0.
      batch_size: rows over all hosts.
      steps: length of the plan.
      share: places of the batch that this host loads; None: all of them.

    Raises:
      UserError: the schedule or the numbers do not fit.
    """
    self._starts = [int(start) for start, _ in mixture]
    if not self._starts or self._starts[0] != 0 or self._starts != sorted(set(self._starts)):
      raise UserError(f"data.mixture must start at step 0 and rise, got {self._starts}")
    self._counts = [rows_of_steps(weights, batch_size, CYCLE) for _, weights in mixture]
    # Rows of each task before each step of a cycle, and before the end of it.
    self._before = [np.cumsum(np.pad(counts, ((1, 0), (0, 0))), axis=0) for counts in self._counts]
    self._bases = [np.zeros(len(TASKS), np.int64)]
    for segment, (start, stop) in enumerate(zip(self._starts, self._starts[1:])):
      self._bases.append(self._bases[-1] + self._rows_before(segment, stop - start))
    self._share = list(range(batch_size) if share is None else share)
    self._steps = steps

  def __len__(self) -> int:
    return self._steps

  def counts(self, step: int) -> dict[str, int]:
    """Returns the rows per task of the global batch at a step."""
    segment, passed = self._segment(step)
    return dict(zip(TASKS, self._counts[segment][passed % CYCLE].tolist()))

  def __getitem__(self, step: int) -> list[tuple[int, int]]:
    segment, passed = self._segment(step)
    first = self._bases[segment] + self._rows_before(segment, passed)
    tasks, ranks = spread(tuple(self._counts[segment][passed % CYCLE].tolist()))
    return [(int(tasks[place]), int(first[tasks[place]] + ranks[place])) for place in self._share]

  def places(self, task: int, rows: np.ndarray) -> np.ndarray:
    """Returns the places in their batches of rows of a task, int64[n]; 0 of a row that no step draws.

    Args:
      task: its number.
      rows: int64[n], row numbers of that task.
    """
    bases = np.array([base[task] for base in self._bases])
    segments = np.searchsorted(bases, rows, side="right") - 1
    places = np.zeros(len(rows), np.int64)
    for segment in np.unique(segments).tolist():
      before, counts = self._before[segment][:, task], self._counts[segment]
      if not before[-1]:
        continue
      mine = np.flatnonzero(segments == segment)
      passed = (rows[mine] - bases[segment]) % before[-1]
      steps = np.searchsorted(before, passed, side="right") - 1
      kinds, kind_of = np.unique(counts, axis=0, return_inverse=True)
      for kind, count in enumerate(kinds.tolist()):
        these = np.flatnonzero(kind_of.reshape(-1)[steps] == kind)
        if len(these):
          tasks, _ = spread(tuple(count))
          places[mine[these]] = np.flatnonzero(tasks == task)[passed[these] - before[steps[these]]]
    return places

  def _segment(self, step: int) -> tuple[int, int]:
    """Returns the part of the schedule that a step lies in, and how many of its steps come before."""
    segment = bisect.bisect_right(self._starts, step) - 1
    return segment, step - self._starts[segment]

  def _rows_before(self, segment: int, steps: int) -> np.ndarray:
    """Returns the rows per task of the first `steps` steps of a part of the schedule."""
    cycles, place = divmod(steps, CYCLE)
    return cycles * self._before[segment][-1] + self._before[segment][place]


class Interleave:
  """A map from the row number of a task to (source, row number of that source), with shares by weight.

  In every `CYCLE` rows each source has its exact share, in an order shuffled by the seed. A weight is thus a share of
  the task's rows, whatever the sizes of the sources: a small source starts its next epoch earlier.
  """

  def __init__(self, weights: Sequence[float], seed: int):
    weights = np.asarray(weights, np.float64)
    if not len(weights) or not np.isfinite(weights).all() or (weights <= 0).any():
      raise UserError(f"weights of sources must be above 0, got {weights.tolist()}")
    counts = largest_remainder(weights, CYCLE)
    if not counts.all():
      raise UserError(
        f"a source has less than 1/{CYCLE} of its task's weight, and would never be read: {weights.tolist()}"
      )
    pattern = np.repeat(np.arange(len(weights)), counts)
    self._pattern = np.random.default_rng(seed).permutation(pattern)
    self._counts = counts
    self._ranks = np.zeros(CYCLE, np.int64)
    for source in range(len(weights)):
      where = self._pattern == source
      self._ranks[where] = np.arange(where.sum())

  def rows_of(self, source: int, rows: np.ndarray) -> np.ndarray:
    """Returns the row numbers of the task at which rows of a source are drawn, int64[n]."""
    cycles, ranks = np.divmod(rows, self._counts[source])
    return cycles * CYCLE + np.flatnonzero(self._pattern == source)[ranks]

  def __getitem__(self, row: int) -> tuple[int, int]:
    cycle, place = divmod(row, CYCLE)
    source = int(self._pattern[place])
    return source, int(cycle * self._counts[source] + self._ranks[place])


class Lanes(NamedTuple):
  """A map from row numbers of a source to the lanes of the batch that draw them, of `lanes` with as many places
  each."""

  step_plan: StepPlan
  interleave: Interleave
  batch_size: int
  lanes: int
  task: int
  source: int

  def __call__(self, rows: np.ndarray) -> np.ndarray:
    places = self.step_plan.places(self.task, self.interleave.rows_of(self.source, rows))
    return places * self.lanes // self.batch_size
