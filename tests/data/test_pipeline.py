"""The pipeline: the batch of a step is a pure function of the step, whoever makes it."""

import collections
import io
import pathlib
import re
import types

import numpy as np
import pytest
from data_config import data_config
from PIL import Image
from refusals import refused

from jflow import batch as batch_lib
from jflow.batch import TASKS, RowShape
from jflow.data import examples, images, packing, sources
from jflow.data.pipeline import Pipeline
from jflow.data.records import Record, RecordError, Turn
from jflow.data.tokenizer import Tokenizer
from jflow.generation.flow import FAMILY

TOKENIZER = Tokenizer.load(pathlib.Path(__file__).parents[2] / "configs" / "tokenizer")
SHAPE = RowShape(tokens=96, images=3, image_patches=9, image_size=6, writer="flow")


class Numbers:
  """Records whose texts and pixels tell their index. `bad` ones have an image that cannot be decoded."""

  def __init__(self, task, size, bad=(), long=(), lost=()):
    self.task, self.size, self.bad, self.long, self.lost = task, size, bad, long, lost

  def __len__(self):
    return self.size

  def __getitem__(self, index):
    if index in self.lost:
      raise RecordError("corrupt", f"record {index}")
    image = b"damaged" if index in self.bad else np.full((8, 12, 3), index % 251, np.uint8)
    text = f"number {index}. It is {index}." + " and so on" * (100 if index in self.long else index % 5)
    if self.task == "understanding":
      return Record(str(index), (image,), "", (Turn("user", "<image>\nWhich?"), Turn("assistant", text)))
    return Record(str(index), (image,) if self.task == "generation" else (), text, ())


@pytest.fixture
def opened(monkeypatch):
  """Lets a spec be a mapping of Numbers' options; returns the list of what was opened."""
  log = []

  def open_source(spec, task, config):
    log.append(Numbers(task, **{**vars(config.shapes), **spec}))
    return log[-1]

  monkeypatch.setattr(sources, "open_source", open_source)
  return log


SOURCES = {task: (({}, 1.0),) for task in TASKS}


def _config(**changes):
  fields = dict(
    first_sentence=0.25,
    prompt_drop=0.1,
    threads=2,
    prefetch=2,
    shapes={"size": 101},
    mixture=((0, (30, 50, 20)), (6, (14, 80, 6))),
    sources=SOURCES,
  )
  fields |= changes
  if isinstance(fields["shapes"], dict):
    fields["shapes"] = types.SimpleNamespace(**fields["shapes"])
  return data_config(**fields)


def _pipeline(batch_size=8, share=None, seed=5, shape=SHAPE, **changes):
  return Pipeline(_config(**changes), TOKENIZER, shape, batch_size, seed, share)


def _same(first, second):
  for name, a, b in zip(first._fields, first, second):
    np.testing.assert_array_equal(a, b, err_msg=name)
    assert a.dtype == b.dtype


def _segments(batch):
  """Yields (row, text) of each sample of a batch."""
  for row, segments in enumerate(batch.segment_ids):
    for segment in range(1, segments.max() + 1):
      yield row, TOKENIZER.decode(batch.tokens[row][segments == segment])


def _index(text):
  return int(text.split("number ")[1].split(".")[0])


@pytest.mark.parametrize("shards, accumulation", [(1, 1), (2, 2)])
def test_no_batch_holds_more_than_the_pipeline_says(opened, shards, accumulation):
  """Images to read, to write and of both on a device at once, and samples of a row; and some batch holds as much."""
  pipeline, seen = _pipeline(), np.zeros(4, int)
  said = pipeline.most(shards, accumulation)
  for step in range(12):
    batch = pipeline.batch(step)
    kinds = batch.image_kind.reshape(shards, -1, accumulation, batch.image_kind.shape[1])
    masks = (kinds == batch_lib.READ, kinds == batch_lib.WRITE, kinds > 0)
    most = [mask.sum(axis=(1, 3)).max() for mask in masks]
    seen = np.maximum(seen, [*most, batch.segment_ids.max()])
  assert (seen <= said).all() and seen[1] == said[1] and seen[3] == said[3]


