"""Plans by groups of shards: every record once, rows of one group alone, the same wherever and by whomever made."""

import os
import pathlib
import pickle

import numpy as np
import pytest
from refusals import refused

from jflow.batch import TASKS, RowShape
from jflow.data import packing
from jflow.data.store import groups, lengths, parts, plans
from jflow.data.tokenizer import Tokenizer
from jflow.perf.planning import realistic_lengths
from jflow.world.source import WorldSource

TOKENIZER = Tokenizer.load(pathlib.Path(__file__).parents[3] / "configs" / "tokenizer")
SHAPE = RowShape(tokens=160, images=2, image_patches=16, image_size=32, writer="flow")
SIZE = 150


def planned(cache, task="generation", group_records=0, **options):
  source = WorldSource(task, size=SIZE, seed=0)
  return plans.planned(source, task, TOKENIZER, "plain", SHAPE, str(cache), group_records=group_records, **options)


def same(first, second):
  assert first[1:4] == second[1:4]
  for a, b in zip((*first.plan, first.groups), (*second.plan, second.groups), strict=True):
    np.testing.assert_array_equal(a, b)
    assert a.dtype == b.dtype


def sizes_of(task):
  return lengths.measure(WorldSource(task, size=SIZE, seed=0), task, TOKENIZER, "plain", 16, "flow")[0]


def check(found, task, most):
  """All records are there, no more, and those of a row lie within `most` of one another, as do those of a group."""
  plan, sizes = found.plan, sizes_of(task)
  whole = packing.Plan(*map(np.array, plan))
  learned = np.zeros(SIZE, int)
  np.add.at(learned, whole.record_ids, whole.stops - whole.starts)
  left = sizes[:, 0] - learned
  assert ((left == 0) | ((left == 1) & (task == "text"))).all()  # an EOS alone is not worth a piece
  edges = [*found.groups.tolist(), plan.rows]
  assert edges[0] == 0 and len(edges) > 2
  spans = []
  for first, stop in zip(edges, edges[1:], strict=False):
    ids = whole.record_ids[plan.row_offsets[first] : plan.row_offsets[stop]]
    spans.append((ids.min(), ids.max()))
    assert 0 <= ids.max() - ids.min() < most
  assert all(end < begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))


@pytest.mark.parametrize("task", TASKS)
def test_a_plan_by_groups_holds_every_record_once(tmp_path, task):
  kept = planned(tmp_path, task, 16)
  check(kept, task, 16)
  assert isinstance(kept.plan, plans.MappedPlan)
  same(planned("", task, 16), kept)  # nowhere to keep it
  same(planned(tmp_path, task, 16), kept)
  assert pickle.loads(pickle.dumps(kept.plan)).rows == kept.plan.rows


def test_a_large_source_is_planned_by_parts_in_processes(tmp_path, monkeypatch):
  at_once = planned(tmp_path / "old")
  monkeypatch.setattr(parts, "MOST_AT_ONCE", SIZE - 1)
  monkeypatch.setattr(parts, "PART_RECORDS", 50)
  monkeypatch.setattr(parts, "_RUN", 25)
  found = planned(tmp_path / "new")
  check(found, "generation", 50)
  assert at_once.groups is None and len(found.groups) == 3
  assert planned(tmp_path / "old").groups is None  # a plan that a run has begun with stays
  with refused("data.plan_cache"):
    planned("")
  # After a kill, the parts that are there are taken.
  (tmp_path / "killed").mkdir()
  made = []
  write_part = groups._write_part
  monkeypatch.setattr(groups, "_write_part", lambda *a: made.append(a[2]) or write_part(*a))
  monkeypatch.setattr(groups, "_in_processes", groups._here)
  wanted = groups.Wanted(
    WorldSource("generation", size=SIZE, seed=0), "generation", TOKENIZER, "plain", SHAPE, "", "", 0.0, "training", 0
  )
  kept = tmp_path / "killed" / "parts"
  for before in (3, 1):
    (tmp_path / "killed" / "plan").mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
      patch.setattr(groups, "_join", _killed)
      with pytest.raises(KeyboardInterrupt):
        groups.write(wanted, str(tmp_path / "killed" / "plan"), str(kept))
    assert len(made) == before
    made.clear()
    (kept / "00001-of-00003.npz").write_bytes(b"PK damaged")
  groups.write(wanted, str(tmp_path / "killed" / "plan"), str(kept))
  assert len(made) == 1
  for field, array in zip(packing.Plan._fields, found.plan, strict=True):
    np.testing.assert_array_equal(np.load(tmp_path / "killed" / "plan" / f"{field}.npy"), array)


