"""The order of a source's rows: another in every epoch, each a permutation of all rows, and a function of the number.

`Global` shuffles all rows at once, `Scattered` the same for plans too large for an array of them. `Blocks` shuffles
groups of shards, and rows inside a window of them, so that each host reads few files at a time.
"""

import bisect
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

_ROUNDS = 6  # of the Feistel network
_SPAN_ROWS = 2**23  # of a span of `Blocks`, as long as a lane reads _WINDOWS[0] to _WINDOWS[1] windows in it
_WINDOWS = (2, 8)


class Order(Protocol):
  """A map from a row's number in an epoch to the row of the plan. Picklable; threads may be in two epochs at once."""

  def __call__(self, epoch: int, index: int) -> int: ...


class Global:
  """All rows shuffled at once."""

  def __init__(self, rows: int, seed: int, stream: int):
    """`stream` separates the sources of one seed."""
    self._rows, self._seed, self._stream = rows, seed, stream
    self._orders: dict[int, np.ndarray] = {}

  def __call__(self, epoch: int, index: int) -> int:
    order = self._orders.get(epoch)
    if order is None:
      order = np.random.default_rng([self._seed, epoch, self._stream]).permutation(self._rows)
      # A new dict, so that none is changed while another thread reads it.
      self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1} | {epoch: order}
    return int(order[index])


class Scattered:
  """All rows shuffled by a keyed permutation, which needs no memory.

  A Feistel network over the least even number of bits that holds all rows; what falls outside is sent through it again
  (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
  """

  def __init__(self, rows: int, seed: int, stream: int):
    self._rows, self._seed, self._stream = rows, seed, stream
    self._bits = max(1, ((rows - 1).bit_length() + 1) // 2)  # of a half

  def __call__(self, epoch: int, index: int) -> int:
    mask, keys = 2**self._bits - 1, _keys(self._seed, epoch, self._stream)
    while True:
      left, right = index >> self._bits, index & mask
      for key in keys:
        left, right = right, left ^ (_mixed(right, key) & mask)
      index = left << self._bits | right
      if index < self._rows:
        return index


@functools.lru_cache(maxsize=64)
def _keys(*parts: int) -> tuple[int, ...]:
  return tuple(np.random.default_rng(parts).integers(2**63, size=_ROUNDS).tolist())


def _mixed(value: int, key: int) -> int:
  """A keyed hash to 64 bits: the finalizer of splitmix64."""
  value = (value + key) & 0xFFFFFFFFFFFFFFFF
  value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
  value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
  return value ^ value >> 31


class Blocks:
  """Groups of shards shuffled, and rows inside a sliding window of groups. Not in the paper.

  The batch is cut into lanes of neighbouring places, and each reads groups of its own, one after the other: the rows of
  its i-th group lie anywhere in the time of its groups i to i + window. A host has the places of its devices, so that
  with as many hosts as lanes, or fewer, each group is read by one host in an epoch; no batch depends on their number.

  An epoch is cut into spans of some groups for each lane; the tables of two spans are kept.
  """

  def __init__(
    self,
    begins: np.ndarray,
    rows: int,
    seed: int,
    stream: int,
    window: int,
    lanes: int,
    lane_of: Callable[[np.ndarray], np.ndarray],
  ):
    """Stores what the order is made of.

    Args:
      begins: int64[G], the first row of each group.
      rows: of the plan.
      seed, stream: see `Global`.
      window: groups of a lane whose rows are mixed.
      lanes: parts of a batch.
      lane_of: int64[n] numbers of rows in the run (epoch * rows + index) -> int64[n] their lanes.
    """
    self._begins, self._rows, self._seed, self._stream = begins, rows, seed, stream
    self._window, self._lane_of = window, lane_of
    windows = int(np.clip(_SPAN_ROWS * len(begins) // max(rows * window * lanes, 1), *_WINDOWS))
    self._span_groups = windows * window * lanes
    self._epochs: dict[int, _Epoch] = {}
    self._spans: dict[tuple[int, int], np.ndarray] = {}

  def __call__(self, epoch: int, index: int) -> int:
    if (cut := self._epochs.get(epoch)) is None:
      cut = self._cut(epoch)
      self._epochs = _and_last(self._epochs, epoch, cut)
    span = bisect.bisect_right(cut.edges, index) - 1
    if (table := self._spans.get((epoch, span))) is None:
      table = self._table(epoch, span, cut)
      self._spans = _and_last(self._spans, (epoch, span), table)
    return int(table[index - cut.edges[span]])

  def _cut(self, epoch: int) -> "_Epoch":
    rng = np.random.default_rng([self._seed, epoch, self._stream])
    groups = rng.permutation(len(self._begins))
    spans = max(1, len(groups) // self._span_groups)
    cuts = [span * len(groups) // spans for span in range(spans + 1)]
    ends = np.pad(np.cumsum(self._sizes(groups)), (1, 0))
    return _Epoch(groups, cuts, ends[cuts].tolist())

  def _sizes(self, groups: np.ndarray) -> np.ndarray:
    return np.append(self._begins[1:], self._rows)[groups] - self._begins[groups]

  def _table(self, epoch: int, span: int, cut: "_Epoch") -> np.ndarray:
    """Returns the rows of the plan in the order of a span's numbers, int[n]."""
    groups = cut.groups[cut.cuts[span] : cut.cuts[span + 1]]
    sizes = self._sizes(groups)
    group = np.repeat(np.arange(len(groups)), sizes)
    rows = np.arange(len(group)) + np.repeat(self._begins[groups] - (np.cumsum(sizes) - sizes), sizes)
    rng = np.random.default_rng([self._seed, epoch, self._stream, span])
    # Where two lanes share a group, chance deals it out.
    rows = rows[np.argsort(group + rng.random(len(rows)), kind="stable")]
    lane = self._lane_of(np.arange(cut.edges[span], cut.edges[span + 1]) + epoch * self._rows)
    by_lane = np.argsort(lane, kind="stable")
    when = group + rng.random(len(group)) * self._window
    when += lane[by_lane] * float(len(groups) + self._window)
    table = np.empty(len(rows), np.int32 if self._rows < 2**31 else np.int64)
    table[by_lane] = rows[np.argsort(when, kind="stable")]
    return table


class _Epoch(NamedTuple):
  """The shuffled groups of an epoch, cut into spans."""

  groups: np.ndarray  # int64[G]
  cuts: list[int]  # places in `groups`
  edges: list[int]  # numbers of rows


def _and_last(kept: dict[Any, Any], key: Any, value: Any) -> dict[Any, Any]:
  """Returns a new dictionary of the last item and one more, so that none changes while another thread reads it."""
  return dict([*kept.items()][-1:]) | {key: value}
