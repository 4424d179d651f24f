"""Packing: nothing lost, nothing doubled, nothing over the budgets, and each sample as if alone."""

import numpy as np
import pytest

from jflow import batch as batch_lib
from jflow.batch import RowShape
from jflow.data import packing
from jflow.data.examples import Sample

SHAPE = RowShape(tokens=64, images=3, image_patches=4, image_size=2, writer="flow")


def _pieces(plan):
  for row in range(plan.rows):
    pieces = range(*plan.row_offsets[row : row + 2])
    yield [(int(plan.record_ids[p]), int(plan.starts[p]), int(plan.stops[p])) for p in pieces]


@pytest.mark.parametrize("seed", range(5))
def test_plan_places_each_sample_once_within_the_budgets(seed):
  rng = np.random.default_rng(seed)
  lengths = np.stack([rng.integers(0, 80, 5000), rng.integers(0, 5, 5000)], 1)
  plan = packing.plan(lengths, SHAPE, seed=0)
  fits = (lengths[:, 0] > 0) & (lengths[:, 0] <= 64) & (lengths[:, 1] <= 3)
  np.testing.assert_array_equal(np.sort(plan.record_ids), np.flatnonzero(fits))
  for row in _pieces(plan):
    records = [record for record, _, _ in row]
    assert row and lengths[records, 0].sum() <= 64 and lengths[records, 1].sum() <= 3
    for record, start, stop in row:
      assert (start, stop) == (0, lengths[record, 0])


def test_plan_is_optimal_where_that_is_known():
  # Pairs that fill a row exactly, and only in these pairs.
  big = np.arange(33, 64)
  lengths = np.stack([np.concatenate([big, 64 - big]), np.zeros(62, int)], 1)
  assert packing.plan(np.random.default_rng(0).permutation(lengths), SHAPE, seed=0).rows == 31
  # Images are the scarce budget: 3 to a row.
  assert packing.plan(np.tile([5, 1], (300, 1)), SHAPE, seed=0).rows == 100


def test_plan_of_nothing_has_no_rows():
  for lengths in (np.zeros((0, 2), int), np.array([[65, 0], [10, 4], [0, 0]])):
    assert packing.plan(lengths, SHAPE, seed=0).rows == 0
  assert packing.plan_documents(np.zeros(3, int), 64, 0).rows == 0


def _log_uniform(rng, least, most, size):
  return np.exp(rng.uniform(np.log(least), np.log(most), size)).astype(int)


def _captions(rng, size):
  """Captions of 8 to 300 tokens to paint from: BOS, caption, time token, 576 patches."""
  return np.stack([1 + 577 + _log_uniform(rng, 8, 300, size), np.ones(size, int)], 1)


def _conversations(rng, size):
  """1 to 6 turns about one picture: BOS, BOI, 576 features, EOI, a question and an answer per turn."""
  turns = rng.integers(1, 7, size)
  tokens = sum(
    np.where(turns > turn, rng.integers(8, 40, size) + _log_uniform(rng, 8, 300, size), 0) for turn in range(6)
  )
  return np.stack([1 + 578 + tokens, np.ones(size, int)], 1)


@pytest.mark.parametrize("size", [3_000, 200_000])
def test_plan_fills_rows_of_realistic_lengths(size):
  rng = np.random.default_rng(0)
  shape = RowShape(tokens=4096, images=7, image_patches=576, image_size=384, writer="flow")
  for lengths, least in ((_captions(rng, size), 0.95), (_conversations(rng, size), 0.97)):
    plan = packing.plan(lengths, shape, seed=0)
    assert lengths[:, 0].sum() / (plan.rows * shape.tokens) > least
  documents = _log_uniform(rng, 50, 20_000, size)
  assert documents.sum() / (packing.plan_documents(documents, 4096, seed=0).rows * 4096) > 0.99


def test_six_pictures_share_a_row_wherever_six_fit_on_average():
  """With 578 tokens and more per picture a seventh never fits, so that no plan has fewer rows."""
  lengths = _captions(np.random.default_rng(1), 60_000)
  shape = RowShape(tokens=4096, images=7, image_patches=576, image_size=384, writer="flow")
  assert lengths[:, 0].mean() * 6 < 4096 and lengths[:, 0].min() * 7 > 4096
  assert packing.plan(lengths, shape, seed=0).rows <= 60_000 / 6 * 1.001


