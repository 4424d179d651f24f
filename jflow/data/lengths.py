"""How long each record's sequence is at most: what the packing plan is made of.

The first pass over a source. For a prepared data set it reads the outlines, not the images, and leaves its
result in the data set's directory, named by a hash of what it depends on.
"""

import collections
import hashlib
import os
import uuid

import numpy as np

from jflow.data import examples
from jflow.data.records import RecordError, Source
from jflow.data.tokenizer import Tokenizer

# Goes up when the layouts in examples.py change length.
_VERSION = 1


def measure(
  source: Source, task: str, tokenizer: Tokenizer, template: str, image_patches: int
) -> tuple[np.ndarray, collections.Counter]:
  """Returns the tokens and images of every record, int64[N, 2], and what was rejected, by reason.

  A rejected record has length 0. Where chance decides (first sentence, dropped prompt), the longest counts.
  """
  cache = _cache_path(source, task, tokenizer, template, image_patches)
  if cache and os.path.isfile(cache):
    try:
      with np.load(cache) as arrays:
        lengths = arrays["lengths"]
        rejected = collections.Counter(dict(zip(arrays["reasons"].tolist(), arrays["counts"].tolist())))
      if lengths.shape == (len(source), 2):
        return lengths, rejected
    except (OSError, ValueError, KeyError, EOFError):
      pass  # a damaged cache is made again
  lengths, rejected = np.zeros((len(source), 2), np.int64), collections.Counter()
  outlines = source.outlines() if hasattr(source, "outlines") else None
  for index in range(len(source)):
    try:
      record = next(outlines) if outlines is not None else source[index]
      sample = examples.build(record, task, tokenizer, template, image_patches)
      lengths[index] = len(sample.tokens), len(sample.images)
    except RecordError as error:
      rejected[error.reason] += 1
  if cache:
    _save(cache, lengths, rejected)
  return lengths, rejected


def _cache_path(
  source: Source, task: str, tokenizer: Tokenizer, template: str, image_patches: int
) -> str | None:
  if not hasattr(source, "fingerprint"):
    return None
  key = repr((_VERSION, source.fingerprint, task, tokenizer.fingerprint, template, image_patches))
  return os.path.join(source.directory, f"lengths-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz")


def _save(path: str, lengths: np.ndarray, rejected: collections.Counter) -> None:
  """Writes the cache; several hosts may do so at once. A directory that cannot be written stays without."""
  temporary = f"{path}.{uuid.uuid4().hex}.npz"
  try:
    np.savez(
      temporary,
      lengths=lengths,
      reasons=np.array(list(rejected), np.str_),
      counts=np.array(list(rejected.values()), np.int64),
    )
    os.replace(temporary, path)
  except OSError:
    pass