def test_a_row_with_more_images_than_its_plan_ends_the_run(opened):
  pipeline = _pipeline()
  (rows,) = [rows for rows in pipeline.sources() if rows.task == "generation"]
  rows.most_images -= 1
  with refused("3 images", "2"):
    [pipeline.batch(step) for step in range(4)]


def test_batch_has_the_shapes_it_promises(opened):
  batch = _pipeline().batch(0)
  for got, expected in zip(batch, batch_lib.empty(8, SHAPE)):
    assert got.shape == expected.shape and got.dtype == expected.dtype
  kinds = [frozenset(row.tolist()) - {batch_lib.NONE} for row in batch.image_kind]
  assert collections.Counter(kinds) == {  # understanding, generation, text
    frozenset({batch_lib.READ}): 2,
    frozenset({batch_lib.WRITE}): 4,
    frozenset(): 2,
  }


def test_a_step_is_the_same_from_a_new_pipeline_in_any_order(opened):
  steps = [9, 0, 5, 6, 40]
  first = _pipeline()
  batches = {step: first.batch(step) for step in steps}
  for step in sorted(steps):
    _same(_pipeline().batch(step), batches[step])
    _same(first.batch(step), batches[step])
  assert (batches[0].tokens != batches[9].tokens).any()
  assert (_pipeline(seed=6).batch(0).tokens != batches[0].tokens).any()


@pytest.mark.parametrize(
  "changes",
  [dict(threads=1, prefetch=1), dict(threads=7, prefetch=9), dict(workers=1), dict(workers=3)],
  ids=str,
)
def test_loaders_do_not_change_the_batches(opened, changes):
  expected = _pipeline()
  start, stop = 3, 11  # across the change of the mixture at 6
  batches = list(_pipeline(**changes).batches(start, stop))
  assert len(batches) == stop - start
  for step, (batch, info) in zip(range(start, stop), batches):
    _same(batch, expected.batch(step))
    assert info["packs"] == expected.counts(step) and sum(info["packs"].values()) == len(batch.tokens)
    assert info["packs"]["generation"] == (batch.image_kind == batch_lib.WRITE).any(axis=1).sum()
    assert info["fill"] == (batch.segment_ids > 0).mean() and info["rejected"] == {}


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_batch(opened, hosts):
  whole, parts = _pipeline(), [_pipeline(share=part) for part in np.arange(8).reshape(hosts, -1)]
  for step in (0, 6, 40):
    joined = [np.concatenate(arrays) for arrays in zip(*(part.batch(step) for part in parts))]
    _same(whole.batch(step), batch_lib.Batch(*joined))


def test_an_epoch_shows_each_record_once_and_the_next_in_another_order(opened):
  for number, task in enumerate(TASKS):
    weights = tuple(int(i == number) for i in range(3))
    pipeline = _pipeline(batch_size=1, mixture=((0, weights),), prompt_drop=0.0, first_sentence=0.0)
    (rows,) = (source.plan.rows for source in pipeline.sources())
    epochs = []
    for epoch in range(2):
      texts = [text for step in range(rows) for _, text in _segments(pipeline.batch(epoch * rows + step))]
      epochs.append([_index(text) for text in texts if "number" in text])
      if task != "text":
        assert sorted(epochs[-1]) == list(range(101))
      else:  # a cut may fall inside the number
        assert len(set(epochs[-1])) >= 95 and max(collections.Counter(epochs[-1]).values()) <= 2
    assert epochs[0] != epochs[1]


