"""One part of an import: its records, checked, become a shard, its outlines and its report.

In an import to a store, the files are made on this machine, sent there, checked by size and hash, and removed here.
"""

import collections
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jflow.data import examples, images
from jflow.data.filters import Filters
from jflow.data.importers import Importer, Item
from jflow.data.records import Record, RecordError, Unwanted
from jflow.data.sequences import IMAGE_MARK
from jflow.data.signatures import DTYPE, signature
from jflow.data.store import prepared
from jflow.data.store.partial import clear, write_report
from jflow.data.store.scratch import local, send

SUFFIXES = (".array_record", ".outlines", ".rejected")  # of the files of a part
SIGNATURES = ".signatures"  # of one more, where duplicates are dropped
MAX_TEXT = 65_536  # characters of a record with images; a row of 4,096 tokens holds about 16,000


def import_part(
  importer: Importer,
  part: Any,
  stem: str,
  task: str,
  filters: Filters,
  count: Callable[[int], None],
  here: str = "",
) -> dict[str, Any]:
  """Writes one part's shard, then its report, whose presence means that the shard is complete.

  Args:
    importer: of the input.
    part: of its parts.
    stem: of the names of the part's files, here or in a store.
    task: "understanding", "generation" or "text".
    filters: which records are wanted.
    count: is called with the work of each item.
    here: stem of the files while they are made, with the same name in another folder; empty: the usual one.

  Returns:
    The report, counts and hashes.
  """
  here = here or local(stem)
  suffixes = (*SUFFIXES, SIGNATURES) if filters.rule else SUFFIXES
  paths = [here + suffix for suffix in suffixes]
  clear(paths)
  writer = prepared.ShardWriter(paths[0], paths[1])
  rejected, filtered, notes, first = *(collections.Counter() for _ in range(3)), {}
  signed: list[np.ndarray] = []
  with open(paths[2], "w", encoding="ascii") as log:
    for item in importer.items(part):
      try:
        record, said = _learnable(item, task)
        dropped = _check(record, item.meta, task, filters)
        if dropped:
          filtered[dropped] += 1
        else:
          if filters.rule:
            signed.append(signature(record))
          sizes = {image: list(images.decode(image).shape[1::-1]) for image in dict.fromkeys(record.images)}
          writer.write(record, {**item.meta, "sizes": [sizes[image] for image in record.images]})
          notes.update(said)
      except Unwanted as error:
        filtered[error.reason] += 1
      except RecordError as error:
        rejected[error.reason] += 1
        entry = {"where": item.where, "message": str(error)}
        first.setdefault(error.reason, entry)
        print(json.dumps({**entry, "reason": error.reason}), file=log)
      count(item.work)
  written = writer.close()
  if filters.rule:
    save_signatures(paths[3], np.array(signed, DTYPE))
  report = {
    **written,
    "rejected": dict(rejected),
    "filtered": dict(filtered),
    "notes": dict(notes),
    "first_rejected": first,
  }
  report = write_report(here + ".json", report, paths)
  send(here, stem, (*suffixes, ".json"))
  return report


def save_signatures(path: str, signed: np.ndarray) -> None:
  """Writes the signatures of a part."""
  with open(path, "wb") as file:
    np.save(file, signed)


def _learnable(item: Item, task: str) -> tuple[Record, list[str]]:
  """Returns the record of an item as used in training, and the notes about it.

  "first_answer" and "last_question" are turns that were left out; "mark_as_text" is an `<image>` without an image.

  Raises:
    RecordError: the item is not a record.
  """
  if isinstance(item.record, RecordError):
    raise item.record
  record, said = item.record, []
  if task != "generation":
    turns, said = examples.learnable(record.turns)
    record = record._replace(turns=turns)
  if not record.images and any(IMAGE_MARK in text for text in _texts(record)):
    said.append("mark_as_text")
  return record, said


def _texts(record: Record) -> list[str]:
  return [record.text, *(turn.text for turn in record.turns)]


def _check(record: Record, meta: Mapping[str, Any], task: str, filters: Filters) -> str | None:
  """Returns the filter that drops a record, or None; the images' bodies are not decoded.

  In data sets with images in some records only, those of the other task are dropped as "text_only" or "with_images";
  importing the same input for that task takes them.

  Raises:
    RecordError: the record cannot be used.
  """
  if task == "understanding" and record.turns and not record.images:
    return "text_only"
  if task == "text" and record.images:
    return "with_images"
  examples.check(record, task)
  texts = _texts(record)
  for text in (record.id, *texts):
    if "\0" in text:
      raise RecordError("nul_character", "the text holds a NUL character")
    try:
      text.encode("utf-8")
    except UnicodeEncodeError:  # JSON allows it
      raise RecordError("invalid_utf8", "the text holds a lone surrogate") from None
  if record.images and sum(map(len, texts)) > MAX_TEXT:
    raise RecordError("text_too_long", f"the text has more than {MAX_TEXT:,} characters, which no row can hold")
  return filters.drops(record, [images.size(image) for image in record.images], meta)
