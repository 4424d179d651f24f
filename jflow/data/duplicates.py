"""Records that say the same as an earlier one, found by their signatures (signatures.py).

Candidates come of tables of parts of the signatures, each sorted once on disk (disk_sort.py), so that no pair of all is
compared; whether two are near is then decided by the whole signatures, of many pairs at once. Memory does not grow with
the records, but for a byte of each.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jflow.data.disk_sort import ordered
from jflow.data.signatures import DTYPE, HASHES

KINDS = ("records", "pictures", "texts")
_BITS = 3  # that hashes of near pictures may differ in
_BANDS, _CHOSEN = 6, 3  # of a picture's hash: with three wrong bits, three of six bands are right
_COLOR = 10  # levels of 255 that thumbs of near pictures may differ by, on average
_SIMILAR = 0.8  # estimated Jaccard similarity of near texts
_ROWS = 4  # hashes of a text's band: 16 bands miss one pair of a thousand at 0.8
_MOST = 64  # records of one place in a table that a later one is compared with
_BLOCK = 2**16  # pairs that are compared at once, or signatures that are read so
AT_ONCE = 2**21  # signatures of candidates that are held at once, of 344 bytes


class Rule(NamedTuple):
  """The meaning of a duplicate: all of a record, its pictures or its texts are the same, or near."""

  kind: str  # of KINDS
  near: bool


def found(path: str, rule: Rule, folder: str, most: int = AT_ONCE) -> Iterator[np.ndarray]:
  """Yields the duplicates: int64[n, 2], places of one and of the earlier one that it repeats, which is kept.

  They come in the order of the first, each once.

  Args:
    path: a file of signatures, DTYPE[N], in order of precedence.
    rule: the meaning of a duplicate.
    folder: to sort in, 16 bytes for each record and for each pair of a table that is near.
    most: candidates that are held at once.
  """
  gone = bytearray(os.path.getsize(path) // DTYPE.itemsize)
  for piece in ordered(_pairs(path, rule, folder, most), folder, most):
    for begin in range(0, len(piece), _BLOCK):
      out = []
      for later, earlier in piece[begin : begin + _BLOCK].tolist():
        if not (gone[later] or gone[earlier]):  # in order, so that the earlier one is decided
          gone[later] = 1
          out.append((later, earlier))
      yield np.array(out, np.int64).reshape(-1, 2)


def _pairs(path: str, rule: Rule, folder: str, most: int) -> Iterator[np.ndarray]:
  """Yields the duplicates of each table, u64[n, 2], later and earlier; those of two tables may be the same."""
  near = {"records": _near_records, "pictures": _near_pictures, "texts": _near_texts}[rule.kind]
  for keys in _tables(rule):
    firsts = np.empty((0, 2), np.uint64)  # of the last key, which the next piece may go on with
    for piece in ordered(_keyed(path, keys), folder, most):
      piece = np.concatenate([firsts[firsts[:, 0] == piece[0, 0]], piece])
      pairs, firsts = _of_piece(piece, path, near if rule.near else None)
      yield pairs


def _tables(rule: Rule) -> Iterator[Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]]:
  """Yields for each table a function of signatures, DTYPE[n]: keys, u64[n], and which have one, bool[n]."""
  if not rule.near:
    field = "content" if rule.kind == "records" else rule.kind
    has = {"records": lambda k: np.ones(len(k), bool), "pictures": _pictured, "texts": _worded}[rule.kind]
    yield lambda known: (known[field], has(known))
    return
  if rule.kind != "texts":
    for chosen in itertools.combinations(range(_BANDS), _CHOSEN):
      yield lambda known, chosen=chosen: (_of_bands(known["hash"], chosen), _pictured(known))
  if rule.kind != "pictures":
    worded = _worded if rule.kind == "texts" else lambda known: ~_pictured(known)
    for start in range(0, HASHES, _ROWS):
      yield lambda known, start=start: (_hashed(known["text"][:, start : start + _ROWS]), worded(known))


def _pictured(known: np.ndarray) -> np.ndarray:
  return known["count"] > 0


def _worded(known: np.ndarray) -> np.ndarray:
  return known["words"] > 0


def _of_bands(hashes: np.ndarray, chosen: tuple[int, ...]) -> np.ndarray:
  """The chosen bands of pictures' hashes as one number each, u64[n]."""
  width = 64 // _BANDS
  key = np.zeros(len(hashes), np.uint64)
  for place, band in enumerate(chosen):
    bits = hashes >> np.uint64(width * band)
    key |= (bits if band == _BANDS - 1 else bits & np.uint64(2**width - 1)) << np.uint64(20 * place)
  return key


def _keyed(path: str, keys: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
  """Yields the keys of a table and the places of their signatures, u64[n, 2]."""
  begin = 0
  with open(path, "rb") as file:
    while len(known := np.frombuffer(file.read(_BLOCK * DTYPE.itemsize), DTYPE)):
      key, has = keys(known)
      yield np.stack([key, np.arange(begin, begin + len(known), dtype=np.uint64)], axis=1)[has]
      begin += len(known)


def _of_piece(
  piece: np.ndarray, path: str, near: Callable[[np.ndarray, np.ndarray], np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the pairs of records with one key that are the same, u64[n, 2], and the firsts of the last key.

  Of the records of a key, the first and each that is near none of the firsts before it, _MOST of them, are compared with
  all later ones. One first after the other, of all keys at once.

  Args:
    piece: keys and places, u64[n, 2], in order. Where a piece before ended with the first of its keys, that one's
      firsts come before all others.
    path: of the signatures.
    near: whether the records of signatures are the same, bool[n] of DTYPE[n] and DTYPE[n]; None: all of one key are.
  """
  keys, places = piece.T
  edges = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1], [True]]))
  begins, ends = edges[:-1], edges[1:]  # of a key: its first to compare with, and where it ends
  test = near and _of_places(path, places, np.repeat(ends - begins > 1, ends - begins), near)
  taken, pairs, firsts = np.zeros(len(places), bool), [np.empty((0, 2), np.uint64)], []
  for _ in range(_MOST):
    if len(ends) and begins[-1] < ends[-1] == len(places):
      firsts.append(piece[begins[-1]])
    several = ends - begins > 1
    begins, ends = begins[several], ends[several]
    if not len(begins):
      break
    rest = ends - begins - 1
    others = np.arange(rest.sum()) + np.repeat(begins + 1 - (np.cumsum(rest) - rest), rest)
    earlier = np.repeat(begins, rest)
    for start in range(0, len(others), _BLOCK):
      a, b = earlier[start : start + _BLOCK], others[start : start + _BLOCK]
      if test:
        hit = test(a, b)
        a, b = a[hit], b[hit]
      taken[b] = True
      pairs.append(np.stack([places[b], places[a]], axis=1))
    free = np.append(others[~taken[others]], len(places))
    begins = free[np.searchsorted(free, begins)]
  return np.concatenate(pairs), np.array(firsts, np.uint64).reshape(-1, 2)


def _of_places(
  path: str, places: np.ndarray, wanted: np.ndarray, near: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
  """Returns `near` of the numbers of records in `places` whose signatures are wanted, bool[n]; these are read once."""
  numbers = np.flatnonzero(wanted)
  numbers = numbers[np.argsort(places[numbers])]  # the file is read in order
  known = np.memmap(path, DTYPE, "r")[places[numbers].astype(np.int64)]
  at = np.empty(len(places), np.int64)
  at[numbers] = np.arange(len(numbers))
  return lambda a, b: near(known[at[a]], known[at[b]])


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
