"""`python -m jflow prepare`: checks records and writes them as a prepared data set (prepared.py).

The input is cut into parts; each part becomes a shard, written under OUTPUT.partial. A run that was killed
goes on with the parts that are missing. OUTPUT appears, by a rename, only when all of it is there.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from jflow.batch import TASKS
from jflow.data import examples, images, importers, prepared
from jflow.data.importers import Importer
from jflow.data.records import RecordError
from jflow.errors import UserError


def prepare(
  format: str,
  output: str,
  task: str,
  input: str = "",
  max_rejected_share: float = 0.01,
  processes: int = 1,
  **options: Any,
) -> dict[str, Any]:
  """Writes a prepared data set and returns its summary.

  Args:
    format: one of `importers.FORMATS`.
    output: the directory to write, which must not exist yet.
    task: "understanding", "generation" or "text".
    input: file, folder or pattern to read; unused by "shapes".
    max_rejected_share: share of unusable records above which nothing is written.
    processes: processes that read and check.
    options: the other fields of `importers.Options`.

  Returns:
    The contents of summary.json.

  Raises:
    UserError: the input is missing, the output exists, or too many records are unusable.
  """
  if task not in TASKS:
    raise UserError(f"--task={task} is unknown: use one of {', '.join(TASKS)}")
  options = importers.Options(input=input, task=task, **options)
  importer = importers.open_importer(format, options)
  output = os.path.abspath(output)
  if os.path.exists(output) and (not os.path.isdir(output) or os.listdir(output)):
    raise UserError(f"{output} exists: name another --output or remove it")
  job = {
    **dataclasses.asdict(options),
    "schema": prepared.SCHEMA,
    "format": format,
    "input": os.path.abspath(input) if input else "",
    "files": _fingerprint(importer.files()),
  }
  parts = importer.parts()
  partial = output + ".partial"
  _open_partial(partial, job)
  reports = _run(importer, parts, partial, task, processes)
  summary = _summary(job, reports)
  total = summary["accepted"] + sum(summary["rejected"].values())
  if not summary["accepted"] or sum(summary["rejected"].values()) > max_rejected_share * total:
    shutil.rmtree(partial)
    first = summary["first_rejected"]
    raise UserError(
      f"{first['where']}: {first['message']} ({first['reason']}); in all {total - summary['accepted']:,} of "
      f"{total:,} records cannot be used {summary['rejected']}, more than "
      f"--max_rejected_share={max_rejected_share}"
      if first
      else f"{input}: no records found"
    )
  _finish(partial, output, task, reports, summary)
  return summary


def _run(
  importer: Importer, parts: Sequence[Any], partial: str, task: str, processes: int
) -> list[dict[str, Any]]:
  """Imports the parts that are not there yet; returns the report of every part, in order."""
  reports = [_read_report(partial, index) for index in range(len(parts))]
  todo = [index for index, report in enumerate(reports) if report is None]
  total = sum(map(importer.work, parts))
  with tqdm(
    total=total,
    initial=total - sum(importer.work(parts[i]) for i in todo),
    unit="rec",
    desc="prepare",
    disable=not sys.stderr.isatty(),
  ) as bar:
    if min(processes, len(todo)) <= 1:
      for index in todo:
        reports[index] = _import_part(importer, parts[index], index, partial, task, bar.update)
      return reports
    # Threads of the parent would not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(processes, len(todo)), mp_context=context) as pool:
      futures = {pool.submit(_import_part, importer, parts[i], i, partial, task): i for i in todo}
      try:
        for future in concurrent.futures.as_completed(futures):
          reports[futures[future]] = future.result()
          bar.update(importer.work(parts[futures[future]]))
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
  return reports


def _import_part(
  importer: Importer,
  part: Any,
  index: int,
  partial: str,
  task: str,
  progress: Callable[[int], Any] = lambda n: None,
) -> dict[str, Any]:
  """Writes one part's shard, then its report, whose presence says that the shard is whole."""
  stem = os.path.join(partial, f"part-{index:05d}")
  writer = prepared.ShardWriter(stem + ".array_record", stem + ".outlines")
  rejected, first = collections.Counter(), None
  for item in importer.items(part):
    try:
      if isinstance(item.record, RecordError):
        raise item.record
      examples.check(item.record, task)
      sizes = [list(images.decode(image).shape[1::-1]) for image in item.record.images]
      writer.write(item.record, {**item.meta, "sizes": sizes})
    except RecordError as error:
      rejected[error.reason] += 1
      first = first or {"where": item.where, "reason": error.reason, "message": str(error)}
    progress(1)
  writer.close()
  report = {
    "records": writer.records,
    "images": writer.images,
    "bytes": writer.bytes,
    "digest": writer.digest.hexdigest(),
    "file_bytes": os.path.getsize(stem + ".array_record"),
    "rejected": dict(rejected),
    "first_rejected": first,
  }
  _write_json(stem + ".json", report)
  return report


