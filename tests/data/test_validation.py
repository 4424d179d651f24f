"""Held-out records: chosen by their pictures or texts alone, never trained on, the same batches at every loss."""

import dataclasses
import pathlib

import numpy as np
import pytest
from data_config import data_config
from refusals import refused

from jflow.batch import TASKS, RowShape
from jflow.data.held_out import held_out, is_held_out
from jflow.data.pipeline import Pipeline
from jflow.data.records import Record, Turn
from jflow.data.tokenizer import Tokenizer
from jflow.data.validation import HeldOut
from jflow.world.scenes import Scene

TOKENIZER = Tokenizer.load(pathlib.Path(__file__).parents[2] / "configs" / "tokenizer")
SHAPE = RowShape(tokens=96, images=3, image_patches=9, image_size=6, writer="flow")
SHARE = 0.25


def records(count):
  return [Record(f"{i}.jpg", (f"picture {i}".encode(),), f"caption {i}", ()) for i in range(count)]


def config(**changes):
  fields = dict(validation=SHARE, mixture=(), shapes=dataclasses.replace(data_config().shapes, size=150))
  return data_config(dict.fromkeys(TASKS, (("shapes", 1.0),)), **fields | changes)


def test_a_record_keeps_its_side_when_others_come_and_it_moves():
  first, later = records(1000), records(3000)[::-1]
  chosen = dict(zip((r.id for r in first), held_out(first, SHARE), strict=True))
  again = dict(zip((r.id for r in later), held_out(later, SHARE), strict=True))
  assert chosen.items() <= again.items()
  assert abs(sum(again.values()) / len(again) - SHARE) < 0.03


def test_an_inserted_line_moves_no_record():
  """Ids are often numbers of lines, which an earlier line shifts."""
  texts = [Record(str(i), (), f"text {i}", ()) for i in range(200)]
  shifted = [Record("0", (), "a new text", ()), *(text._replace(id=str(i + 1)) for i, text in enumerate(texts))]
  assert (held_out(shifted, SHARE)[1:] == held_out(texts, SHARE)).all()


@pytest.mark.parametrize(
  "image", [str.encode, lambda name: np.full((1, 1, 3), int(name), np.uint8), lambda name: Scene((), int(name), ())]
)
def test_all_that_is_said_of_a_picture_is_on_one_side(image):
  one = [Record(str(i), (image(f"{i:03d}"),), f"a caption of {i}", ()) for i in range(200)]
  other = [record._replace(id=record.id + "b", text="another", turns=(Turn("user", "Why?"),)) for record in one]
  sides = held_out(one, SHARE)
  assert (held_out(other, SHARE) == sides).all() and 20 < sides.sum() < 80


def test_a_larger_share_holds_out_more_of_the_same():
  small, large = held_out(records(500), 0.1), held_out(records(500), 0.3)
  assert (large >= small).all() and large.sum() > small.sum() > 0
  assert not is_held_out(records(1)[0], 0.0)


@pytest.fixture(scope="module")
def both():
  data = config()
  return Pipeline(data, TOKENIZER, SHAPE, 6, 1), HeldOut(data, TOKENIZER, SHAPE, 6, 1)


def test_no_held_out_record_is_trained_on_and_none_is_lost(both):
  pipeline, validation = both
  for trained, held in zip(pipeline.sources(), validation.sources, strict=True):
    ours, theirs = set(trained.plan.record_ids.tolist()), set(held.plan.record_ids.tolist())
    assert ours and theirs and not ours & theirs
    lost = trained.rejected.total() + held.rejected.total()
    assert len(ours | theirs) + lost == trained.planned.records


def test_batches_are_the_same_and_hosts_share_them(both):
  _, validation = both
  again = [
    HeldOut(config(prompt_drop=0.9, first_sentence=0.9), TOKENIZER, SHAPE, 6, 1, share)
    for share in ((0, 1, 2), (3, 4, 5))
  ]
  (whole, lost), *parts = validation.batches, *(one.batches[0] for one in again)
  assert not lost and len(whole) == -(-validation.rows // 6)
  for batch, *halves in zip(whole, *parts, strict=True):
    for name, x, a, b in zip(batch._fields, batch, *halves):
      np.testing.assert_array_equal(x, np.concatenate([a, b]), err_msg=name)


def test_there_is_room_for_the_images_of_every_shard(both):
  _, validation = both
  reads, writes, images, samples = validation.most(3, 2)
  for batch in validation.batches[0]:
    kinds = batch.image_kind.reshape(3, 1, 2, -1)
    counts = [int((mask).sum(axis=(1, 3)).max()) for mask in (kinds == 1, kinds == 2, kinds > 0)]
    assert np.all(np.array(counts) <= (reads, writes, images)) and batch.segment_ids.max() <= samples


def test_a_share_that_holds_out_nothing_is_refused():
  with refused("data.validation=1e-09", "must be larger"):
    HeldOut(config(validation=1e-9), TOKENIZER, SHAPE, 6, 1)
