"""The parts of an import without the records that repeat earlier ones, of other data sets or of this import."""

import collections
import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from jflow import stores
from jflow.data import duplicates
from jflow.data.filters import Filters
from jflow.data.processes import end_with_parent
from jflow.data.signatures import DTYPE
from jflow.data.store import prepared, scratch
from jflow.data.store.part import SIGNATURES, SUFFIXES, save_signatures
from jflow.data.store.partial import clear, read_report, write_report
from jflow.errors import UserError


def check(directories: Sequence[str]) -> list[str]:
  """The fingerprints of the data sets of --against.

  Raises:
    UserError: one is no data set, or has no signatures.
  """
  found = []
  for directory in directories:
    summary = prepared.read_summary(directory)
    name = prepared.signature_name(0, len(summary["shard_lengths"]))
    if not stores.exists(stores.join(directory, name)):
      raise UserError(f"--against={directory} has no {name}: prepare it with --duplicates=exact or near first")
    found.append(summary["fingerprint"])
  return found


def dropped(
  partial: str, stems: Sequence[str], reports: Sequence[dict[str, Any]], filters: Filters, processes: int
) -> tuple[list[str], list[dict[str, Any]]]:
  """Writes each part that holds repeated records again without them.

  Args:
    partial: the folder to write to, here or in a store.
    stems: of the files of each part; these are not changed.
    reports: of each part.
    filters: with a rule.
    processes: that write.

  Returns:
    The stems and reports of the parts without them.

  Raises:
    UserError: a data set of --against is damaged.
    OSError: a file cannot be read or written.
  """
  assert filters.rule is not None
  earlier = [file for directory in filters.against or () for file in _signed(directory)]
  signed = [(stem + SIGNATURES, report["records"]) for stem, report in zip(stems, reports, strict=True)]
  known = scratch.local(stores.join(partial, "signatures"))
  try:
    _join([*earlier, *signed], known)
    gone = _gone(known, [sum(count for _, count in earlier), *(count for _, count in signed)], filters.rule)
  finally:
    clear([known])
  new_stems, new_reports = list(stems), list(reports)
  tasks = []
  for index in gone:
    new_stems[index] = stores.join(partial, f"kept-{index:05d}")
    tasks.append((stems[index], new_stems[index], reports[index], *gone[index]))
  for index, report in zip(gone, _all_without(tasks, processes)):
    new_reports[index] = report
  return new_stems, new_reports


def _gone(path: str, counts: Sequence[int], rule: duplicates.Rule) -> dict[int, tuple[np.ndarray, dict[str, int]]]:
  """The records that repeat earlier ones: number of a part -> their places in it, int64[n], and counts by reason.

  Args:
    path: of all signatures, those of other data sets first.
    counts: of those of other data sets, and of each part.
    rule: the meaning of a duplicate.
  """
  ends, found = np.cumsum(counts), collections.defaultdict(list)
  content = np.memmap(path, DTYPE, "r")["content"] if ends[-1] else np.empty(0, np.uint64)
  for pairs in duplicates.found(path, rule, os.path.dirname(path)):
    pairs = pairs[pairs[:, 0] >= counts[0]]
    parts = np.searchsorted(ends, pairs[:, 0], "right") - 1
    same = content[pairs[:, 0]] == content[pairs[:, 1]]
    edges = np.flatnonzero(np.concatenate([[True], parts[1:] != parts[:-1], [True]])) if len(parts) else []
    for begin, end in itertools.pairwise(edges):
      part = int(parts[begin])
      found[part].append((pairs[begin:end, 0] - ends[part], int(same[begin:end].sum())))
  gone = {}
  for part, several in found.items():
    places, same = np.concatenate([later for later, _ in several]), sum(same for _, same in several)
    by_reason = {"duplicate": same, "near_duplicate": len(places) - same}
    gone[part] = places, {reason: count for reason, count in by_reason.items() if count}
  return gone


def _all_without(tasks: Sequence[Any], processes: int) -> list[dict[str, Any]]:
  processes = min(processes, len(tasks))
  if processes < 2:
    return list(map(_without, tasks))
  context = multiprocessing.get_context("spawn")  # threads of the parent would not survive a fork
  with concurrent.futures.ProcessPoolExecutor(processes, context, end_with_parent) as pool:
    return list(pool.map(_without, tasks))


def _without(task: tuple[str, str, dict[str, Any], np.ndarray, dict[str, int]]) -> dict[str, Any]:
  """Writes one part again, without the records of some places; returns its report."""
  from array_record.python import array_record_module

  stem, target, report, gone, counts = task
  made_of = hashlib.sha256(json.dumps(report, sort_keys=True).encode() + gone.astype("<i8").tobytes()).hexdigest()
  if (made := read_report(target + ".json")) and made.get("made_of") == made_of:  # before a kill
    return made
  keep = np.ones(report["records"], bool)
  keep[gone] = False
  source, here = scratch.fetched(stem, (*SUFFIXES, SIGNATURES)), scratch.local(target)
  paths = [here + suffix for suffix in (*SUFFIXES, SIGNATURES)]
  clear(paths)
  writer, features = prepared.ShardWriter(paths[0], paths[1]), prepared.features()
  reader = array_record_module.ArrayRecordReader(source + SUFFIXES[0], options="readahead_buffer_size:0")
  for place in np.flatnonzero(keep).tolist():
    record, meta = prepared.decoded(features, reader.read([place])[0])
    writer.write(record, {name: value for name, value in meta.items() if name != "sha256"})
  written = writer.close()
  reader.close()
  shutil.copyfile(source + SUFFIXES[2], paths[2])
  save_signatures(paths[3], _read(source + SIGNATURES)[keep])
  scratch.forget(stem, (*SUFFIXES, SIGNATURES))
  report = {
    **report,
    **written,
    "made_of": made_of,
    "filtered": dict(collections.Counter(report["filtered"]) + collections.Counter(counts)),
  }
  report = write_report(here + ".json", report, paths)
  scratch.send(here, target, (*SUFFIXES, SIGNATURES, ".json"))
  return report


def _signed(directory: str) -> list[tuple[str, int]]:
  """The files of a data set's signatures, and how many each holds."""
  lengths = prepared.read_summary(directory)["shard_lengths"]
  names = [prepared.signature_name(shard, len(lengths)) for shard in range(len(lengths))]
  return [(stores.join(directory, name), length) for name, length in zip(names, lengths)]


def _join(files: Sequence[tuple[str, int]], target: str) -> None:
  """Writes the signatures of files, each of so many, to one file without a header."""
  with open(target, "wb") as joined:
    for path, count in files:
      found = _read(path)
      if len(found) != count:
        raise UserError(f"{path} has {len(found):,} signatures, and must have {count:,}: prepare its data set again")
      joined.write(found.tobytes())


def _read(path: str) -> np.ndarray:
  try:
    with stores.open_file(path) as file:
      found = np.load(file, allow_pickle=False)
    if found.dtype != DTYPE or found.ndim != 1:
      raise ValueError("other fields")
    return found
  except (ValueError, EOFError) as error:
    raise UserError(f"{path} is damaged or of another version ({error}): prepare its data set again") from None
