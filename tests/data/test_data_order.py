"""Which record stands where: the same ids in the same order whoever loads them and wherever a run starts again.

The ids are read from the batches themselves: a picture's colour is its record's number, and a text says its own.
"""

import collections
import itertools
import pathlib
import re

import numpy as np
import pytest
from data_config import data_config

from jflow import batch as batch_lib
from jflow.batch import TASKS, RowShape
from jflow.data import examples, sources
from jflow.data.pipeline import Pipeline
from jflow.data.records import Record, Turn
from jflow.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(pathlib.Path(__file__).parents[2] / "configs" / "tokenizer")
SHAPE = RowShape(tokens=96, images=3, image_patches=9, image_size=6, writer="flow")
SIZES = dict(understanding=37, generation=61, text=19)
BATCH, STEPS, CHANGE = 8, 30, 14  # several epochs of each task, and a change of the mixture
MIXTURE = ((0, (30, 50, 20)), (CHANGE, (14, 60, 26)))


class Marked:
  """Records that say their number: pictures by their colour, documents in every few words. Picklable."""

  def __init__(self, task):
    self.task = task

  def __len__(self):
    return SIZES[self.task]

  def __getitem__(self, index):
    if self.task == "text":  # many are longer than a row, and so are cut
      return Record(str(index), (), f"n{index} said. " * (3 + index * 7 % 40), ())
    image = np.full((7, 7 + index % 3, 3), index, np.uint8)
    if self.task == "generation":
      return Record(str(index), (image,), f"the number {index} in words. It is painted." * (1 + index % 2), ())
    turns = (Turn("user", "<image>\nWhich?"), Turn("assistant", "That one." * (1 + index % 4)))
    return Record(str(index), (image,), "", turns)


@pytest.fixture(autouse=True)
def marked(monkeypatch):
  monkeypatch.setattr(sources, "open_source", lambda spec, task, config: Marked(task))


def pipeline(share=None, seed=5, **changes):
  fields = dict(
    first_sentence=0.25,
    prompt_drop=0.1,
    threads=2,
    prefetch=2,
    mixture=MIXTURE,
    sources=dict.fromkeys(TASKS, (("marked", 1.0),)),
  )
  return Pipeline(data_config(**fields | changes), TOKENIZER, SHAPE, BATCH, seed, share)


def ids(batch):
  """The records of each row of a batch, in order: [[(task, record), ...], ...]."""
  rows = []
  for row in range(len(batch.tokens)):
    found = []
    for segment in range(1, batch.segment_ids[row].max() + 1):
      where = np.flatnonzero(batch.segment_ids[row] == segment)
      slots = np.unique(batch.image_index[row][where] // SHAPE.image_slots)
      slots = slots[slots >= 0]
      if len(slots):
        kind = batch.image_kind[row, slots[0]]
        task = "understanding" if kind == batch_lib.READ else "generation"
        found.append((task, int(batch.images[row, slots[0], 3, 3, 0])))
      else:
        text = TOKENIZER.decode(batch.tokens[row][where])
        names = re.findall(r"n(\d+) said", text)  # none in the last words of a document that was cut
        found.append(("text", int(collections.Counter(names).most_common(1)[0][0]) if names else text))
    rows.append(found)
  return rows


def loaded(first, last, **changes):
  return [ids(batch) for batch, _ in pipeline(**changes).batches(first, last)]


@pytest.fixture(scope="module")
def count():
  """Counts the ids that the tests of this file compare, and says how many at the end."""
  totals = collections.Counter()
  yield totals
  print(f"\nids compared: {totals['compared']:,}, mismatches {totals['mismatches']}")


def compare(count, got, wanted):
  flat = lambda steps: list(itertools.chain.from_iterable(itertools.chain.from_iterable(steps)))
  one, two = flat(got), flat(wanted)
  count["compared"] += len(two)
  count["mismatches"] += sum(a != b for a, b in zip(one, two)) + abs(len(one) - len(two))
  assert got == wanted


@pytest.fixture(scope="module")
def order():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sources, "open_source", lambda spec, task, config: Marked(task))
    return [ids(pipeline().batch(step)) for step in range(STEPS)]


def test_the_ids_of_the_batches_are_those_of_the_plan(order, count):
  rows = pipeline()
  wanted = [
    [[(task, piece.record) for piece in pieces] for task, _, pieces in rows.pieces(step)] for step in range(STEPS)
  ]
  named = [
    [[w if isinstance(g[1], str) else g for g, w in zip(got, want, strict=True)] for got, want in zip(*step)]
    for step in zip(order, wanted)
  ]
  compare(count, named, wanted)


@pytest.mark.parametrize("workers, threads", [(0, 1), (0, 5), (1, 2), (3, 1)])
def test_workers_do_not_change_the_order(order, count, workers, threads):
  compare(count, loaded(0, STEPS, workers=workers, threads=threads), order)


