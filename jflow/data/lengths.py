"""How long each record's sequence is at most: what the packing plan is made of.

The first pass over a source. For a prepared data set it reads the outlines, not the images. The result is kept
(derived.py), and does not depend on the size of the row or of the images.
"""

import collections
import os
import sys
import uuid

import numpy as np
from tqdm import tqdm

from jflow.data import derived, examples
from jflow.data.records import RecordError, Source
from jflow.data.tokenizer import Tokenizer

# Goes up when the layouts in examples.py change length.
_VERSION = 2


def measure(
  source: Source, task: str, tokenizer: Tokenizer, template: str, image_patches: int, cache: str = ""
) -> tuple[np.ndarray, collections.Counter]:
  """Returns the tokens and images of every record, int32[N, 2], and what was rejected, by reason.

  A rejected record has length 0. Where chance decides (first sentence, dropped prompt), the longest counts.
  `cache` is the folder for what cannot be kept beside the records.
  """
  folders = derived.places(source, cache)
  fingerprint = getattr(source, "fingerprint", "")
  file = derived.name("lengths", _VERSION, fingerprint, task, tokenizer.fingerprint, template) + ".npz"
  found = _read(folders, file, len(source))
  if found is None:
    with derived.alone(folders, file) as path:
      found = _read(folders, file, len(source)) or _measure(source, task, tokenizer, template)
      if path and not os.path.exists(path):
        _write(path, *found)
  lengths, rejected = found
  lengths[:, 0] += image_patches * lengths[:, 1]
  return lengths, rejected


def _measure(
  source: Source, task: str, tokenizer: Tokenizer, template: str
) -> tuple[np.ndarray, collections.Counter]:
  """Measures with images of 0 patches: each patch adds one token."""
  lengths, rejected = np.zeros((len(source), 2), np.int32), collections.Counter()
  outlines = source.outlines() if hasattr(source, "outlines") else None
  for index in tqdm(
    range(len(source)), desc=f"measure {task}", unit="rec", delay=2, disable=not sys.stderr.isatty()
  ):
    try:
      record = next(outlines) if outlines is not None else source[index]
      sample = examples.build(record, task, tokenizer, template, 0)
      lengths[index] = len(sample.tokens), len(sample.images)
    except RecordError as error:
      rejected[error.reason] += 1
  return lengths, rejected


def _read(folders: list[str], file: str, records: int) -> tuple[np.ndarray, collections.Counter] | None:
  """Returns what was kept; None where nothing is or it is damaged."""
  path = derived.find(folders, file)
  if path is None:
    return None
  try:
    with np.load(path) as arrays:
      lengths = arrays["lengths"]
      rejected = collections.Counter(dict(zip(arrays["reasons"].tolist(), arrays["counts"].tolist())))
    if lengths.shape == (records, 2):
      return lengths, rejected
  except Exception:  # zip files break in many ways; a damaged one is made again
    pass
  try:
    os.unlink(path)
  except OSError:
    pass
  return None


def _write(path: str, lengths: np.ndarray, rejected: collections.Counter) -> None:
  """Writes a file that is whole or not there. A full disk costs only the time to measure again."""
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
