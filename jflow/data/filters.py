"""Filters of `prepare`, which drop sound records. Drops are counted separately from rejected records."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Names of the aesthetic score in metadata, in lower case.
AESTHETIC = ("aesthetic", "aesthetic_score", "aesthetics_score", "aesthetic_score_laion_v2", "aesthetic_v2")


class Filters(NamedTuple):
  """Limits for every image of a record; None: no limit."""

  min_size: int | None = None  # pixels of the shorter side
  max_aspect: float | None = None  # longer side over shorter
  min_aesthetic: float | None = None  # score in the record's metadata

  def drops(self, sizes: Sequence[tuple[int, int]], meta: Mapping[str, Any]) -> str | None:
    """Returns the name of the filter that drops a record, or None.

    Args:
      sizes: width and height of each image, in any order.
      meta: the metadata; a record without a score is dropped as "no_aesthetic_score".
    """
    if self.min_aesthetic is not None:
      score = next((value for key, value in meta.items() if key.lower() in AESTHETIC), None)
      try:
        if not float(score) >= self.min_aesthetic:
          return "min_aesthetic"
      except (TypeError, ValueError, OverflowError):
        return "no_aesthetic_score"
    if self.min_size is not None and any(min(size) < self.min_size for size in sizes):
      return "min_size"
    if self.max_aspect is not None and any(max(size) > self.max_aspect * min(size) for size in sizes):
      return "max_aspect"
    return None
