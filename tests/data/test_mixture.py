"""The mixture: exact shares, every row once, pure functions of the step and of the row number."""

import collections

import numpy as np
import pytest
from refusals import refused

from jflow.batch import TASKS
from jflow.config import SourcesConfig
from jflow.data import mixture
from jflow.data.mixture import Interleave, StepPlan
from jflow.errors import UserError

STAGE2 = ((0, (30, 50, 20)), (10_000, (14, 80, 6)))


@pytest.mark.parametrize(
  "weights, rows, expected",
  [
    ((50, 50, 0), 512, (256, 256, 0)),
    ((30, 50, 20), 512, (154, 256, 102)),
    ((14, 80, 6), 512, (72, 409, 31)),
    ((21, 70, 9), 256, (54, 179, 23)),
    ((30, 50, 20), 10, (3, 5, 2)),
    ((14, 80, 6), 8, (1, 6, 1)),
    ((0.3, 0.5, 0.2), 10, (3, 5, 2)),
    ((0, 0, 7), 5, (0, 0, 5)),
    ((1, 1, 1), 1, (1, 0, 0)),
  ],
)
def test_rows_per_task(weights, rows, expected):
  assert mixture.rows_per_task(weights, rows) == expected


@pytest.mark.parametrize("seed", range(20))
def test_largest_remainder_is_within_one_of_the_share(seed):
  rng = np.random.default_rng(seed)
  weights, total = rng.random(rng.integers(1, 9)) + 1e-3, int(rng.integers(0, 1000))
  counts = mixture.largest_remainder(weights, total)
  assert counts.sum() == total
  assert (np.abs(counts - weights / weights.sum() * total) < 1).all()


@pytest.mark.parametrize("rows", [1, 3, 8, 64, 512])
@pytest.mark.parametrize(
  "weights", [(35, 60, 5), (14, 80, 6), (50, 50, 0), (1, 1, 1), (0, 0, 3), (97, 1.5, 1.5), (0.9, 0, 0.1)]
)
def test_over_the_steps_each_task_gets_its_share(weights, rows):
  """5 in 100 of 8 rows is less than half a row: every third batch or so holds one, and none gets more than that."""
  counts = mixture.rows_of_steps(weights, rows, mixture.CYCLE)
  exact = np.array(weights) / sum(weights) * rows
  assert (counts.sum(axis=1) == rows).all()
  assert (np.abs(counts - exact) < 1).all()
  assert (np.abs(np.cumsum(counts, axis=0) - exact * np.arange(1, mixture.CYCLE + 1)[:, None]) <= 1).all()
  assert tuple(counts[0]) == mixture.rows_per_task(weights, rows)


@pytest.mark.parametrize("weights", [(1, 2), (0, 0, 0), (1, -1, 1), (1, float("nan"), 1), (float("inf"), 1, 1)])
def test_impossible_weights_are_refused(weights):
  with refused("mixture"):
    mixture.rows_per_task(weights, 8)


def test_steps_use_each_row_of_each_task_once_in_order():
  plan = StepPlan(((0, (30, 50, 20)), (5, (14, 80, 6)), (9, (0, 0, 1))), 16, 14)
  rows = {task: [] for task in range(3)}
  for step in range(14):
    batch = plan[step]
    tasks = [task for task, _ in batch]
    assert len(batch) == 16
    assert {TASKS[t]: tasks.count(t) for t in range(3)} == plan.counts(step)
    for task, row in batch:
      rows[task].append(row)
  for numbers in rows.values():
    assert numbers == list(range(len(numbers)))


def test_the_papers_schedule_changes_at_its_step():
  plan = StepPlan(STAGE2, 512, 390_000)
  assert plan.counts(0) == plan.counts(9_000) == dict(zip(TASKS, (154, 256, 102)))
  assert plan.counts(10_000) == plan.counts(389_000) == dict(zip(TASKS, (72, 409, 31)))
  first = lambda step, task: next(row for t, row in plan[step] if t == task)
  assert [first(10_000, task) for task in range(3)] == [3 * 512 * 1000, 5 * 512 * 1000, 2 * 512 * 1000]
  assert [first(389_000, task) - first(10_000, task) for task in range(3)] == [
    14 * 512 * 3790,
    80 * 512 * 3790,
    6 * 512 * 3790,
  ]
  assert first(10_001, 0) == first(10_000, 0) + 72
  assert len(plan) == 390_000


@pytest.mark.parametrize("weights", [(30, 50, 20), (14, 80, 6), (21, 70, 9), (50, 50, 0), (1, 1, 1), (5, 1, 94)])
@pytest.mark.parametrize("batch_size", [8, 24, 256, 512])
def test_every_device_gets_about_the_same_rows_of_each_task(weights, batch_size):
  """Each device has consecutive places. The rarest task differs by one row between devices, the others by two."""
  counts = mixture.rows_per_task(weights, batch_size)
  tasks, ranks = mixture.spread(counts)
  assert np.bincount(tasks, minlength=3).tolist() == list(counts)
  for task in range(3):
    assert ranks[tasks == task].tolist() == list(range(counts[task]))
  rarest = int(np.argmin(counts))
  for devices in (n for n in range(1, batch_size + 1) if batch_size % n == 0):
    of_device = np.array([np.bincount(x, minlength=3) for x in tasks.reshape(devices, -1)])
    differ = of_device.max(axis=0) - of_device.min(axis=0)
    assert differ[rarest] <= 1 and differ.max() <= 2


