"""Records that say the same as an earlier one, found by their signatures (signatures.py).

Candidates come of tables of parts of the signatures, each sorted once, so that no pair of all is compared; whether two
are near is then decided by the whole signatures, of many pairs at once. Beside these, memory is that of one table, some
100 bytes a record, and 8 bytes for each pair that is near.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jflow.data.signatures import HASHES

KINDS = ("records", "pictures", "texts")
_BITS = 3  # that hashes of near pictures may differ in
_BANDS, _CHOSEN = 6, 3  # of a picture's hash: with three wrong bits, three of six bands are right
_COLOR = 10  # levels of 255 that thumbs of near pictures may differ by, on average
_SIMILAR = 0.8  # estimated Jaccard similarity of near texts
_ROWS = 4  # hashes of a text's band: 16 bands miss one pair of a thousand at 0.8
_MOST = 64  # records of one place in a table that a later one is compared with
_BLOCK = 2**16  # pairs that are compared at once


class Rule(NamedTuple):
  """The meaning of a duplicate: all of a record, its pictures or its texts are the same, or near."""

  kind: str  # of KINDS
  near: bool


def found(known: np.ndarray, rule: Rule) -> np.ndarray:
  """Returns int64[N]: for each signature the place of the earlier one that it repeats, which is kept; -1: none.

  Args:
    known: DTYPE[N], in order of precedence.
    rule: the meaning of a duplicate.
  """
  first, pairs = np.full(len(known), -1, np.int64), np.empty(0, np.int64)
  for more in _pairs(known, rule):
    pairs = np.union1d(pairs, more)
  for begin in range(0, len(pairs), _BLOCK):
    block = pairs[begin : begin + _BLOCK]
    for later, earlier in zip((block >> 32).tolist(), (block & (2**32 - 1)).tolist()):
      if first[later] < 0 and first[earlier] < 0:  # in order, so that the earlier one is decided
        first[later] = earlier
  return first


def _pairs(known: np.ndarray, rule: Rule) -> Iterator[np.ndarray]:
  """Yields the duplicates of each table as `later << 32 | earlier`, int64[P]; those of two tables may be the same."""
  if not rule.near:
    keys = known["content" if rule.kind == "records" else rule.kind]
    has = {"records": None, "pictures": known["count"] > 0, "texts": known["words"] > 0}[rule.kind]
    yield _of_table(keys, has, lambda a, b: np.ones(len(a), bool))
    return
  near = {"records": _near_records, "pictures": _near_pictures, "texts": _near_texts}[rule.kind]
  test = lambda a, b: near(known[a], known[b])
  if rule.kind != "texts":
    pictured = known["count"] > 0
    width = 64 // _BANDS
    bands = [known["hash"] >> np.uint64(width * i) & np.uint64(2**width - 1) for i in range(_BANDS - 1)]
    bands.append(known["hash"] >> np.uint64(width * (_BANDS - 1)))
    for chosen in itertools.combinations(bands, _CHOSEN):
      key = chosen[0] | chosen[1] << np.uint64(20) | chosen[2] << np.uint64(40)
      yield _of_table(key, pictured, test)
    if rule.kind == "pictures":
      return
  worded = known["words"] > 0 if rule.kind == "texts" else known["count"] == 0
  for start in range(0, HASHES, _ROWS):
    yield _of_table(_hashed(known["text"][:, start : start + _ROWS]), worded, test)


def _of_table(keys: np.ndarray, has: np.ndarray | None, same: Callable[[Any, Any], np.ndarray]) -> np.ndarray:
  """Returns the pairs of records with one key that are the same, as in `_pairs`.

  Of the records of a key, the first and each that is near none of the firsts before it, _MOST of them, are compared with
  all later ones. One first after the other, of all keys at once.
  """
  places = np.arange(len(keys)) if has is None else np.flatnonzero(has)
  order = places[np.argsort(keys[places], kind="stable")]
  keys = keys[order]
  edges = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1], [True]])) if len(order) else np.zeros(1, int)
  begins, ends = edges[:-1], edges[1:]  # of a key: its first to compare with, and where it ends, in `order`
  near, pairs = np.zeros(len(order), bool), [np.empty(0, np.int64)]
  for _ in range(_MOST):
    several = ends - begins > 1
    begins, ends = begins[several], ends[several]
    if not len(begins):
      break
    rest = ends - begins - 1
    others = np.arange(rest.sum()) + np.repeat(begins + 1 - (np.cumsum(rest) - rest), rest)
    firsts = np.repeat(order[begins], rest)
    for start in range(0, len(others), _BLOCK):
      block = others[start : start + _BLOCK]
      earlier, later = firsts[start : start + _BLOCK], order[block]
      hit = same(earlier, later)
      near[block[hit]] = True
      pairs.append(later[hit] << 32 | earlier[hit])
    free = np.append(others[~near[others]], len(order))
    begins = free[np.searchsorted(free, begins)]
  return np.concatenate(pairs)


def _near_pictures(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Whether the pictures of records are near, bool[N], of the signatures of both, DTYPE[N]."""
  color = np.abs(a["thumb"].astype(np.int16) - b["thumb"]).mean(axis=1)
  one = (np.bitwise_count(a["hash"] ^ b["hash"]) <= _BITS) & (color <= _COLOR)
  several = a["pictures"] == b["pictures"]  # only the first is in the hash
  return (a["count"] == b["count"]) & np.where(a["count"] > 1, several, one)


def _near_texts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return (a["text"] == b["text"]).mean(axis=1) >= _SIMILAR


def _near_records(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  neither = (a["count"] == 0) & (b["count"] == 0)
  return _near_texts(a, b) & (neither | _near_pictures(a, b))


def _hashed(columns: np.ndarray) -> np.ndarray:
  """One number of the columns of each row, u64[N]."""
  out = np.full(len(columns), 14695981039346656037, np.uint64)
  with np.errstate(over="ignore"):
    for column in columns.T:
      out = (out ^ column.astype(np.uint64)) * np.uint64(1099511628211)
      out ^= out >> np.uint64(29)
  return out
