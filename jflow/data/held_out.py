"""The choice of records that are held out of training, by a hash of each record's images, or of a text's words.

So a record keeps its side when others are added or removed, and every data set that holds it makes the same choice. All
that is said of one picture is on one side. The id does not count: it may be the number of a line, which others move.
"""

import contextlib
import hashlib
import json

import numpy as np

from jflow.data.records import Record, RecordError, Source, digest
from jflow.data.store.parts import Part, records_of

TRAINING, VALIDATION = "training", "validation"  # the two sides
VERSION = 2  # to be raised when other records are held out


def is_held_out(record: Record, share: float) -> bool:
  """Whether a record is held out, of which a share in [0, 1] is. The images of an outline are their digests."""
  images = [image if isinstance(image, str) else digest(image) for image in record.images]
  content = json.dumps(images or [record.text, record.turns])
  return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8]) < share * 2**64


def held_out(source: Source, share: float, part: Part | None = None) -> np.ndarray:
  """Returns bool[N], the records of a source that are held out; of a part its N.

  Outlines spare reading the images, but for a data set whose outlines do not hold their digests yet.
  """
  indices = range(part.first, part.stop) if part else range(len(source))
  out = np.zeros(len(indices), bool)
  for place, (index, outline) in enumerate(zip(indices, records_of(source, part), strict=True)):
    with contextlib.suppress(RecordError):  # it is left out of both sides
      known = isinstance(outline, Record) and not any(image is None for image in outline.images)
      out[place] = is_held_out(outline if known else source[index], share)
  return out