def test_documents_are_cut_to_full_rows():
  rng = np.random.default_rng(0)
  lengths = rng.integers(50, 20_000, 500)
  plan = packing.plan_documents(lengths, 4096, seed=1)
  used = 0
  covered = dict.fromkeys(range(500), 0)
  for row in _pieces(plan):
    size = sum(stop - start + (start > 0) for _, start, stop in row)
    assert size <= 4096
    used += size
    for record, start, stop in row:
      assert start == covered[record] and stop > start
      covered[record] = stop
  assert all(lengths[record] - covered[record] <= 1 for record in covered)  # EOS alone is not worth a piece
  assert used / (plan.rows * 4096) > 0.995


def test_no_row_begins_a_document_in_a_corner():
  plan = packing.plan_documents(np.full(50, 60), 64, seed=0)
  for row in _pieces(plan):
    assert [stop - start for _, start, stop in row] == [60]


def _sample(rng, n, images=0, kind=batch_lib.READ):
  starts = tuple(1 + 6 * i for i in range(images))
  pixels = tuple(rng.integers(0, 256, (2, 2, 3), np.uint8) for _ in starts)
  tokens = rng.integers(0, 99, n).astype(np.int32)
  return Sample(
    tokens,
    np.append(tokens[1:], 0).astype(np.int32),
    rng.random(n) < 0.5,
    np.arange(n, dtype=np.int32),
    starts,
    (kind,) * images,
    pixels,
  )


def test_a_document_learns_each_token_once_however_it_is_cut():
  rng = np.random.default_rng(0)
  sample = _sample(rng, 50)._replace(loss_mask=np.arange(50) < 49)
  for cuts in ([50], [20, 50], [7, 8, 33, 50], [20, 49]):
    learned = []
    for start, stop in zip([0, *cuts], cuts):
      piece = packing.cut(sample, start, stop)
      assert piece.tokens[0] == sample.tokens[0]  # BOS
      np.testing.assert_array_equal(piece.positions, np.arange(len(piece.tokens)))
      inside = slice(1 if start else 0, None)
      np.testing.assert_array_equal(piece.tokens[inside], sample.tokens[start:stop])
      learned.extend(piece.targets[piece.loss_mask].tolist())
    assert learned == sample.tokens[1:].tolist()


def test_pack_lays_each_sample_out_as_if_alone():
  rng = np.random.default_rng(0)
  samples = [_sample(rng, 14, 2), _sample(rng, 9), _sample(rng, 20, 1, batch_lib.WRITE)]
  row = packing.pack(samples, SHAPE)
  offset = slot = 0
  for segment, sample in enumerate(samples, start=1):
    n = len(sample.tokens)
    alone = packing.pack([sample], SHAPE)
    span = slice(offset, offset + n)
    for name in ("tokens", "targets", "loss_mask", "positions"):
      np.testing.assert_array_equal(getattr(row, name)[span], getattr(sample, name))
      np.testing.assert_array_equal(getattr(alone, name)[:n], getattr(sample, name))
    assert (row.segment_ids[span] == segment).all() and (alone.segment_ids[:n] == 1).all()
    shifted = np.where(alone.image_index[:n] >= 0, alone.image_index[:n] + slot * SHAPE.image_slots, -1)
    np.testing.assert_array_equal(row.image_index[span], shifted)
    for start, kind, pixels in zip(sample.image_starts, sample.image_kinds, sample.images):
      np.testing.assert_array_equal(row.images[slot], pixels)
      assert row.image_start[slot] == offset + start and row.image_kind[slot] == kind
      place = row.image_index[offset + start : offset + start + SHAPE.image_slots]
      np.testing.assert_array_equal(place, slot * SHAPE.image_slots + np.arange(SHAPE.image_slots))
      slot += 1
    offset += n
  padding = packing.pack([], SHAPE)
  for values, empty in zip(row, padding):
    if values.shape == (SHAPE.tokens,):
      np.testing.assert_array_equal(values[offset:], empty[offset:])
  assert (padding.segment_ids == 0).all() and not padding.loss_mask.any() and (padding.image_index == -1).all()
  assert (row.image_index >= 0).sum() == 3 * SHAPE.image_slots
