"""`python -m jflow prepare`: checks records and writes them as a prepared data set (prepared.py).

The input is cut into parts; each part becomes a shard, written under OUTPUT.partial. After a kill, the same command
continues with the missing parts. OUTPUT appears, by a rename, only once it is complete. It may be in a store: parts are
made on this machine and sent there one by one, and it is complete once it holds summary.json.

Many machines share the work by `--part=K/N`: each writes every N-th part under a folder of its own beside OUTPUT, and
`--merge` makes OUTPUT of them, the same as one machine would.
"""

import collections
import concurrent.futures
import concurrent.futures.process
import dataclasses
import hashlib
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jflow import stores
from jflow.batch import TASKS
from jflow.data import importers
from jflow.data.filters import Filters
from jflow.data.importers import Importer
from jflow.data.processes import end_with_parent
from jflow.data.store import beam as beam_lib
from jflow.data.store import machines, prepared, repeats, scratch
from jflow.data.store.finish import finish
from jflow.data.store.part import import_part
from jflow.data.store.partial import open_partial, read_report
from jflow.errors import Stopped, Terminated, UserError, need_text_name
from jflow.progress import Progress

# The files of an output.
_OURS = re.compile(r"jflow_|outlines-|signatures-|features\.json|dataset_info\.json|sha256sums\.txt|rejected\.jsonl")
_done: Any = None  # in a worker: work and records done by all of them, and whether to stop
_job: Any = None  # in a worker: the importer, the task and the filters


def prepare(
  format: str,
  output: str,
  task: str,
  input: str = "",
  max_rejected_share: float = 0.01,
  filters: Filters = Filters(),
  processes: int = 1,
  part: tuple[int, int] | None = None,
  merge: bool = False,
  beam: str | None = None,
  **options: Any,
) -> dict[str, Any]:
  """Writes a prepared data set and returns its summary.

  Args:
    format: one of `importers.FORMATS`.
    output: the directory to write, which must not exist.
    task: "understanding", "generation" or "text".
    input: file, folder or pattern to read; empty for a format that reads no files.
    max_rejected_share: share of unusable records above which the output is not made. The parts are kept, so that
      another run with a larger share continues.
    filters: which records are wanted.
    processes: processes that read and check.
    part: (K, N) of `--part`: does only the K-th of N machines' share, 1 <= K <= N, which `merge` joins with the others.
    merge: joins the shares of all N machines in place of importing.
    beam: flags of Apache Beam, which imports the parts in place of processes; None: it does not.
    options: the other fields of `importers.Options` that the format reads.

  Returns:
    The contents of summary.json; of a part, those that its share would have.

  Raises:
    UserError: the input is missing, the output exists, too many records are unusable, or a share that `merge` needs is
      missing, unfinished, or of another import.
  """
  if task not in TASKS:
    raise UserError(f"--task={task} is unknown: use one of {', '.join(TASKS)}")
  importers.check_flags(format, options)
  filters.check()
  if beam is not None:
    beam_lib.check(beam)
  options = importers.Options(input=input, task=task, **options)
  importer = importers.open_importer(format, options)
  need_text_name("--output", output)
  output = stores.absolute(output)
  job = {
    **dataclasses.asdict(options),
    "schema": prepared.SCHEMA,
    "format": format,
    "filters": filters.told(),
    "input": stores.absolute(input) if input else "",
    "files": _fingerprint(importer.files()),
  }
  if sources := filters.sources():
    job["filter_sources"] = sources
  if filters.against:
    job["against"] = repeats.check(filters.against)
  if _is_taken(output):
    if not part and (summary := _ended(output, job)):
      return summary
    raise UserError(f"{output} exists: name another --output or remove it")
  parts = importer.parts()
  if part:
    job["machines"] = part[1]
  shares = machines.shares(output, job, len(parts)) if merge else []
  partial = output + (machines.suffix(*part) if part else ".partial")
  stems = [stores.join(shares[i % len(shares)] if merge else partial, f"part-{i:05d}") for i in range(len(parts))]
  own = range(part[0] - 1, len(parts), part[1]) if part else range(len(parts))
  again = "run the same command again to go on"
  with open_partial(partial, job, "--output"):
    try:
      if merge:
        reports = machines.reports(stems, shares)
      else:
        reports = _run(importer, parts, stems, own, task, filters, processes, beam)
      summary = _summary(job, reports, importer.left_out)
      if part:
        return summary
      problem = _problem(summary, max_rejected_share)
      if filters.rule and not problem:
        stems, reports = repeats.dropped(partial, stems, reports, filters, processes)
        summary = _summary(job, reports, importer.left_out)
        problem = _problem(summary, max_rejected_share)
      if not problem:
        finish(partial, output, task, stems, reports, summary)
      elif summary["accepted"]:
        _read_again(importer, stems, reports)
    except Terminated as error:
      raise Terminated(error.signum, f"stopped; {again}") from None
    except KeyboardInterrupt:
      raise KeyboardInterrupt(f"stopped; {again}") from None
    except concurrent.futures.process.BrokenProcessPool:
      raise UserError(f"a process of the import was killed (out of memory?): {again}, with fewer --processes") from None
    except OSError as error:
      raise UserError(f"{error.filename or output}: {error.strerror or error}; {again}") from None
  if not problem or not summary["accepted"]:
    for folder in (partial, *shares):
      scratch.remove(folder)
  if problem:
    raise UserError(problem)
  return summary


