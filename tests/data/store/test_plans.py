"""Plans and lengths are made once, shared, never taken half-written, and the same wherever they lie."""

import json
import multiprocessing
import os
import pathlib
import pickle
import shutil

import numpy as np
import pytest

from jflow.batch import TASKS, RowShape
from jflow.data import examples, packing
from jflow.data.records import RecordError
from jflow.data.store import lengths, plans
from jflow.data.store.prepare import prepare
from jflow.data.store.prepared import PreparedSource
from jflow.data.tokenizer import Tokenizer
from jflow.generation.flow import FAMILY
from jflow.world.source import WorldSource

TOKENIZER = Tokenizer.load(pathlib.Path(__file__).parents[3] / "configs" / "tokenizer")
SHAPE = RowShape(tokens=160, images=2, image_patches=16, image_size=32, writer="flow")


def _source(task="generation", size=150, **options):
  return WorldSource(task, size=size, seed=0, **options)


def _planned(cache, task="generation", template="plain", shape=SHAPE, **options):
  return plans.planned(_source(task, **options), task, TOKENIZER, template, shape, str(cache))


def _same(first, second):
  assert first._replace(plan=None) == second._replace(plan=None)
  for a, b in zip(first.plan, second.plan, strict=True):
    np.testing.assert_array_equal(a, b)
    assert a.dtype == b.dtype


@pytest.fixture
def made(monkeypatch):
  """How often a source was measured and planned."""
  calls = {"measured": 0, "planned": 0}

  def count(module, function, name):
    real = getattr(module, function)

    def wrapped(*args):
      calls[name] += 1
      return real(*args)

    monkeypatch.setattr(module, function, wrapped)

  count(lengths, "_measure", "measured")
  count(packing, "plan", "planned")
  count(packing, "plan_documents", "planned")
  return calls


@pytest.mark.parametrize("task", TASKS)
def test_a_plan_is_made_once_and_is_the_plan_of_its_lengths(tmp_path, made, task):
  first = _planned(tmp_path, task)
  assert made == {"measured": 1, "planned": 1}
  (plan,) = tmp_path.glob("plan-*")
  plan.rename(plan.with_name(f"{plan.name}.{'0' * 32}"))  # as a process that is killed while it writes leaves it
  _same(_planned(tmp_path, task), first)
  assert made == {"measured": 1, "planned": 2} and list(tmp_path.glob("plan-*")) == [plan]
  made["planned"] = 1
  _same(_planned(tmp_path, task), first)
  assert made == {"measured": 1, "planned": 1}
  _same(_planned("", task), first)  # nowhere to keep it: made again, the same
  assert made == {"measured": 2, "planned": 2}
  assert not [name for name in os.listdir(tmp_path) if name.endswith(".lock")]


def test_what_a_plan_depends_on_makes_another(tmp_path, made):
  _planned(tmp_path)
  others = [
    dict(shape=SHAPE.__class__(120, 2, 16, 32, "flow")),
    dict(shape=SHAPE.__class__(160, 1, 16, 32, "flow")),
    dict(shape=SHAPE.__class__(160, 2, 9, 32, "flow")),
  ]
  for number, change in enumerate(others, start=2):  # other budgets need no second look at the records
    _planned(tmp_path, **change)
    assert made == {"measured": 1, "planned": number}
  others = (dict(template="chat"), dict(size=149), dict(long_captions=1.0), dict(named_colors=1.0), dict(in_order=1.0))
  for number, change in enumerate(others, start=2):
    _planned(tmp_path, **change)
    assert made == {"measured": number, "planned": 3 + number}
  _planned(tmp_path, shape=SHAPE.__class__(160, 2, 16, 64, "flow"))  # pixels do not count
  assert made == {"measured": 6, "planned": 9}
  asked = [
    plans.planned(_source("understanding"), "understanding", TOKENIZER, "plain", SHAPE, str(tmp_path), prompt)
    for prompt in ("Generate the caption of this picture.", "What?", "What?")
  ]
  assert made == {"measured": 8, "planned": 11} and asked[1].tokens == asked[2].tokens < asked[0].tokens


def test_a_damaged_file_is_made_again(tmp_path, made):
  expected = _planned("")
  for pattern in ("plan-*/record_ids.npy", "plan-*/plan.json", "plan-*/stops.npy", "lengths-*.npz"):
    for damage in ("flip", "cut", "remove"):
      _planned(tmp_path)
      (path,) = tmp_path.glob(pattern)
      data = bytearray(path.read_bytes())
      if damage == "flip":
        data[-3] ^= 64
      path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
      if damage == "remove":
        path.unlink()
      if pattern.startswith("lengths"):
        next(tmp_path.glob("plan-*/plan.json")).write_text("{}")
      _same(_planned(tmp_path), expected)


