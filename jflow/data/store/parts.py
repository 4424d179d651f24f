"""The parts of a source: runs of its shards that are measured and planned alone, so that memory does not grow with it.

A source without shards has runs of records in their place.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from jflow.data.records import Record, RecordError, Source

# A source of more records is measured and planned by parts. To change either number changes the rows of such sources.
MOST_AT_ONCE = 2**23
PART_RECORDS = 2**19  # of a part at most, unless a single shard holds more
_RUN = 4096  # records, where there are no shards


class Part(NamedTuple):
  """A part of a source: its records [first, stop), which are its shards [first_shard, stop_shard)."""

  first: int
  stop: int
  first_shard: int
  stop_shard: int


def parts(lengths: Sequence[int], most: int, first: int = 0, first_shard: int = 0) -> list[Part]:
  """Cuts consecutive shards into parts of at most `most` records; a shard with more is a part of its own.

  Args:
    lengths: records of each shard.
    most: see above.
    first, first_shard: numbers of the first record and of the first shard.
  """
  out, begin, records = [], 0, 0
  for shard, length in enumerate([*lengths, most + 1]):
    if records and records + length > most:
      out.append(Part(first, first + records, first_shard + begin, first_shard + shard))
      first, begin, records = first + records, shard, 0
    records += length
  return out


def lengths_of(source: Source, most: int) -> list[int]:
  """Returns the records of each shard; of a source without shards those of runs of at most `most`."""
  if hasattr(source, "shard_lengths"):
    return list(source.shard_lengths)
  run = min(most, _RUN)
  return [min(run, len(source) - first) for first in range(0, len(source), run)]


def records_of(source: Source, part: Part | None = None) -> Iterable[Record | RecordError]:
  """The records of a part, None for all, in order; without their images where a source has outlines."""
  if hasattr(source, "outlines"):
    return source.outlines(slice(part.first_shard, part.stop_shard) if part else slice(None))
  return _records(source, part.first if part else 0, part.stop if part else len(source))


def _records(source: Source, first: int, stop: int) -> Iterator[Record | RecordError]:
  for index in range(first, stop):
    try:
      yield source[index]
    except RecordError as error:
      yield error
