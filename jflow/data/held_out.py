"""The choice of records that are held out of training, by a hash of each record's images, or of a text's words.

So a record keeps its side when others are added or removed, and every data set that holds it makes the same choice. All
that is said of one picture is on one side. The id does not count: it may be the number of a line, which others move.
"""

import contextlib
import hashlib
import json

import numpy as np

from jflow.data.records import Record, RecordError, Source, digest

TRAINING, VALIDATION = "training", "validation"  # the two sides
VERSION = 2  # to be raised when other records are held out


def is_held_out(record: Record, share: float) -> bool:
  """Whether a record is held out, of which a share in [0, 1] is. The images of an outline are their digests."""
  images = [image if isinstance(image, str) else digest(image) for image in record.images]
  content = json.dumps(images or [record.text, record.turns])
  return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8]) < share * 2**64


def held_out(source: Source, share: float) -> np.ndarray:
  """Returns bool[N], the records of a source that are held out.

  Outlines spare reading the images, but for a data set whose outlines do not hold their digests yet.
  """
  outlines = source.outlines() if hasattr(source, "outlines") else [None] * len(source)
  out = np.zeros(len(source), bool)
  for index, outline in enumerate(outlines):
    with contextlib.suppress(RecordError):  # it is left out of both sides
      known = outline is not None and None not in outline.images
      out[index] = is_held_out(outline if known else source[index], share)
  return out