@pytest.mark.parametrize(
  "pattern", ["plan-*", "plan-*/plan.json", "plan-*/starts.npy", "plan-*/row_offsets.npy", "lengths-*"]
)
@pytest.mark.parametrize(
  "content",
  [b"", b"\0" * 300, b"[]", b"[" * 100_000, b"\x93NUMPY\x01\0", "list", "folder", "link", "pipe"],
  ids=lambda value: ascii(value)[:24],
)
def test_what_is_not_what_was_kept_is_made_again(tmp_path, pattern, content):
  source, cache = _source(size=12), tmp_path / "cache"
  make = lambda: plans.planned(source, "generation", TOKENIZER, "plain", SHAPE, str(cache))
  expected = make()
  if pattern == "lengths-*":
    shutil.rmtree(next(cache.glob("plan-*")))
  (path,) = cache.glob(pattern)
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink()
  if content == "folder":
    path.mkdir()
  elif content == "pipe":
    os.mkfifo(path)
  elif content == "link":
    path.symlink_to("nowhere")
  elif content == "list":  # of the right form and other content
    path.write_text(json.dumps({"checksums": [], "records": "12", "tokens": None, "rejected": [1]}))
  else:
    path.write_bytes(content)
  for _ in range(2):
    _same(make(), expected)
  assert sorted(p.suffix for p in cache.iterdir()) == ["", ".npz"] and not (cache / "nowhere").exists()


def test_a_header_with_other_counts_is_made_again(tmp_path):
  expected = _planned(tmp_path, size=12)
  (path,) = tmp_path.glob("plan-*/plan.json")
  header = json.loads(path.read_text())
  for changed in ({"records": 13}, {"records": True}, {"rejected": {"x": -1}}, {"rejected": None}, {"checksums": 7}):
    path.write_text(json.dumps(header | changed))
    _same(_planned(tmp_path, size=12), expected)
    assert json.loads(path.read_text()) == header
  path.write_text(json.dumps(header | {"tokens": "many"}))  # counted, not read
  _same(_planned(tmp_path, size=12), expected)


def test_loader_processes_get_a_path_and_not_the_arrays(tmp_path):
  plan = _planned(tmp_path, size=400).plan
  data = pickle.dumps(plan)
  assert len(data) < 300
  for a, b in zip(plan, pickle.loads(data), strict=True):
    np.testing.assert_array_equal(a, b)
  base = plan.record_ids
  while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
    base = base.base
  assert isinstance(base, np.memmap)


def _in_a_process(cache, log):
  real = lengths._measure

  def measure(*args):
    with open(log, "a") as file:
      file.write("measured\n")
    return real(*args)

  lengths._measure = measure
  _planned(cache, size=600)


def test_of_several_processes_one_plans_and_the_others_wait(tmp_path):
  context = multiprocessing.get_context("spawn")
  arguments = (str(tmp_path / "cache"), str(tmp_path / "log"))
  processes = [context.Process(target=_in_a_process, args=arguments) for _ in range(3)]
  for process in processes:
    process.start()
  for process in processes:
    process.join(120)
    assert process.exitcode == 0
  assert (tmp_path / "log").read_text() == "measured\n"
  _same(_planned(tmp_path / "cache", size=600), _planned("", size=600))


@pytest.mark.parametrize("template", ("plain", "chat"))
@pytest.mark.parametrize("task", TASKS)
def test_lengths_are_those_of_the_longest_samples(task, template):
  source = _source(task, size=40)
  sizes, rejected = lengths.measure(source, task, TOKENIZER, template, 16, "flow")
  built = [examples.build(source[i], task, TOKENIZER, template, 16, layout=FAMILY.layout) for i in range(40)]
  assert sizes.tolist() == [[len(sample.tokens), len(sample.images)] for sample in built] and not rejected


def test_records_that_cannot_be_used_have_length_0_and_a_reason():
  class Broken:
    def __len__(self):
      return 6

    def __getitem__(self, index):
      if index % 2:
        raise RecordError("corrupt", "broken")
      return _source("text")[index]

  sizes, rejected = lengths.measure(Broken(), "text", TOKENIZER, "plain", 16, "flow")
  assert (sizes[1::2] == 0).all() and (sizes[::2, 0] > 0).all() and rejected == {"corrupt": 3}


def test_processes_do_not_change_the_lengths(tmp_path, monkeypatch):
  output = str(tmp_path / "data")
  prepare("shapes", output=output, task="understanding", records=50, image_size=16, part_records=12)
  monkeypatch.setattr(lengths.derived, "find", lambda *_: None)  # measured anew
  alone = lengths.measure(PreparedSource(output, "understanding"), "understanding", TOKENIZER, "chat", 0, "flow")
  monkeypatch.setattr(lengths, "_WORTH_PROCESSES", 1)
  monkeypatch.setattr(os, "cpu_count", lambda: 2)
  shared = lengths.measure(PreparedSource(output, "understanding"), "understanding", TOKENIZER, "chat", 0, "flow")
  np.testing.assert_array_equal(alone[0], shared[0])
  assert alone[0].shape == (50, 2) and alone[1] == shared[1]
