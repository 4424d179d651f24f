"""Records that say the same as an earlier one, found by their signatures (signatures.py).

Candidates come of tables of parts of the signatures, each sorted once, so that no pair of all is compared; whether two
are near is then decided by the whole signatures. Beside these, memory is that of one table, some 100 bytes a record.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jflow.data.signatures import HASHES

KINDS = ("records", "pictures", "texts")
_BITS = 3  # that hashes of near pictures may differ in
_BANDS, _CHOSEN = 6, 3  # of a picture's hash: with three wrong bits, three of six bands are right
_COLOR = 10  # levels of 255 that thumbs of near pictures may differ by, on average
_SIMILAR = 0.8  # estimated Jaccard similarity of near texts
_ROWS = 4  # hashes of a text's band: 16 bands miss one pair of a thousand at 0.8
_MOST = 64  # records of one place in a table that a later one is compared with


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
  first = np.full(len(known), -1, np.int64)
  pairs = sorted({(later, earlier) for earlier, later in _pairs(known, rule)})
  for later, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
    kept = next((earlier for _, earlier in group if first[earlier] < 0), -1)
    first[later] = kept
  return first


def _pairs(known: np.ndarray, rule: Rule) -> Iterator[tuple[int, int]]:
  """Yields (earlier, later) of duplicates, some twice."""
  if not rule.near:
    keys = known["content" if rule.kind == "records" else rule.kind]
    has = {"records": None, "pictures": known["count"] > 0, "texts": known["words"] > 0}[rule.kind]
    yield from _of_table(keys, has, lambda a, b: True)
    return
  near = {"records": _near_records, "pictures": _near_pictures, "texts": _near_texts}[rule.kind]
  test = lambda a, b: near(known, a, b)
  if rule.kind != "texts":
    pictured = known["count"] > 0
    width = 64 // _BANDS
    bands = [known["hash"] >> np.uint64(width * i) & np.uint64(2**width - 1) for i in range(_BANDS - 1)]
    bands.append(known["hash"] >> np.uint64(width * (_BANDS - 1)))
    for chosen in itertools.combinations(bands, _CHOSEN):
      key = chosen[0] | chosen[1] << np.uint64(20) | chosen[2] << np.uint64(40)
      yield from _of_table(key, pictured, test)
    if rule.kind == "pictures":
      return
  worded = known["words"] > 0 if rule.kind == "texts" else known["count"] == 0
  for start in range(0, HASHES, _ROWS):
    yield from _of_table(_hashed(known["text"][:, start : start + _ROWS]), worded, test)


def _of_table(keys: np.ndarray, has: np.ndarray | None, same: Callable[[int, int], bool]) -> Iterator[tuple[int, int]]:
  """Yields (earlier, later) of records with one key that are the same; each with the first such of its key."""
  places = np.arange(len(keys)) if has is None else np.flatnonzero(has)
  order = places[np.argsort(keys[places], kind="stable")]
  sorted_keys = keys[order]
  edges = np.flatnonzero(np.concatenate([[True], sorted_keys[1:] != sorted_keys[:-1], [True]])) if len(order) else []
  lengths = np.diff(edges)
  for group in np.flatnonzero(lengths > 1):
    firsts: list[int] = []
    for place in order[edges[group] : edges[group + 1]].tolist():
      earlier = next((first for first in firsts if same(first, place)), None)
      if earlier is not None:
        yield earlier, place
      elif len(firsts) < _MOST:
        firsts.append(place)


def _near_pictures(known: np.ndarray, a: int, b: int) -> bool:
  if known["count"][a] != known["count"][b]:
    return False
  if known["count"][a] > 1:  # only the first is in the signature
    return bool(known["pictures"][a] == known["pictures"][b])
  differ = int(known["hash"][a] ^ known["hash"][b]).bit_count()
  color = np.abs(known["thumb"][a].astype(np.int16) - known["thumb"][b]).mean()
  return differ <= _BITS and color <= _COLOR


def _near_texts(known: np.ndarray, a: int, b: int) -> bool:
  return bool((known["text"][a] == known["text"][b]).mean() >= _SIMILAR)


def _near_records(known: np.ndarray, a: int, b: int) -> bool:
  return _near_texts(known, a, b) and (known["count"][a] == known["count"][b] == 0 or _near_pictures(known, a, b))


def _hashed(columns: np.ndarray) -> np.ndarray:
  """One number of the columns of each row, u64[N]."""
  out = np.full(len(columns), 14695981039346656037, np.uint64)
  with np.errstate(over="ignore"):
    for column in columns.T:
      out = (out ^ column.astype(np.uint64)) * np.uint64(1099511628211)
      out ^= out >> np.uint64(29)
  return out
