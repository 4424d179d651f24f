"""Packing: a static plan of the samples in each row, and their layout (`pack`).

Whole samples are placed within the row's token and image budgets. Documents are cut where a row ends, so that text rows
are full.
"""

import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jflow import batch as batch_lib
from jflow.batch import Batch, RowShape
from jflow.data.examples import Sample

# Fewest tokens in the first piece of a document that is cut; a later piece may be shorter.
MIN_PIECE = 16


class Plan(NamedTuple):
  """A plan of packed rows. Row r holds the pieces row_offsets[r] to row_offsets[r + 1]."""

  row_offsets: np.ndarray  # int64[rows + 1]
  record_ids: np.ndarray  # int32[pieces], int64 beyond 2**31 records
  starts: np.ndarray  # int32[pieces]; first token of the piece in its sample
  stops: np.ndarray  # int32[pieces]; one past the last

  @property
  def rows(self) -> int:
    return len(self.row_offsets) - 1

  def slices(self) -> list[slice]:
    """Slices that together hold all pieces, each few enough for temporary arrays."""
    return slices(len(self.record_ids))

  def most_pieces(self) -> int:
    """The most pieces that a row holds."""
    return max((int(np.diff(self.row_offsets[s.start : s.stop + 1]).max()) for s in slices(self.rows)), default=0)


def slices(length: int) -> list[slice]:
  """Cuts an array of a length into slices of 4 Mi."""
  return [slice(first, min(first + 2**22, length)) for first in range(0, length, 2**22)]


def tokens(plan: Plan) -> int:
  """The number of tokens in all rows; a piece that continues a document has a BOS of its own."""
  return sum(
    int((plan.stops[s] - plan.starts[s]).sum(dtype=np.int64) + (plan.starts[s] > 0).sum()) for s in plan.slices()
  )


def plan(lengths: np.ndarray, shape: RowShape, seed: int) -> Plan:
  """Plans rows of whole samples. A sample that no row can hold is left out, as is one of length 0.

  There are few distinct sizes: a pattern of sizes that fills a row is found once and repeated until one of its sizes
  runs out. Of two ways to choose patterns (see `_patterns`), the one with fewer rows wins. Records of the same size are
  assigned at random.

  Args:
    lengths: int[N, 2]; tokens and images of each sample.
    shape: the row's budgets.
    seed: chooses among records of the same size.
  """
  lengths = np.asarray(lengths)
  usable = (lengths[:, 0] > 0) & (lengths[:, 0] <= shape.tokens) & (lengths[:, 1] <= shape.images)
  order = np.random.default_rng(seed).permutation(np.flatnonzero(usable).astype(index_type(len(lengths))))
  keys = (lengths[:, 1] * (shape.tokens + 1) + lengths[:, 0]).astype(np.int32)[order]
  order = order[np.argsort(keys, kind="stable")]
  counts = np.bincount(keys, minlength=(shape.images + 1) * (shape.tokens + 1))
  taken = np.cumsum(counts) - counts  # where the unused records of each size begin in `order`
  record_ids, sizes = [np.zeros(0, order.dtype)], [np.zeros(0, np.int64)]
  grid = counts.reshape(shape.images + 1, shape.tokens + 1)
  choices = [list(_patterns(grid.copy(), even)) for even in (False, True)]
  for pattern, times in min(choices, key=lambda patterns: sum(times for _, times in patterns)):
    columns = np.empty((times, len(pattern)), order.dtype)
    for column, (images, tokens) in enumerate(pattern):
      key = images * (shape.tokens + 1) + tokens
      columns[:, column] = order[taken[key] : taken[key] + times]
      taken[key] += times
    record_ids.append(columns.ravel())
    sizes.append(np.full(times, len(pattern)))
  record_ids = np.concatenate(record_ids)
  row_offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
  return Plan(row_offsets, record_ids, np.zeros(len(record_ids), np.int32), lengths[record_ids, 0].astype(np.int32))


def plan_documents(lengths: np.ndarray, row_tokens: int, seed: int) -> Plan:
  """Plans rows of documents in a random order, cut where a row ends.

  The part of a document that continues in the next row takes one more slot there, for its BOS.

  Args:
    lengths: int[N]; tokens of each document, BOS and EOS included; 0 leaves the document out.
    row_tokens: tokens of a row.
    seed: chooses the order.
  """
  lengths = np.asarray(lengths, np.int64)
  order = np.random.default_rng(seed).permutation(np.flatnonzero(lengths > 0).astype(index_type(len(lengths))))
  ends = np.cumsum(lengths[order])  # in the concatenation of all documents
  begins = ends - lengths[order]
  total = int(ends[-1]) if len(ends) else 0
  starts, stops, position, document = array.array("q"), array.array("q"), 0, 0
  while position < total:
    inside = position > begins[document]
    stop = min(position + row_tokens - int(inside), total)
    document = int(np.searchsorted(ends, stop, side="right"))
    following = stop
    if document < len(ends):
      begin = int(begins[document])
      if position < begin and stop - begin < MIN_PIECE:
        stop = following = begin
      elif stop > begin and ends[document] - stop == 1:  # EOS alone, which is the target of the cut's last position
        following, document = int(ends[document]), document + 1
    starts.append(position)
    stops.append(stop)
    position = following
  starts, stops = np.array(starts, np.int64), np.array(stops, np.int64)
  first = np.searchsorted(ends, starts, side="right")
  counts = np.searchsorted(ends, stops - 1, side="right") - first + 1
  row_offsets = np.concatenate([[0], np.cumsum(counts)])
  row = np.repeat(np.arange(len(counts)), counts)
  documents = first[row] + np.arange(len(row)) - row_offsets[row]
  piece_starts = np.maximum(starts[row] - begins[documents], 0).astype(np.int32)
  piece_stops = (np.minimum(stops[row], ends[documents]) - begins[documents]).astype(np.int32)
  return Plan(row_offsets, order[documents], piece_starts, piece_stops)


