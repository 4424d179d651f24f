"""The choice of records that are held out of training, by a hash of each record alone.

So a record keeps its side when others are added or removed, and every data set that holds it makes the same choice.
"""

import hashlib
import json

import numpy as np

from jflow.data.records import Record, RecordError, Source

TRAINING, VALIDATION = "training", "validation"  # the two sides


def is_held_out(record: Record, share: float) -> bool:
  """Whether a record is held out, of which a share in [0, 1] is: by its id, texts and number of images."""
  content = json.dumps([record.id, len(record.images), record.text, record.turns])
  digest = hashlib.sha256(content.encode()).digest()
  return int.from_bytes(digest[:8]) < share * 2**64


def held_out(source: Source, share: float) -> np.ndarray:
  """Returns bool[N], the records of a source that are held out. It opens no image."""
  if hasattr(source, "outlines"):
    return np.fromiter((is_held_out(record, share) for record in source.outlines()), bool, len(source))
  out = np.zeros(len(source), bool)
  for index in range(len(source)):
    try:
      out[index] = is_held_out(source[index], share)
    except RecordError:  # it is left out of both sides
      continue
  return out