def test_the_positions_that_carry_loss_are_balanced():
  """Of stage 2's batch on 32 devices, none has more than 1.5 times the average; in the order of tasks, one had 10."""
  tasks, _ = mixture.spread(mixture.rows_per_task((14, 80, 6), 512))
  learned = np.array([200 / 776, 0.0, 1.0])  # of a row's tokens: answers, no caption, whole documents
  of_device = lambda order: learned[order].reshape(32, -1).sum(axis=1)
  assert of_device(tasks).max() <= 1.5 * of_device(tasks).mean()
  assert of_device(np.sort(tasks)).max() > 10 * of_device(tasks).mean()


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_the_hosts_parts_are_the_whole_batch(hosts):
  whole = StepPlan(STAGE2, 16, 10_010)
  parts = [StepPlan(STAGE2, 16, 10_010, part) for part in np.arange(16).reshape(hosts, -1)]
  for step in (0, 1, 9_999, 10_000, 10_009):
    assert [row for part in parts for row in part[step]] == whole[step]
    assert {len(part[step]) for part in parts} == {16 // hosts}


def test_a_share_may_lie_scattered_in_the_batch():
  """On a torus of chips, the devices of one host need not stand side by side in the mesh."""
  whole, part = StepPlan(STAGE2, 16, 20), StepPlan(STAGE2, 16, 20, (1, 4, 5, 12))
  assert part[7] == [whole[7][place] for place in (1, 4, 5, 12)]


def test_impossible_schedules_are_refused():
  for schedule in (
    (),
    ((1, (1, 1, 1)),),
    ((0, (1, 1, 1)), (0, (1, 0, 0))),
    ((0, (1, 1, 1)), (5, (1, 1, 1)), (3, (1, 1, 1))),
  ):
    with refused("data.mixture"):
      StepPlan(schedule, 8, 1)


def test_interleave_is_exact_in_every_cycle_and_uses_each_row_once():
  interleave = Interleave((0.5, 3, 1.5), seed=3)
  rows = collections.defaultdict(list)
  for cycle in range(3):
    for row in range(mixture.CYCLE):
      source, number = interleave[cycle * mixture.CYCLE + row]
      rows[source].append(number)
    assert [len(rows[s]) for s in range(3)] == [100 * (cycle + 1), 600 * (cycle + 1), 300 * (cycle + 1)]
  for numbers in rows.values():
    assert numbers == list(range(len(numbers)))
  assert [Interleave((1, 1), 3)[i] for i in range(50)] != [Interleave((1, 1), 4)[i] for i in range(50)]


@pytest.mark.parametrize("weights", [(), (1, 0), (1, -2), (1, float("nan")), (1, 1e-6)])
def test_sources_without_a_share_are_refused(weights):
  with pytest.raises(UserError):
    Interleave(weights, 0)


@pytest.mark.parametrize(
  "schedule, listed, said",
  [
    (((0, (1, 1, 0)),), (1, 1, 1), ["text"]),
    (((0, (1, 0, 0)),), (1, 1, 1), ["generation", "text"]),
    (((0, (1, 0, 0)), (5, (0, 1, 0))), (1, 1, 0), []),
    (((0, (1, 1, 1)),), (1, 0, 0), ["generation", "text"]),  # shares without a source
    (STAGE2, (1, 1, 1), []),
    ((), (1, 1, 0), []),
  ],
)
def test_sources_without_a_share_and_shares_without_a_source_are_named(schedule, listed, said):
  sources = SourcesConfig(**{task: (("DIR", 1.0),) * there for task, there in zip(TASKS, listed)})
  notes, _ = mixture.without_empty(schedule, sources)
  assert len(notes) == len(said) and all(f"data.sources.{task} " in note for task, note in zip(said, notes))


@pytest.mark.parametrize("shards, accumulation", [(1, 1), (4, 1), (2, 3)])
def test_no_device_ever_holds_more_than_is_said(shards, accumulation):
  """Against every step of two thousand, of a schedule of two parts."""
  schedule, rows = ((0, (30, 50, 20)), (1000, (14, 80, 6))), 12
  held = np.array([[5, 0, 5], [0, 6, 6], [0, 0, 0]])
  said = mixture.most_at_once(schedule, rows, shards, accumulation, held)
  plan, seen = mixture.StepPlan(schedule, rows, 2000), np.zeros(3, int)
  for step in range(2000):
    tasks = np.array([task for task, _ in plan[step]])
    for part in tasks.reshape(shards, -1):
      for start in range(accumulation):
        seen = np.maximum(seen, held[part[start::accumulation]].sum(axis=0))
  np.testing.assert_array_equal(said, seen)
