"""The end of an import: the parts' files become a prepared data set, here by a rename, in a store by its last file."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from jflow import files, stores, uploads
from jflow.data.store import prepared, shards
from jflow.data.store.part import SIGNATURES, SUFFIXES

REJECTED = "rejected.jsonl"  # every record that was left out: where, message, reason


def finish(
  partial: str,
  output: str,
  task: str,
  stems: Sequence[str],
  reports: Sequence[dict[str, Any]],
  summary: dict[str, Any],
) -> None:
  """Names the shards as TFDS does, and writes the metadata.

  Here it works in a separate directory of links to the parts, so that a kill leaves the parts unchanged. A store copies
  the parts' files, and gets summary.json last, without which a folder is no data set.

  Args:
    partial: of the unfinished work.
    output: the directory to make.
    task: of the records.
    stems: of the files of each part, here or in a store.
    reports: of each part.
    summary: the contents of summary.json.

  Raises:
    OSError: a file cannot be written, or the store answers no more.
  """
  kept = [index for index, report in enumerate(reports) if report["records"]]
  names, checksums = {}, {}
  signed = all(os.path.basename(stems[index]) + SIGNATURES in reports[index]["files"] for index in kept)
  for shard, index in enumerate(kept):
    made = {
      SUFFIXES[0]: prepared.shard_name(task, shard, len(kept)),
      SUFFIXES[1]: prepared.outline_name(shard, len(kept)),
    }
    if signed:
      made[SIGNATURES] = prepared.signature_name(shard, len(kept))
    for suffix, name in made.items():
      names[stems[index] + suffix] = name
      checksums[name] = reports[index]["files"][os.path.basename(stems[index]) + suffix]["sha256"]
  with tempfile.TemporaryDirectory() if stores.is_address(output) else _empty(partial) as whole:
    for source, name in names.items():
      path = os.path.join(whole, name)
      open(path, "wb").close() if stores.is_address(output) else files.link(source, path)  # TFDS looks for it
    _join([stem + SUFFIXES[2] for stem, report in zip(stems, reports) if report["rejected"]], whole)
    prepared.write_metadata(whole, task, summary["shard_lengths"], summary["bytes"])
    shards.write_checksums(whole, checksums)
    files.write_json(os.path.join(whole, prepared.SUMMARY), summary)
    if stores.is_address(output):
      for name in {*stores.listed(output)}.difference(os.listdir(whole)):  # of an end that was killed, on another input
        stores.remove(stores.join(output, name))
      stores.each(lambda source: uploads.copy(source, stores.join(output, names[source])), list(names))
      for name in sorted({*os.listdir(whole)}.difference(names.values()), key=lambda name: name == prepared.SUMMARY):
        uploads.upload(os.path.join(whole, name), stores.join(output, name))
      return
    if os.path.isdir(output):
      os.rmdir(output)
    files.publish(whole, output)


@contextlib.contextmanager
def _empty(partial: str) -> Iterator[str]:
  """An empty folder in that of the unfinished work."""
  whole = os.path.join(partial, "whole")
  files.remove(whole)
  os.mkdir(whole)
  yield whole


def _join(paths: Sequence[str], directory: str) -> None:
  """Joins the parts' files of rejected records into one file, if there are any."""
  if paths:
    with open(os.path.join(directory, REJECTED), "wb") as joined:
      for path in paths:
        with stores.open_file(path) as file:
          shutil.copyfileobj(file, joined)
