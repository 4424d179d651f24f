"""`python -m jflow prepare`: checks records and writes them as a prepared data set (prepared.py).

The input is cut into parts; each part becomes a shard, written under OUTPUT.partial. After a kill, the same command
continues with the missing parts. OUTPUT appears, by a rename, only once it is complete.

Many machines share the work by `--part=K/N`: each writes every N-th part under a folder of its own beside OUTPUT, and
`--merge` makes OUTPUT of them, the same as one machine would.
"""

import collections
import concurrent.futures
import concurrent.futures.process
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jflow import files
from jflow.batch import TASKS
from jflow.data import examples, images, importers
from jflow.data.filters import Filters
from jflow.data.importers import Importer, Item
from jflow.data.processes import end_with_parent
from jflow.data.records import Record, RecordError, Unwanted
from jflow.data.sequences import IMAGE_MARK
from jflow.data.store import machines, prepared, shards
from jflow.data.store.partial import clear, open_partial, read_report, write_report
from jflow.errors import Stopped, Terminated, UserError, need_text_name
from jflow.progress import Progress

_SUFFIXES = (".array_record", ".outlines", ".rejected")  # of the files of a part
REJECTED = "rejected.jsonl"  # every record that was left out: where, message, reason
MAX_TEXT = 65_536  # characters of a record with images; a row of 4,096 tokens holds about 16,000
_done: Any = None  # in a worker: work and records done by all of them, and whether to stop


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
  options = importers.Options(input=input, task=task, **options)
  importer = importers.open_importer(format, options)
  need_text_name("--output", output)
  output = os.path.abspath(output)
  if os.path.exists(output) and (not os.path.isdir(output) or os.listdir(output)):
    raise UserError(f"{output} exists: name another --output or remove it")
  job = {
    **dataclasses.asdict(options),
    "schema": prepared.SCHEMA,
    "format": format,
    "filters": {name: value for name, value in filters._asdict().items() if value is not None},
    "input": os.path.abspath(input) if input else "",
    "files": _fingerprint(importer.files()),
  }
  parts = importer.parts()
  if part:
    job["machines"] = part[1]
  shares = machines.shares(output, job, len(parts)) if merge else []
  partial = output + (machines.suffix(*part) if part else ".partial")
  stems = [os.path.join(shares[i % len(shares)] if merge else partial, f"part-{i:05d}") for i in range(len(parts))]
  own = range(part[0] - 1, len(parts), part[1]) if part else range(len(parts))
  again = "run the same command again to go on"
  with open_partial(partial, job, "--output"):
    try:
      if merge:
        reports = machines.reports(stems, shares)
      else:
        reports = _run(importer, parts, stems, own, task, filters, processes)
      summary = _summary(job, reports, importer.left_out)
      if part:
        return summary
      problem = _problem(summary, max_rejected_share)
      if not problem:
        _finish(partial, output, task, stems, reports, summary)
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
      files.remove(folder)
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
) -> list[dict[str, Any]]:
  """Imports the missing parts of `own`, to files named by `stems`; returns the reports of those parts, in order."""
  paths = [stems[index] + ".json" for index in own]
  if there := sum(map(os.path.exists, paths)):  # hashing each takes a while
    print(f"jflow: checking {there:,} of {len(own):,} parts, which are there already", file=sys.stderr, flush=True)
  with concurrent.futures.ThreadPoolExecutor(max(1, processes)) as pool:
    reports: dict[int, Any] = dict(zip(own, pool.map(read_report, paths)))
  todo = [index for index, report in reports.items() if report is None]
  work = {index: importer.work(parts[index]) for index in own}
  with Progress(sum(work.values()), sum(work.values()) - sum(work[i] for i in todo)) as progress:
    if min(processes, len(todo)) <= 1:
      for index in todo:
        reports[index] = _import_part(importer, parts[index], stems[index], task, filters, progress.add)
      return list(reports.values())
    # Threads of the parent would not survive a fork.
    context = multiprocessing.get_context("spawn")
    done = context.Array("q", 3)
    with concurrent.futures.ProcessPoolExecutor(
      min(processes, len(todo)), context, initializer=_begin_process, initargs=(done,)
    ) as pool:
      # Workers inherit that they ignore Ctrl-C.
      signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
      try:
        futures = {pool.submit(_import_in_process, importer, parts[i], stems[i], task, filters): i for i in todo}
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