def test_samples_are_those_made_alone(opened):
  pipeline = _pipeline(mixture=((0, (1, 1, 0)),), prompt_drop=0.0)
  batch, tasks = pipeline.batch(0), [task for task, *_ in pipeline.pieces(0)]
  for task in ("understanding", "generation"):
    row = tasks.index(task)
    made = []
    for _, text in [s for s in _segments(batch) if s[0] == row]:
      record = Numbers(task, 101)[_index(text)]
      variants = [
        examples.build(record._replace(text=caption), task, TOKENIZER, "plain", 9, layout=FAMILY.layout)
        for caption in (record.text, examples.first_sentence_of(record.text))
      ]
      sample = next(v for v in variants if TOKENIZER.decode(v.tokens) == text)
      resize = (
        images.for_understanding
        if task == "understanding"
        else (lambda image, size: images.for_generation(image, size, np.random.default_rng(0)))
      )
      made.append(sample._replace(images=tuple(resize(image, 6) for image in sample.images)))
    for got, expected in zip(batch, packing.pack(made, SHAPE)):
      np.testing.assert_array_equal(got[row], expected)


def test_randomness_differs_between_epochs(opened):
  pipeline = _pipeline(batch_size=1, mixture=((0, (0, 1, 0)),), prompt_drop=0.5, first_sentence=0.0)
  rows = pipeline.sources()[0].plan.rows
  kept = [
    {
      _index(text)
      for step in range(rows)
      for _, text in _segments(pipeline.batch(epoch * rows + step))
      if "number" in text
    }
    for epoch in range(2)
  ]
  assert all(25 < len(k) < 76 for k in kept) and kept[0] != kept[1]


def test_a_bad_image_costs_its_sample_alone(opened):
  good = _pipeline(mixture=((0, (1, 0, 0)),))
  bad = _pipeline(mixture=((0, (1, 0, 0)),), shapes={"size": 101, "bad": (3, 50)})
  steps = -(-good.sources()[0].plan.rows // 8)
  lost, counted, named = collections.Counter(), collections.Counter(), collections.Counter()
  for step, (batch, info) in enumerate(bad.batches(0, steps)):
    expected = [text for _, text in _segments(good.batch(step))]
    got = [text for _, text in _segments(batch)]
    lost.update(_index(text) for text in expected)
    lost.subtract(_index(text) for text in got)
    counted.update(info["rejected"])
    named.update(int(re.search(r"understanding record (\d+): ", message)[1]) for message in info["messages"])
    assert (batch.image_kind == batch_lib.READ).sum() == len(got)
    assert set(got) <= set(expected)
  assert named == +lost
  assert set(+lost) == {3, 50} and counted == {"format": sum((+lost).values())}


def test_too_many_bad_images_stop_the_run(opened):
  pipeline = _pipeline(mixture=((0, (1, 0, 0)),), shapes={"size": 100, "bad": tuple(range(50))})
  with refused("format", "max_rejected_share", "0.01"):
    for _ in pipeline.batches(0, 100):
      pass


def test_records_that_do_not_fit_are_left_out_and_counted(opened):
  pipeline = _pipeline(shapes={"size": 50, "long": (4, 5), "lost": (7,)})
  for number, task in enumerate(TASKS):
    rows = pipeline.sources()[number]
    assert rows.rejected == ({"corrupt": 1} if task == "text" else {"too_long": 2, "corrupt": 1})
    expected = set(range(50)) - {7} - (set() if task == "text" else {4, 5})
    assert set(rows.plan.record_ids.tolist()) == expected


def test_sources_of_a_task_share_its_rows_by_weight(opened):
  mixed = {**SOURCES, "text": (({"size": 30}, 1.0), ({"size": 200}, 3.0))}
  pipeline = _pipeline(mixture=((0, (0, 0, 1)),), sources=mixed)
  counts = collections.Counter(pipeline._interleaves[2][row][0] for row in range(1000))
  assert counts == {0: 250, 1: 750}
  assert len(opened) == 2  # those of tasks without a share stay closed


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(mixture=((0, (1, 1)),)), "mixture"),
    (dict(sources={**SOURCES, "text": ()}, mixture=((0, (0, 0, 1)),)), "data.mixture"),
    (dict(sources={}), "data.sources.text"),
    (dict(shape=RowShape(10, 3, 9, 6, "flow")), "data.row_tokens is 10"),
    (dict(shape=RowShape(12, 3, 9, 6, "flow")), "101 understanding records"),
    (dict(shape=RowShape(96, 0, 9, 6, "flow")), "0 images"),
  ],
  ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_mistakes_get_one_clear_line(opened, changes, message):
  with refused(message):
    _pipeline(**changes)


