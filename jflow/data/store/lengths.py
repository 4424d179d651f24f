"""The greatest length of each record's sequence, from which rows are planned.

This is the first pass over a source. For a prepared data set it reads the outlines, not the images. The result is
cached (derived.py), and does not depend on the size of the rows or of the images.
"""

import array
import collections
import concurrent.futures
import concurrent.futures.process
import contextlib
import functools
import io
import multiprocessing
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jflow import files
from jflow.data import examples
from jflow.data.examples import Sample
from jflow.data.processes import end_with_parent
from jflow.data.records import Record, RecordError, Source
from jflow.data.store import derived, parts, prepared
from jflow.data.store.parts import Part
from jflow.data.tokenizer import Tokenizer
from jflow.errors import Stopped
from jflow.generation.base import FAMILIES
from jflow.progress import Progress

# To be raised when the layouts in examples.py change length.
_VERSION = 2
# From so many records on, processes are worth their start.
_WORTH_PROCESSES = 100_000


def measure(
  source: Source,
  task: str,
  tokenizer: Tokenizer,
  template: str,
  image_patches: int,
  writer: str,
  cache: str = "",
  caption_prompt: str = examples.CAPTION_PROMPT,
  part: Part | None = None,
) -> tuple[np.ndarray, collections.Counter]:
  """Returns the tokens and images of every record, int32[N, 2], and the counts of rejected ones by reason.

  A rejected record has length 0. Where chance decides (first sentence, dropped prompt), the longest counts.
  `writer` is a name of generation/base.py; `cache` the folder for what cannot be kept beside the records;
  `caption_prompt` as in `examples.build`; `part` those records alone, which this process measures without help.
  """
  folders = derived.places(source, cache)
  fingerprint = getattr(source, "fingerprint", "")
  made_for: list[Any] = [task, tokenizer.fingerprint, template]
  layout, measured = FAMILIES.get(writer).layout, 0
  # Images are measured without patches, of which each adds one token, unless a layout counts them in another way.
  if task == "generation" and layout.slots(image_patches) - layout.slots(0) != image_patches:
    measured = image_patches
  if task == "generation" and writer != "flow":  # whose lengths were kept before there was a choice
    made_for += [writer, measured]
  if task == "understanding" and caption_prompt != examples.CAPTION_PROMPT:
    made_for.append(caption_prompt)
  if part:
    made_for.append(part[:2])
  file = derived.name("lengths", _VERSION, fingerprint, *made_for) + ".npz"
  build = functools.partial(
    examples.build,
    task=task,
    tokenizer=tokenizer,
    template=template,
    image_patches=measured,
    layout=layout,
    caption_prompt=caption_prompt,
  )
  records = part.stop - part.first if part else len(source)
  found = _read(folders, file, records)
  if found is None:
    with derived.alone(folders, file) as path:
      found = _read(folders, file, records)
      if found is None and part:
        found = _sizes(parts.records_of(source, part), build, lambda: None)
      elif found is None:
        found = _measure(source, task, build)
      if path and not os.path.exists(path):
        _write(path, *found)
  lengths, rejected = found
  lengths[:, 0] += (image_patches - measured) * lengths[:, 1]
  return lengths, rejected


def _measure(source: Source, task: str, build: Callable[[Record], Sample]) -> tuple[np.ndarray, collections.Counter]:
  """Measures all records; a large prepared data set by its shards, with a process per core."""
  paths = getattr(source, "outline_paths", [])
  processes = min(os.cpu_count() or 1, len(paths))
  with Progress(len(source), 0, f"measure {task}", delay=2) as bar:
    if processes < 2 or len(source) < _WORTH_PROCESSES:
      return _sizes(parts.records_of(source), build, lambda: bar.count(1))
    measured = []
    # Threads of the parent would not survive a fork.
    with concurrent.futures.ProcessPoolExecutor(
      processes, multiprocessing.get_context("spawn"), end_with_parent
    ) as pool:
      try:
        for shard in pool.map(functools.partial(_measure_shard, build), paths, source.shard_lengths):
          measured.append(shard)
          bar.count(len(shard[0]))
      except concurrent.futures.process.BrokenProcessPool:
        raise Stopped(f"a process that measured {task} was killed (out of memory?): start again") from None
  return np.concatenate([sizes for sizes, _ in measured]), sum((r for _, r in measured), collections.Counter())


def _measure_shard(
  build: Callable[[Record], Sample], path: str, records: int
) -> tuple[np.ndarray, collections.Counter]:
  return _sizes(prepared.read_outlines(path, records), build, lambda: None)


def _sizes(
  records: Iterable[Record | RecordError],
  build: Callable[[Record], Sample],
  progress: Callable[[], Any],
) -> tuple[np.ndarray, collections.Counter]:
  """Returns tokens and images of records, and the counts of rejected ones by reason."""
  sizes, rejected = array.array("i"), collections.Counter()
  for record in records:
    size = 0, 0
    try:
      if isinstance(record, RecordError):
        raise record
      sample = build(record)
      size = len(sample.tokens), len(sample.images)
    except RecordError as error:
      rejected[error.reason] += 1
    sizes.extend(size)
    progress()
  return np.array(sizes, np.int32).reshape(-1, 2), rejected


def _read(folders: list[str], file: str, records: int) -> tuple[np.ndarray, collections.Counter] | None:
  """Returns the cached result; None where it is missing or damaged."""
  path = derived.find(folders, file)
  if path is None:
    return None
  try:
    with np.load(io.BytesIO(files.read_bytes(path))) as arrays:
      lengths = arrays["lengths"]
      rejected = derived.counts(dict(zip(arrays["reasons"].tolist(), arrays["counts"].tolist(), strict=True)))
    if lengths.shape == (records, 2) and lengths.dtype == np.int32 and not (lengths < 0).any():
      return lengths, rejected
  except Exception:  # damage to a zip file raises many types; the file is made again
    pass
  with contextlib.suppress(OSError):
    files.remove(path)
  return None


def _write(path: str, lengths: np.ndarray, rejected: collections.Counter) -> None:
  """Writes a file atomically. On a full disk nothing is kept, and the lengths are measured again next time."""
  arrays = dict(
    lengths=lengths,
    reasons=np.array(list(rejected), np.str_),
    counts=np.array(list(rejected.values()), np.int64),
  )
  with contextlib.suppress(OSError), files.replacing(path) as new, open(new, "wb") as file:
    np.savez(file, **arrays)