def _begin_process(done: Any) -> None:
  global _done
  _done = done
  end_with_parent()  # so that no worker writes a part that the next run also writes


def _import_in_process(*arguments: Any) -> dict[str, Any]:
  return _import_part(*arguments, _count)


def _count(work: int) -> None:
  with _done.get_lock():
    _done[0] += work
    _done[1] += 1
    if _done[2]:
      raise Stopped("another part of the import failed, or it was interrupted")


def _import_part(
  importer: Importer,
  part: Any,
  stem: str,
  task: str,
  filters: Filters,
  count: Callable[[int], None],
) -> dict[str, Any]:
  """Writes one part's shard, then its report, whose presence means that the shard is complete."""
  paths = [stem + suffix for suffix in _SUFFIXES]
  clear(paths)
  writer = prepared.ShardWriter(stem + ".array_record", stem + ".outlines")
  rejected, filtered, notes, first = *(collections.Counter() for _ in range(3)), {}
  with open(stem + ".rejected", "w", encoding="ascii") as log:
    for item in importer.items(part):
      try:
        record, said = _learnable(item, task)
        dropped = _check(record, item.meta, task, filters)
        if dropped:
          filtered[dropped] += 1
        else:
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
  writer.close()
  report = {
    "records": writer.records,
    "images": writer.images,
    "bytes": writer.bytes,
    "digest": writer.digest.hexdigest(),
    "file_bytes": os.path.getsize(paths[0]),
    "rejected": dict(rejected),
    "filtered": dict(filtered),
    "notes": dict(notes),
    "first_rejected": first,
  }
  return write_report(stem + ".json", report, paths)


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
  return filters.drops([images.size(image) for image in record.images], meta)


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


def _finish(
  partial: str,
  output: str,
  task: str,
  stems: Sequence[str],
  reports: Sequence[dict[str, Any]],
  summary: dict[str, Any],
) -> None:
  """Names the shards as TFDS does, writes the metadata, and renames the directory into place.

  It works in a separate directory of links to the parts, so that a kill leaves the parts unchanged.
  """
  whole = os.path.join(partial, "whole")
  files.remove(whole)
  os.mkdir(whole)
  kept = [index for index, report in enumerate(reports) if report["records"]]
  checksums = {}
  for shard, index in enumerate(kept):
    names = prepared.shard_name(task, shard, len(kept)), prepared.outline_name(shard, len(kept))
    for suffix, name in zip(_SUFFIXES, names):
      _link(stems[index] + suffix, os.path.join(whole, name))
      checksums[name] = reports[index]["files"][os.path.basename(stems[index]) + suffix]["sha256"]
  shards.write_checksums(whole, checksums)
  _join([stem + ".rejected" for stem in stems], whole)
  prepared.write_metadata(whole, task, summary["shard_lengths"], summary["bytes"])
  files.write_json(os.path.join(whole, prepared.SUMMARY), summary)
  if os.path.isdir(output):
    os.rmdir(output)
  files.publish(whole, output)


def _link(source: str, target: str) -> None:
  """Links a file to a second name, or copies it where the file system has no links."""
  try:
    os.link(source, target)
  except OSError:
    shutil.copyfile(source, target)


def _join(paths: Sequence[str], directory: str) -> None:
  """Joins the parts' files of rejected records into one file, if there are any."""
  paths = [path for path in paths if os.path.getsize(path)]
  if paths:
    with open(os.path.join(directory, REJECTED), "wb") as joined:
      for path in paths:
        with open(path, "rb") as file:
          shutil.copyfileobj(file, joined)


def _read_again(importer: Importer, stems: Sequence[str], reports: Sequence[dict[str, Any]]) -> None:
  """Removes the reports of parts with a rejected image file, which may be repaired, so that the next run reads them."""
  for stem, report in zip(stems, reports, strict=True):
    if importer.images_beside and report["rejected"]:
      os.remove(stem + ".json")


def _fingerprint(files: Sequence[str]) -> str:
  """Returns a hash of the names, sizes and times of files."""
  stats = [(os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]
  return hashlib.sha256(repr(stats).encode()).hexdigest()