def _summary(job: dict[str, Any], reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
  rejected = collections.Counter()
  for report in reports:
    rejected.update(report["rejected"])
  return {
    "schema": prepared.SCHEMA,
    "task": job["task"],
    "format": job["format"],
    "input": job["input"],
    "accepted": sum(report["records"] for report in reports),
    "rejected": dict(rejected),
    "first_rejected": next((r["first_rejected"] for r in reports if r["first_rejected"]), None),
    "images": sum(report["images"] for report in reports),
    "bytes": sum(report["bytes"] for report in reports),
    "fingerprint": hashlib.sha256("".join(report["digest"] for report in reports).encode()).hexdigest(),
    "shard_lengths": [report["records"] for report in reports if report["records"]],
    "shard_bytes": [report["file_bytes"] for report in reports if report["records"]],
  }


def _finish(
  partial: str, output: str, task: str, reports: Sequence[dict[str, Any]], summary: dict[str, Any]
) -> None:
  """Names the shards as TFDS does, writes the metadata, and renames the directory into place.

  The work is done in a directory of its own, linked from the parts, so that a kill leaves them as they are.
  """
  whole = output + ".whole"
  shutil.rmtree(whole, ignore_errors=True)
  os.mkdir(whole)
  kept = [index for index, report in enumerate(reports) if report["records"]]
  for shard, index in enumerate(kept):
    stem = os.path.join(partial, f"part-{index:05d}")
    os.link(stem + ".array_record", os.path.join(whole, prepared.shard_name(task, shard, len(kept))))
    os.link(stem + ".outlines", os.path.join(whole, prepared.outline_name(shard, len(kept))))
  prepared.write_metadata(whole, task, summary["shard_lengths"], summary["bytes"])
  _write_json(os.path.join(whole, prepared.SUMMARY), summary)
  if os.path.isdir(output):
    os.rmdir(output)
  os.rename(whole, output)
  shutil.rmtree(partial)


def _open_partial(partial: str, job: dict[str, Any]) -> None:
  """Makes the directory of the parts; parts of another job, or of files that changed since, are removed."""
  path = os.path.join(partial, "job.json")
  try:
    with open(path, encoding="utf-8") as file:
      if json.load(file) == job:
        return
  except (OSError, ValueError):
    pass
  shutil.rmtree(partial, ignore_errors=True)
  try:
    os.makedirs(partial)
  except OSError as error:
    raise UserError(f"--output: cannot write {partial} ({error.strerror})") from None
  _write_json(path, job)


def _read_report(partial: str, index: int) -> dict[str, Any] | None:
  try:
    with open(os.path.join(partial, f"part-{index:05d}.json"), encoding="utf-8") as file:
      return json.load(file)
  except FileNotFoundError:
    return None


def _write_json(path: str, value: Any) -> None:
  """Writes a file that is either whole or not there."""
  with open(path + ".tmp", "w", encoding="utf-8") as file:
    json.dump(value, file, ensure_ascii=False, indent=1)
    file.flush()
    os.fsync(file.fileno())
  os.rename(path + ".tmp", path)


def _fingerprint(files: Sequence[str]) -> str:
  """Returns a hash of the names, sizes and times of files."""
  stats = [(os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]
  return hashlib.sha256(repr(stats).encode()).hexdigest()