def test_unknown_sources_are_named():
  with refused("no/such/place"):
    sources.open_source("no/such/place", "text", data_config())


@pytest.mark.parametrize("template", ("plain", "chat"))
def test_the_built_in_world_fills_batches(template):
  config = _config(
    template=template,
    shapes=data_config().shapes.replace(size=200),
    sources=dict.fromkeys(TASKS, (("shapes", 1.0),)),
  )
  shape = RowShape(tokens=160, images=3, image_patches=16, image_size=32, writer="flow")
  pipeline = Pipeline(config, TOKENIZER, shape, 8, 0)
  for batch, info in pipeline.batches(0, 4):
    assert info["fill"] > 0.6 and not info["rejected"]
    held = batch.image_kind != batch_lib.NONE
    assert (batch.images[held].reshape(held.sum(), -1).std(axis=1) > 3).all()  # something is drawn
    painted = (batch.image_kind == batch_lib.WRITE).any(axis=1)
    assert (batch.loss_mask.any(axis=1) == ~painted).all() and painted.sum() == 4
    assert (batch.segment_ids[batch.loss_mask] > 0).all()


def test_an_empty_mixture_follows_the_rows_and_steps_follow_the_passes(opened):
  pipeline = _pipeline(
    batch_size=1, mixture=(), shapes={"size": 40}, sources={**SOURCES, "text": (({"size": 5}, 1.0),)}
  )
  rows = [one.plan.rows for one in pipeline.sources()]
  total = pipeline.steps_of(1.0)
  assert total == sum(rows) and pipeline.steps_of(2.5) == int(np.ceil(2.5 * total))
  drawn = collections.Counter(task for step in range(total) for task, _, _ in pipeline.pieces(step))
  assert all(abs(drawn[task] - count) <= 1 for task, count in zip(TASKS, rows, strict=True))


def test_a_type_without_a_source_leaves_the_mixture_and_it_is_said(opened):
  left = _pipeline(sources={"generation": SOURCES["generation"]})
  assert set(left.counts(0)) == set(TASKS) and left.counts(0)["generation"] == 8 == left.counts(7)["generation"]
  assert sum("is empty" in line for line in left.report()) == 2
  alone = _pipeline(sources={"generation": SOURCES["generation"]}, mixture=((0, (0, 1, 0)),))
  _same(left.batch(3), alone.batch(3))


def test_pictures_to_read_change_only_where_the_config_says_so(opened, monkeypatch):
  """Those to write and all else of a batch stay, whatever `data.decode` is."""
  soft = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)).resize((70, 50))
  buffer = io.BytesIO()
  soft.save(buffer, "JPEG", quality=95)
  number = Numbers.__getitem__
  monkeypatch.setattr(
    Numbers,
    "__getitem__",
    lambda self, i: number(self, i)._replace(images=self.task != "text" and (buffer.getvalue(),) or ()),
  )
  exact, scaled = (Pipeline(_config(decode=decode), TOKENIZER, SHAPE, 10, 0).batch(0) for decode in ("exact", "scaled"))
  read = exact.image_kind == batch_lib.READ
  assert (exact.images[read] != scaled.images[read]).any() and (
    exact.images[read][0] == images.for_understanding(buffer.getvalue(), 6)
  ).all()
  for name, one, two in zip(exact._fields, exact, scaled, strict=True):
    np.testing.assert_array_equal(one[~read] if name == "images" else one, two[~read] if name == "images" else two)