def test_workers_do_not_change_the_order_of_blocks(count):
  fields = dict(order="blocks", block_records=8, block_window=2, block_lanes=2)
  compare(count, loaded(9, 15, workers=1, **fields), loaded(9, 15, **fields))


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_the_union_over_hosts_is_the_global_order(order, count, hosts):
  parts = [loaded(0, STEPS, share=share) for share in np.arange(BATCH).reshape(hosts, -1)]
  compare(count, [list(itertools.chain(*rows)) for rows in zip(*parts)], order)


def test_a_restart_at_any_step_goes_on_with_the_next_batch(order, count):
  """With another number of hosts than before."""
  for step in range(STEPS):
    hosts = (1, 2, 4)[step % 3]
    parts = [loaded(step, step + 1, share=share) for share in np.arange(BATCH).reshape(hosts, -1)]
    compare(count, [list(itertools.chain(*rows)) for rows in zip(*parts)], order[step : step + 1])


@pytest.mark.parametrize("task", ["understanding", "generation"])
def test_across_epoch_edges_no_record_is_missing_or_doubled(order, count, task):
  shown = [record for step in order for row in step for name, record in row if name == task]
  epochs = [shown[i : i + SIZES[task]] for i in range(0, len(shown), SIZES[task])]
  assert len(epochs) > 2
  for epoch in epochs[:-1]:
    compare(count, [[sorted(epoch)]], [[list(range(SIZES[task]))]])
  assert len(set(epochs[-1])) == len(epochs[-1])
  assert epochs[0] != epochs[1]


def test_inside_packed_documents_no_token_is_missing_or_doubled(count):
  """Documents that go on in another row, another step and on another host are learned once, whole."""
  rows = pipeline()
  learned = collections.defaultdict(list)
  places = collections.defaultdict(set)
  for step in range(STEPS):
    batch = rows.batch(step)
    for place, (task, _, pieces) in enumerate(rows.pieces(step)):
      for segment, piece in enumerate(pieces, start=1):
        if task == "text":
          where = (batch.segment_ids[place] == segment) & batch.loss_mask[place]
          learned[piece.epoch, piece.record].append((piece.start, batch.targets[place][where].tolist()))
          places[piece.epoch, piece.record].add((step, place))  # with 8 hosts, the place is the host
  assert sum(len(x) > 1 for x in places.values()) > 10 and len({h for x in places.values() for _, h in x}) > 1
  whole = 0
  last = max(epoch for epoch, _ in learned)
  for (epoch, record), pieces in learned.items():
    if epoch < last:
      tokens = [token for _, targets in sorted(pieces) for token in targets]
      wanted = examples.build(Marked("text")[record], "text", TOKENIZER, "plain", 9).tokens[1:].tolist()
      compare(count, [[tokens]], [[wanted]])
      whole += 1
  assert last >= 1 and whole == last * SIZES["text"]


def test_a_rerun_repeats_every_draw_and_another_epoch_or_seed_does_not():
  """First sentences, dropped prompts and squares depend on (seed, epoch, record) alone."""

  def drawn(seed, batch_size, epochs):
    config = dict(mixture=((0, (0, 1, 0)),), prompt_drop=0.5, first_sentence=0.5)
    rows = pipeline(seed=seed, share=range(batch_size), **config)
    out, step = {}, 0
    while len(out) < epochs * SIZES["generation"]:
      batch = rows.batch(step)
      for place, (_, _, pieces) in enumerate(rows.pieces(step)):
        for segment, piece in enumerate(pieces, start=1):
          tokens = batch.tokens[place][batch.segment_ids[place] == segment]
          out.setdefault((piece.epoch, piece.record), tokens.tolist())
      step += 1
    return out

  first, again = drawn(5, 8, 2), drawn(5, 3, 1)
  assert {key: first[key] for key in again if key in first} == {k: v for k, v in again.items() if k in first}
  records = range(SIZES["generation"])
  assert any(first[0, record] != first[1, record] for record in records)
  other = drawn(6, 8, 1)
  assert any(first[0, record] != other[0, record] for record in records if (0, record) in other)


def test_batches_keep_to_the_mixture_and_stage_2_changes_at_step_10_000(order):
  """Rows of a task since the mixture last changed are never a whole row off their share of all rows."""
  for (start, weights), stop in zip(MIXTURE, (CHANGE, STEPS)):
    rows = collections.Counter()
    for step in range(start, stop):
      rows += collections.Counter(row[0][0] for row in order[step])
      assert rows.total() == BATCH * (step + 1 - start)
      for task, weight in zip(TASKS, weights):
        assert abs(rows[task] - rows.total() * weight / 100) < 1
  stage2 = pipeline(mixture=((0, (30, 50, 20)), (10_000, (14, 80, 6))))
  for step, exact in ((9_999, (2.4, 4.0, 1.6)), (10_000, (1.12, 6.4, 0.48))):
    rows = collections.Counter(row[0][0] for row in ids(stage2.batch(step)))
    assert all(abs(rows[task] - share) < 1 for task, share in zip(TASKS, exact))
    assert stage2.counts(step) == {task: rows[task] for task in TASKS}