def _run(
  importer: Importer,
  parts: Sequence[Any],
  stems: Sequence[str],
  own: Sequence[int],
  task: str,
  filters: Filters,
  processes: int,
  beam: str | None,
) -> list[dict[str, Any]]:
  """Imports the missing parts of `own`, to files named by `stems`; returns the reports of those parts, in order."""
  reports: dict[int, Any] = dict.fromkeys(own)
  there = _begun(stems, own)
  if there:  # hashing each takes a while
    print(f"jflow: checking {len(there):,} of {len(own):,} parts, which are there already", file=sys.stderr, flush=True)
  reports |= _read_reports(stems, there, processes)
  todo = [index for index, report in reports.items() if report is None]
  if beam is not None and todo:
    beam_lib.run(importer, parts, stems, todo, task, filters, beam)
    reports |= _read_reports(stems, todo, processes, by_size=True)  # its workers have hashed what they wrote
    if (lost := next((index for index in todo if reports[index] is None), None)) is not None:
      raise UserError(f"{stems[lost]} was made by Beam and is not here: its workers must share the disk, or a store")
    return list(reports.values())
  work = {index: importer.work(parts[index]) for index in own}
  with Progress(sum(work.values()), sum(work.values()) - sum(work[i] for i in todo)) as progress:
    if min(processes, len(todo)) <= 1:
      for index in todo:
        reports[index] = import_part(importer, parts[index], stems[index], task, filters, progress.add)
      return list(reports.values())
    # Threads of the parent would not survive a fork.
    context = multiprocessing.get_context("spawn")
    done = context.Array("q", 3)
    with concurrent.futures.ProcessPoolExecutor(
      min(processes, len(todo)), context, initializer=_begin_process, initargs=(done, importer, task, filters)
    ) as pool:
      # Workers inherit that they ignore Ctrl-C.
      signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
      try:
        futures = {pool.submit(_import_in_process, parts[i], stems[i]): i for i in todo}
      finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
      waiting = set(futures)
      try:
        while waiting:
          ready, waiting = concurrent.futures.wait(waiting, 0.5, concurrent.futures.FIRST_COMPLETED)
          for future in ready:
            reports[futures[future]] = future.result()
          progress.show(*done[:2])
      except BaseException:
        done[2] = True
        pool.shutdown(wait=False, cancel_futures=True)
        raise
  return list(reports.values())


def _read_reports(
  stems: Sequence[str], indices: Sequence[int], processes: int, by_size: bool = False
) -> dict[int, Any]:
  """The reports of parts, many at a time; None of one that is missing or damaged. `by_size`: see `read_report`."""
  with concurrent.futures.ThreadPoolExecutor(max(1, processes)) as pool:
    return dict(zip(indices, pool.map(lambda index: read_report(stems[index] + ".json", by_size), indices)))


def _begun(stems: Sequence[str], own: Sequence[int]) -> list[int]:
  """The parts of `own` that have a report."""
  if not own or not stores.is_address(stems[own[0]]):
    return [index for index in own if os.path.exists(stems[index] + ".json")]
  folder = stems[own[0]].rpartition("/")[0]
  names = stores.listed(folder)
  return [index for index in own if stems[index].rpartition("/")[2] + ".json" in names]


