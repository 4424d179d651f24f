"""Pairs of numbers, sorted on disk: runs that fit into memory are sorted and written, then merged, a piece at a time."""

import tempfile
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np

_BYTES = 16  # of a pair


def ordered(pairs: Iterable[np.ndarray], folder: str, most: int) -> Iterator[np.ndarray]:
  """Yields all pairs in order: by the first number, of equal ones by the second. A piece is u64[n, 2], 0 < n <= most.

  Args:
    pairs: u64[n, 2], any number of blocks.
    folder: to write to, 16 bytes for each pair; nothing stays, however the process ends.
    most: pairs that are sorted at once, 80 bytes of memory each. Of more than its square, pieces are larger.

  Raises:
    OSError: the disk is full.
  """
  with tempfile.TemporaryFile(dir=folder) as file:
    lengths, waiting = [], [np.empty((0, 2), np.uint64)]
    for block in pairs:
      for begin in range(0, len(block), most):
        waiting.append(block[begin : begin + most])
        if sum(map(len, waiting)) > most:
          lengths.append(_write(file, waiting[:-1]))
          del waiting[:-1]
    lengths.append(_write(file, waiting))
    del waiting
    yield from _merged(file, lengths, most)


def _write(file: IO[bytes], blocks: list[np.ndarray]) -> int:
  """Appends the pairs of blocks as one sorted run; returns how many."""
  run = _sorted(np.concatenate(blocks))
  file.write(run.tobytes())
  return len(run)


def _sorted(pairs: np.ndarray) -> np.ndarray:
  """The pairs in order; those that come in the order of their second numbers, or as sorted runs of such, are faster."""
  out = pairs[np.argsort(np.ascontiguousarray(pairs[:, 0]), kind="stable")]
  firsts, seconds = out.T
  if ((firsts[1:] == firsts[:-1]) & (seconds[1:] < seconds[:-1])).any():
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
  return out


def _merged(file: IO[bytes], lengths: list[int], most: int) -> Iterator[np.ndarray]:
  """Yields the pairs of sorted runs of a file in order.

  A window of each run is read; what is at most the least of the last pairs of windows comes before all that follows.
  """
  stops = np.cumsum(lengths).tolist()
  starts = [stop - length for stop, length in zip(stops, lengths)]
  window = max(1, most // len(lengths))
  while open_runs := [run for run, stop in enumerate(stops) if starts[run] < stop]:
    read, bounds = {}, []
    for run in open_runs:
      count = min(window, stops[run] - starts[run])
      file.seek(starts[run] * _BYTES)
      read[run] = np.frombuffer(file.read(count * _BYTES), np.uint64).reshape(-1, 2)
      if starts[run] + count < stops[run]:
        bounds.append(tuple(read[run][-1].tolist()))
    for run, pairs in read.items():
      read[run] = pairs[: _count(pairs, *min(bounds))] if bounds else pairs
      starts[run] += len(read[run])
    yield _sorted(np.concatenate(list(read.values())))


def _count(pairs: np.ndarray, first: int, second: int) -> int:
  """The number of sorted pairs that are at most (first, second)."""
  begin, end = (np.searchsorted(pairs[:, 0], np.uint64(first), side) for side in ("left", "right"))
  return int(begin + np.searchsorted(pairs[begin:end, 1], np.uint64(second), "right"))
