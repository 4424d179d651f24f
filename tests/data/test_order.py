"""Orders of rows: permutations that change with the epoch, and blocks that each host reads from few files."""

import collections
import pathlib
import pickle

import numpy as np
import pytest
from data_config import data_config

from jflow.batch import TASKS, RowShape
from jflow.data import mixture, sources
from jflow.data.order import Blocks, Global, Scattered
from jflow.data.pipeline import Pipeline
from jflow.data.records import Record, Turn
from jflow.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(pathlib.Path(__file__).parents[2] / "configs" / "tokenizer")
SHAPE = RowShape(tokens=96, images=3, image_patches=9, image_size=6, writer="flow")
SIZES = dict(understanding=130, generation=250, text=70)
BATCH, STEPS = 8, 60
MIXTURE = ((0, (30, 50, 20)), (14, (14, 60, 26)))


def blocks(sizes, lanes=1, window=2, batch=8, seed=3):
  """Blocks of groups with so many rows each, in batches of that source alone."""
  begins = np.cumsum([0, *sizes])
  plan = mixture.StepPlan(((0, (1, 0, 0)),), batch, 1)
  lane_of = mixture.Lanes(plan, mixture.Interleave([1.0], 0), batch, lanes, 0, 0)
  return Blocks(begins[:-1], int(begins[-1]), seed, 0, window, lanes, lane_of)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 64, 1000])