def _begin_process(done: Any, importer: Importer, task: str, filters: Filters) -> None:
  global _done, _job
  _done, _job = done, (importer, task, filters)
  end_with_parent()  # so that no worker writes a part that the next run also writes


def _import_in_process(part: Any, stem: str) -> dict[str, Any]:
  importer, task, filters = _job
  return import_part(importer, part, stem, task, filters, _count)


def _count(work: int) -> None:
  with _done.get_lock():
    _done[0] += work
    _done[1] += 1
    if _done[2]:
      raise Stopped("another part of the import failed, or it was interrupted")


def _summary(job: dict[str, Any], reports: Sequence[dict[str, Any]], left_out: Mapping[str, int]) -> dict[str, Any]:
  rejected, filtered, notes, first = *(collections.Counter() for _ in range(3)), {}
  for report in reports:
    rejected.update(report["rejected"])
    filtered.update(report["filtered"])
    notes.update(report["notes"])
    first = {**report["first_rejected"], **first}
  return {
    "schema": prepared.SCHEMA,
    "task": job["task"],
    "format": job["format"],
    "input": job["input"],
    "accepted": sum(report["records"] for report in reports),
    "rejected": dict(rejected),
    "first_rejected": {reason: first[reason] for reason in rejected},
    "filtered": dict(filtered),
    "filters": job["filters"],
    "notes": dict(notes),
    "left_out": dict(left_out),
    "images": sum(report["images"] for report in reports),
    "bytes": sum(report["bytes"] for report in reports),
    "fingerprint": hashlib.sha256("".join(report["digest"] for report in reports).encode()).hexdigest(),
    "shard_lengths": [report["records"] for report in reports if report["records"]],
    "shard_bytes": [report["file_bytes"] for report in reports if report["records"]],
  }


def _problem(summary: dict[str, Any], max_rejected_share: float) -> str | None:
  """Returns why the output must not be written; None if it may."""
  rejected, accepted = sum(summary["rejected"].values()), summary["accepted"]
  read = accepted + rejected + sum(summary["filtered"].values())
  if rejected > max_rejected_share * read or (rejected and not accepted):
    reason, first = next(iter(summary["first_rejected"].items()))
    share = (
      f", more than --max_rejected_share={max_rejected_share}; what is done is kept for a run with a larger one"
      if accepted
      else ""
    )
    return (
      f"{first['where']}: {first['message']} ({reason}); in all {rejected:,} of {read:,} records "
      f"cannot be used {summary['rejected']}{share}"
    )
  if not accepted and summary["filtered"]:
    return f"the filters left no record: they dropped {summary['filtered']}"
  return None if accepted else f"{summary['input']}: no records found"


def _is_taken(output: str) -> bool:
  """Whether an output is there, or something else in its place; in a store, an unfinished one may be gone on with."""
  if not stores.is_address(output):
    return os.path.exists(output) and (not os.path.isdir(output) or bool(os.listdir(output)))
  names = stores.listed(output)
  return prepared.SUMMARY in names or any(not _OURS.match(name) for name in names) or stores.find(output) is not None


def _ended(output: str, job: dict[str, Any]) -> dict[str, Any] | None:
  """The summary of an output whose import was killed at its very end, and what is left of that removed; None: it was
  not."""
  try:
    summary = prepared.read_summary(output)
  except UserError:
    return None
  same = all(summary.get(name) == job[name] for name in ("task", "format", "input", "filters"))
  return summary if same and machines.remove_left(output, job) else None


def _read_again(importer: Importer, stems: Sequence[str], reports: Sequence[dict[str, Any]]) -> None:
  """Removes the reports of parts with a rejected image file, which may be repaired, so that the next run reads them."""
  for stem, report in zip(stems, reports, strict=True):
    if importer.images_beside and report["rejected"]:
      scratch.remove(stem + ".json")


def _fingerprint(files: Sequence[str]) -> str:
  """Returns a hash of the names, sizes and times of files."""
  known = zip(files, stores.each(stores.stat, files))
  stats = [
    (path, stat.size, stat.version)
    if stores.is_address(path)
    else (os.path.abspath(path), stat.size, int(stat.version))
    for path, stat in known
  ]
  return hashlib.sha256(repr(stats).encode()).hexdigest()