def test_several_machines_plan_the_parts_together(tmp_path, monkeypatch):
  """What one finds, another has made; who comes when the plan is there makes nothing."""
  monkeypatch.setattr(parts, "MOST_AT_ONCE", SIZE - 1)
  monkeypatch.setattr(parts, "PART_RECORDS", 25)
  monkeypatch.setattr(parts, "_RUN", 25)
  monkeypatch.setattr(groups, "_in_processes", groups._here)
  made = []
  write_part = groups._write_part

  def as_another_machine_does(*arguments):
    made.append(arguments[2])
    write_part(*arguments)
    if len(made) == 2:  # it makes all others before this one looks again
      planned(tmp_path)

  monkeypatch.setattr(groups, "_write_part", as_another_machine_does)
  found = planned(tmp_path)
  assert len(made) == len(set(made)) == 6
  check(found, "generation", 25)
  assert [path.suffix for path in sorted(tmp_path.glob("plan-*"))] == [""]


def _killed(*_):
  raise KeyboardInterrupt


def test_processes_plan_the_same_groups_of_lengths_that_were_measured_at_once(tmp_path, monkeypatch):
  alone = planned(tmp_path / "alone", "understanding", 16)
  monkeypatch.setattr(parts, "PART_RECORDS", 64)
  same(planned(tmp_path / "shared", "understanding", 16), alone)


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY\x01\0", "other", "gone"])
def test_damaged_groups_are_made_again(tmp_path, damage):
  expected = planned(tmp_path, group_records=16)
  (path,) = tmp_path.glob("plan-*/groups.npy")
  if damage == "gone":
    path.unlink()
  elif damage == "other":
    np.save(path, expected.groups + 1)
  else:
    path.write_bytes(damage)
  same(planned(tmp_path, group_records=16), expected)
  assert len([*tmp_path.iterdir()]) == 2


def test_both_sides_of_held_out_records_are_planned_by_groups(tmp_path, monkeypatch):
  monkeypatch.setattr(parts, "MOST_AT_ONCE", SIZE - 1)
  monkeypatch.setattr(groups, "_in_processes", groups._here)
  sides = [planned(tmp_path, validation=0.3, side=side) for side in ("training", "validation")]
  ids = [set(side.plan.record_ids.tolist()) for side in sides]
  assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == SIZE and 20 < len(ids[1]) < 80


def test_groups_fill_rows_within_half_a_percent():
  shape = RowShape(tokens=4096, images=7, image_patches=576, image_size=384, writer="flow")
  for task in TASKS:
    sizes = realistic_lengths(task, 16_384, shape)
    plan = (
      (lambda one: packing.plan_documents(one[:, 0], 4096, 0))
      if task == "text"
      else (lambda one: packing.plan(one, shape, 0))
    )
    rows = sum(plan(sizes[first : first + 8192]).rows for first in range(0, len(sizes), 8192))
    assert rows <= plan(sizes).rows * 1.005


@pytest.mark.parametrize(
  "lengths, most, expected",
  [
    ([], 4, []),
    ([3], 4, [(0, 3)]),
    ([3, 1, 1], 4, [(0, 4), (4, 5)]),
    ([9, 1, 9], 4, [(0, 9), (9, 10), (10, 19)]),
  ],
)
def test_parts_are_runs_of_whole_shards(lengths, most, expected):
  found = parts.parts(lengths, most)
  assert [part[:2] for part in found] == expected
  assert all(sum(lengths[part.first_shard : part.stop_shard]) == part.stop - part.first for part in found)
  assert [p.first_shard for p in found[1:]] == [p.stop_shard for p in found[:-1]]


def test_the_folder_of_a_plan_holds_no_more_than_the_plan(tmp_path):
  planned(tmp_path, group_records=16)
  (path,) = tmp_path.glob("plan-*")
  assert sorted(os.listdir(path)) == sorted(
    [*(f"{name}.npy" for name in (*packing.Plan._fields, "groups")), "plan.json"]
  )