def test_every_order_shows_each_row_once_in_an_epoch_and_no_two_epochs_agree(rows):
  halves = [rows - rows // 2, rows // 2] if rows > 1 else [rows]
  for order in (Global(rows, 5, 1), Scattered(rows, 5, 1), blocks(halves), blocks([1] * rows, 3), blocks([rows], 8, 9)):
    epochs = [[order(epoch, index) for index in range(rows)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert rows < 64 or len(set(map(tuple, epochs))) == 3
    again = pickle.loads(pickle.dumps(order))
    assert [again(1, index) for index in reversed(range(rows))] == epochs[1][::-1]


def test_the_scattered_order_is_as_far_from_sorted_as_chance():
  rows = 5000
  found = np.array([Scattered(rows, 0, 2)(epoch, index) for epoch in range(2) for index in range(rows)])
  for epoch in found.reshape(2, rows):
    assert abs(np.corrcoef(epoch, np.arange(rows))[0, 1]) < 0.06  # four standard deviations
    assert abs(np.abs(np.diff(epoch)).mean() / (rows / 3) - 1) < 0.05
  assert abs(np.corrcoef(*found.reshape(2, rows))[0, 1]) < 0.06


@pytest.mark.parametrize("lanes, window", [(1, 1), (4, 1), (4, 3)])
def test_a_lane_reads_its_groups_one_after_the_other(lanes, window):
  """Of equal groups: each belongs to one lane, and no lane has more than window + 1 of them open at a time."""
  size, batch = 50, 8
  order = blocks([size] * 96, lanes, window, batch)
  rows = 96 * size
  first, last, lane_of = {}, {}, collections.defaultdict(set)
  for index in range(rows):
    step, place = divmod(index, batch)
    group = order(0, index) // size
    first.setdefault(group, step)
    last[group] = step
    lane_of[group].add(place * lanes // batch)
  assert all(len(found) == 1 for found in lane_of.values())
  for lane in range(lanes):
    groups = [group for group, found in lane_of.items() if lane in found]
    assert len(groups) == 96 / lanes
    assert all(sum(first[g] <= step <= last[g] for g in groups) <= window + 1 for step in range(rows // batch))
  assert sum(last[g] - first[g] for g in first) > 0.7 * 96 * window * size * lanes / batch  # and it does mix them


def test_the_places_of_rows_are_those_of_the_steps():
  plan = mixture.StepPlan(MIXTURE, BATCH, STEPS)
  interleaves = [mixture.Interleave(weights, i) for i, weights in enumerate(([1.0], [0.3, 0.7], [1.0]))]
  expected = collections.defaultdict(list)
  for step in range(STEPS):
    for place, (task, row) in enumerate(plan[step]):
      source, number = interleaves[task][row]
      expected[task, source].append((number, place))
  for (task, source), pairs in expected.items():
    numbers, places = map(np.array, zip(*sorted(pairs), strict=True))
    np.testing.assert_array_equal(plan.places(task, interleaves[task].rows_of(source, numbers)), places)
  never = mixture.StepPlan(((0, (1, 1, 0)), (5, (1, 0, 0))), BATCH, STEPS)
  assert never.places(2, np.arange(9)).tolist() == [0] * 9 and len(never.places(1, np.arange(500))) == 500


class Named:
  """Records that say their number. Picklable."""

  def __init__(self, task):
    self.task = task

  def __len__(self):
    return SIZES[self.task]

  def __getitem__(self, index):
    if self.task == "text":
      return Record(str(index), (), f"n{index} said. " * (3 + index * 7 % 40), ())
    image = np.full((7, 7, 3), index % 256, np.uint8)
    if self.task == "generation":
      return Record(str(index), (image,), f"the number {index}." * (1 + index % 2), ())
    return Record(
      str(index), (image,), "", (Turn("user", "<image>\nWhich?"), Turn("assistant", "It." * (index % 4 + 1)))
    )


@pytest.fixture(autouse=True)
def named(monkeypatch):
  monkeypatch.setattr(sources, "open_source", lambda spec, task, config: Named(task))


def pipeline(share=None, **changes):
  fields = dict(order="blocks", block_records=16, block_window=2, block_lanes=4, threads=2, prefetch=1, mixture=MIXTURE)
  listed = dict.fromkeys(TASKS, (("named", 1.0),))
  return Pipeline(data_config(sources=listed, **fields | changes), TOKENIZER, SHAPE, BATCH, 5, share)


@pytest.fixture(scope="module")
def expected():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sources, "open_source", lambda spec, task, config: Named(task))
    rows = pipeline()
    return [rows.pieces(step) for step in range(STEPS)]


@pytest.mark.parametrize("hosts", [2, 8])
def test_in_blocks_the_union_over_hosts_is_the_batch(expected, hosts):
  parts = [pipeline(share) for share in np.arange(BATCH).reshape(hosts, -1)]
  assert [[row for part in parts for row in part.pieces(step)] for step in range(STEPS)] == expected


def test_in_blocks_a_restart_at_any_step_goes_on_with_the_next_batch(expected):
  for step in (59, 0, 31, 14):
    assert pipeline().pieces(step) == expected[step]


def test_in_blocks_an_epoch_holds_each_record_once_and_another_is_not_like_it(expected):
  for task in ("understanding", "generation"):
    shown = [(p.epoch, p.record) for step in expected for name, _, pieces in step if name == task for p in pieces]
    epochs = [[record for epoch, record in shown if epoch == number] for number in range(2)]
    assert sorted(epochs[0]) == list(range(SIZES[task])) and epochs[0][: len(epochs[1])] != epochs[1]


def test_in_blocks_a_row_holds_records_of_one_group(expected):
  for step in expected:
    for _, _, pieces in step:
      assert len({piece.record // 16 for piece in pieces}) == 1
  assert expected[0] != pipeline(order="global").pieces(0)


class Cached(Named):
  """Records in shards of 10 that come to a cache, 1 GiB each."""

  cache = True

  def __init__(self, task):
    super().__init__(task)
    self.shard_lengths = [10] * (len(self) // 10)
    self.shard_bytes = [2**30] * len(self.shard_lengths)


@pytest.mark.parametrize("hosts, least", [(1, 4), (2, 2), (4, 1)])
def test_a_cache_that_is_too_small_for_the_lanes_of_a_host_is_told(monkeypatch, hosts, least):
  """Three sources, groups of one shard, two of them mixed and one more at hand, in each of a host's lanes."""
  monkeypatch.setattr(sources, "open_source", lambda spec, task, config: Cached(task))
  share = np.arange(BATCH).reshape(hosts, -1)[0]
  told = lambda gib: [line for line in pipeline(share, cache_gib=gib).notes if "data.cache_gib" in line]
  assert not told(least * 9.0) and f"should be {least * 9}" in told(least * 9.0 - 0.1)[0]
