"""The parts of an import without the records that repeat earlier ones, of other data sets or of this import."""

import collections
import concurrent.futures
import multiprocessing
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
from jflow.data.store.partial import clear, write_report
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
  rule = filters.rule
  assert rule is not None
  earlier = [file for directory in filters.against or () for file in _signed(directory)]
  signed = [(stem + SIGNATURES, report["records"]) for stem, report in zip(stems, reports, strict=True)]
  known = _joined([*earlier, *signed])
  repeated = duplicates.found(known, rule)
  begin, tasks = sum(count for _, count in earlier), {}
  new_stems, new_reports = list(stems), list(reports)
  for index, (_, count) in enumerate(signed):
    first = repeated[begin : begin + count]
    same = known["content"][begin : begin + count] == known["content"][first]
    begin += count
    if (first >= 0).any():
      new_stems[index] = stores.join(partial, f"kept-{index:05d}")
      counts = collections.Counter({"duplicate": int((same & (first >= 0)).sum())})
      counts["near_duplicate"] = int((first >= 0).sum()) - counts["duplicate"]
      tasks[index] = (stems[index], new_stems[index], reports[index], first < 0, {k: n for k, n in counts.items() if n})
  for index, report in zip(tasks, _all_without(list(tasks.values()), processes)):
    new_reports[index] = report
  return new_stems, new_reports


def _all_without(tasks: Sequence[Any], processes: int) -> list[dict[str, Any]]:
  processes = min(processes, len(tasks))
  if processes < 2:
    return list(map(_without, tasks))
  context = multiprocessing.get_context("spawn")  # threads of the parent would not survive a fork
  with concurrent.futures.ProcessPoolExecutor(processes, context, end_with_parent) as pool:
    return list(pool.map(_without, tasks))


def _without(task: tuple[str, str, dict[str, Any], np.ndarray, dict[str, int]]) -> dict[str, Any]:
  """Writes one part again, without the records that `keep` leaves out; returns its report."""
  from array_record.python import array_record_module

  stem, target, report, keep, counts = task
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


def _joined(files: Sequence[tuple[str, int]]) -> np.ndarray:
  """The signatures of files, each of so many, DTYPE[N]: held once, not beside those of each file."""
  known, begin = np.empty(sum(count for _, count in files), DTYPE), 0
  for path, count in files:
    found = _read(path)
    if len(found) != count:
      raise UserError(f"{path} has {len(found):,} signatures, and must have {count:,}: prepare its data set again")
    known[begin : begin + count] = found
    begin += count
  return known


def _read(path: str) -> np.ndarray:
  try:
    with stores.open_file(path) as file:
      found = np.load(file, allow_pickle=False)
    if found.dtype != DTYPE or found.ndim != 1:
      raise ValueError("other fields")
    return found
  except (ValueError, EOFError) as error:
    raise UserError(f"{path} is damaged or of another version ({error}): prepare its data set again") from None