def cut(sample: Sample, start: int, stop: int) -> Sample:
  """Returns the piece [start, stop) of a text sample; a later piece begins with BOS again.

  The target of a piece's last position is the next token of the document, so that each token of a document is a target
  exactly once, however it is cut.
  """
  if start == 0 and stop == len(sample.tokens):
    return sample
  pieces = [sample.tokens[start:stop], sample.targets[start:stop], sample.loss_mask[start:stop]]
  if start:
    heads = (sample.tokens[0], sample.tokens[start], False)
    pieces = [np.insert(piece, 0, head) for piece, head in zip(pieces, heads)]
  return Sample(*pieces, np.arange(len(pieces[0]), dtype=np.int32), (), (), ())


def pack(samples: Sequence[Sample], shape: RowShape) -> Batch:
  """Packs samples into one row, one after the other.

  Args:
    samples: within the row's budgets, their images decoded to uint8[H, W, 3].
    shape: the row's budgets.

  Returns:
    The arrays of `Batch` without the leading axis.
  """
  row = Batch(*(array[0] for array in batch_lib.empty(1, shape)))
  pack_into(row, samples, shape)
  return row


def pack_into(row: Batch, samples: Sequence[Sample], shape: RowShape) -> None:
  """Packs samples into a row that holds only padding, in place; see `pack`."""
  offset, slot = 0, 0
  for segment, sample in enumerate(samples, start=1):
    span = slice(offset, offset + len(sample.tokens))
    row.tokens[span] = sample.tokens
    row.targets[span] = sample.targets
    row.loss_mask[span] = sample.loss_mask
    row.positions[span] = sample.positions
    row.segment_ids[span] = segment
    for start, kind, pixels in zip(sample.image_starts, sample.image_kinds, sample.images):
      taken = shape.slots_of(kind)
      row.image_index[offset + start : offset + start + taken] = slot * shape.image_slots + np.arange(taken)
      row.images[slot] = pixels
      row.image_start[slot] = offset + start
      row.image_kind[slot] = kind
      slot += 1
    if sample.stored:
      row.stored[slot - len(sample.stored) : slot] = sample.stored
    offset = span.stop


def index_type(count: int) -> type[np.integer]:
  """The integer type for the indices of `count` records: int32 where it suffices, which halves the plan."""
  return np.int32 if count < 2**31 else np.int64


def _patterns(counts: np.ndarray, even: bool) -> Iterator[tuple[list[tuple[int, int]], int]]:
  """Yields (sizes of one row, number of such rows) until nothing is left.

  A row begins with the size that needs most of it, continues with the largest that fits, and ends with the pair that
  leaves the least room. With `even`, which mixes large and small, it continues with the largest size that leaves room
  for as many of the smallest: six images of 590 to 880 tokens then share a row, where first fit would put five large
  ones in a row and be left with small ones, of which a seventh does not fit.

  Args:
    counts: int[images + 1, tokens + 1]; samples of each size; changed.
    even: see above.
  """
  image_limit, token_limit = counts.shape[0] - 1, counts.shape[1] - 1
  tokens = np.arange(token_limit + 1)
  need = np.maximum(tokens / token_limit, np.arange(image_limit + 1)[:, None] / max(image_limit, 1))
  by_need = [
    divmod(int(key), token_limit + 1) for key in np.argsort(-need, axis=None, kind="stable") if counts.flat[key]
  ]
  # floor[m, t]: most tokens, up to t, among the samples left with up to m images; 0: none.
  floor = np.maximum.accumulate(np.where(counts > 0, tokens, 0), axis=0)
  floor = np.maximum.accumulate(floor, axis=1)
  for first in by_need:
    while counts[first]:
      pattern: list[tuple[int, int]] = []
      size, room, image_room = first, token_limit, image_limit
      while size is not None:
        pattern.append(size)
        counts[size] -= 1
        if not counts[size]:
          _used_up(counts, floor, *size)
        room, image_room = room - size[1], image_room - size[0]
        size = _next(counts, floor, room, image_room, even)
      times = 1 + min(int(counts[size]) // pattern.count(size) for size in pattern)
      for size in pattern:
        counts[size] -= times - 1
        if times > 1 and not counts[size]:
          _used_up(counts, floor, *size)
      yield pattern, times


def _used_up(counts: np.ndarray, floor: np.ndarray, images: int, tokens: int) -> None:
  """Takes a size of which none is left out of `floor`, in place."""
  if counts[:images, tokens].any():  # another size is as long and has fewer images
    return
  for most in range(images, len(floor)):
    if counts[most, tokens]:
      return
    line = floor[most]
    if line[tokens] == tokens:
      line[tokens : np.searchsorted(line, tokens, side="right")] = line[tokens - 1]


def _next(counts: np.ndarray, floor: np.ndarray, room: int, image_room: int, even: bool) -> tuple[int, int] | None:
  """Returns the size to place next in a row, None where nothing fits."""
  largest = int(floor[image_room, room])
  if not largest:
    return None
  smallest = int(np.argmax(floor[image_room] > 0))
  places = min(room // smallest, image_room or room)
  if even and places > 2:
    largest = int(floor[image_room, room - (places - 1) * smallest])
  if largest < room < 3 * smallest:  # at most two more: the pair that fills best
    images, lengths = np.nonzero(counts[: image_room + 1, : room + 1])
    together = lengths + floor[image_room - images, room - lengths]
    best = int(np.argmax(together))
    return int(images[best]), int(lengths[best])
  images = image_room
  while not counts[images, largest]:
    images -= 1
  return images, largest
