"""Packing: a static plan says which samples share a row, and `pack` lays them out.

Whole samples are placed by first fit decreasing inside windows of records, against the row's token and image
budgets. Documents are cut where a row ends, so that text rows are full.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jflow import batch as batch_lib
from jflow.batch import Batch, RowShape
from jflow.data.examples import Sample

WINDOW = 2048
# A document is not begun, and not cut, so that a piece shorter than this stands in a row.
MIN_PIECE = 16


class Plan(NamedTuple):
  """Rows of records. Row r holds the pieces row_offsets[r] to row_offsets[r + 1]."""

  row_offsets: np.ndarray  # int64[rows + 1]
  record_ids: np.ndarray  # int64[pieces]
  starts: np.ndarray  # int32[pieces]; first token of the piece in its sample
  stops: np.ndarray  # int32[pieces]; one past the last

  @property
  def rows(self) -> int:
    return len(self.row_offsets) - 1


def plan(lengths: np.ndarray, shape: RowShape) -> Plan:
  """Places whole samples in rows. A sample that no row can hold is left out, as is one of length 0.

  Args:
    lengths: int[N, 2]; tokens and images of each sample.
    shape: the row's budgets.

  Returns:
    The plan; records of a window of `WINDOW` stay together, longest first in each row.
  """
  limits = np.array([shape.tokens, shape.images], np.int64)
  lengths = np.asarray(lengths, np.int64)
  usable = np.flatnonzero((lengths[:, 0] > 0) & (lengths <= limits).all(axis=1))
  rows: list[list[int]] = []
  for start in range(0, len(usable), WINDOW):
    window = usable[start:start + WINDOW]
    tokens, images = lengths[window].T
    # Samples with more of what is scarcer come first; the sort is stable, so that the plan is too.
    need = np.maximum(tokens / limits[0], images / max(limits[1], 1))
    order = np.argsort(-need, kind="stable")
    rows.extend(_first_fit(window[order].tolist(), tokens[order].tolist(), images[order].tolist(), limits.tolist()))
  record_ids = np.fromiter((r for row in rows for r in row), np.int64)
  row_offsets = np.zeros(len(rows) + 1, np.int64)
  np.cumsum([len(row) for row in rows], out=row_offsets[1:])
  return Plan(row_offsets, record_ids, np.zeros(len(record_ids), np.int32),
              lengths[record_ids, 0].astype(np.int32))


def plan_documents(lengths: np.ndarray, row_tokens: int, seed: int) -> Plan:
  """Fills rows with documents in a random order, cut where a row ends.

  The part of a document that goes on in the next row takes one slot more there, for its BOS.

  Args:
    lengths: int[N]; tokens of each document, BOS and EOS included; 0 leaves the document out.
    row_tokens: tokens of a row.
    seed: chooses the order.
  """
  lengths = np.asarray(lengths, np.int64)
  order = np.random.default_rng(seed).permutation(np.flatnonzero(lengths > 0))
  record_ids, starts, stops, row_offsets = [], [], [], [0]
  room = row_tokens
  for record, length in zip(order.tolist(), lengths[order].tolist()):
    start = 0
    # What is left of a document after a cut is worth a piece only where it holds more than EOS, already learned.
    while length - start > (1 if start else 0):
      extra = 1 if start else 0
      take = min(length - start, room - extra)
      if take < min(MIN_PIECE, length - start):
        row_offsets.append(len(record_ids))
        room = row_tokens
        continue
      record_ids.append(record)
      starts.append(start)
      stops.append(start + take)
      start += take
      room -= take + extra
  if len(record_ids) > row_offsets[-1]:
    row_offsets.append(len(record_ids))
  return Plan(np.array(row_offsets, np.int64), np.array(record_ids, np.int64), np.array(starts, np.int32),
              np.array(stops, np.int32))


def cut(sample: Sample, start: int, stop: int) -> Sample:
  """Returns the piece [start, stop) of a text sample; a later piece begins with BOS again.

  The last position of a piece still learns the token that follows in the document, so that each token of a
  document is learned once however it is cut.
  """
  if start == 0 and stop == len(sample.tokens):
    return sample
  pieces = [sample.tokens[start:stop], sample.targets[start:stop], sample.loss_mask[start:stop]]
  if start:
    heads = (sample.tokens[0], sample.tokens[start], False)
    pieces = [np.insert(piece, 0, head) for piece, head in zip(pieces, heads)]
  return Sample(*pieces, np.arange(len(pieces[0]), dtype=np.int32), (), (), ())


def pack(samples: Sequence[Sample], shape: RowShape) -> Batch:
  """Lays samples out in one row, one behind the other.

  Args:
    samples: the samples; their images are pixels, uint8[H, W, 3], by now.
    shape: the row's budgets, which the samples keep.

  Returns:
    The arrays of `Batch` without the leading axis.
  """
  row = Batch(*(array[0] for array in batch_lib.empty(1, shape)))
  offset, slot, k = 0, 0, shape.image_slots
  for segment, sample in enumerate(samples, start=1):
    span = slice(offset, offset + len(sample.tokens))
    row.tokens[span] = sample.tokens
    row.targets[span] = sample.targets
    row.loss_mask[span] = sample.loss_mask
    row.positions[span] = sample.positions
    row.segment_ids[span] = segment
    for start, kind, pixels in zip(sample.image_starts, sample.image_kinds, sample.images):
      row.image_index[offset + start:offset + start + k] = slot * k + np.arange(k)
      row.images[slot] = pixels
      row.image_start[slot] = offset + start
      row.image_kind[slot] = kind
      slot += 1
    offset = span.stop
  return row


def _first_fit(records: list[int], tokens: list[int], images: list[int], limits: list[int]) -> list[list[int]]:
  """Puts each record, in the given order, in the first row that has room for it."""
  rows: list[list[int]] = []
  token_room: list[int] = []
  image_room: list[int] = []
  first = 0  # rows before it are full
  for record, t, i in zip(records, tokens, images):
    for row in range(first, len(rows)):
      if token_room[row] >= t and image_room[row] >= i:
        break
    else:
      row = len(rows)
      rows.append([])
      token_room.append(limits[0])
      image_room.append(limits[1])
    rows[row].append(record)
    token_room[row] -= t
    image_room[row] -= i
  return rows
