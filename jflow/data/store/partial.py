"""A directory of unfinished work: one process writes in it, and the work of a killed one is continued."""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, TextIO

from jflow import __version__, files, stores
from jflow.data.store.scratch import local
from jflow.errors import UserError
from jflow.strict_json import Malformed, parse
from jflow.uploads import need_writable, write_bytes

JOB, _LOCK = "job.json", "lock"
_DIGEST = "digest_of_report"


def open_partial(partial: str, job: dict[str, Any], flag: str) -> TextIO:
  """Creates the directory and locks it; returns the lock, which ends with the process.

  The files of another job, or of this one on inputs that have changed since, are removed; files of an unknown origin
  are not.

  Args:
    partial: the directory.
    job: all that the work depends on, as a JSON value.
    flag: the option that named the directory, for messages.

  Raises:
    UserError: it cannot be written, another process writes in it, or it holds files of an unknown origin.
  """
  here = partial if not stores.is_address(partial) else os.path.dirname(local(stores.join(partial, _LOCK)))
  try:
    os.makedirs(here, exist_ok=True)
    lock = files.open_lock(os.path.join(here, _LOCK))
  except OSError as error:
    raise UserError(f"{flag}: cannot write {here} ({error.strerror})") from None
  try:
    if not files.lock(lock):
      lock.close()
      raise UserError(f"{partial} is being written by another process: wait until it ends")
  except OSError:  # a file system without locks
    pass
  if here != partial:
    _begin_in_store(partial, job, flag, lock)
    return lock
  path = os.path.join(partial, JOB)
  for name in os.listdir(partial):
    if name.startswith(JOB + ".") and name.endswith(files.PART):  # a kill while it was written
      files.remove(os.path.join(partial, name))
  others = sorted(name for name in os.listdir(partial) if name not in (_LOCK, JOB))
  try:
    if files.read_object(path) == job:
      return lock
  except (FileNotFoundError, Malformed) as error:
    if others or os.path.isdir(path):  # of an unknown origin
      problem = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged: {error}"
      lock.close()
      raise UserError(
        f"{partial} holds {(others or [JOB])[0]}, and its {JOB} {problem}: if it is of no use, remove {partial}"
      ) from None
  for name in others:
    files.remove(os.path.join(partial, name))
  files.write_json(path, job)  # last, so that after a kill the next start still removes the rest
  return lock


def _begin_in_store(partial: str, job: dict[str, Any], flag: str, lock: TextIO) -> None:
  """`open_partial` for a folder of a store, whose lock is one of this machine."""
  need_writable(flag, partial)
  path, others = stores.join(partial, JOB), [name for name in stores.listed(partial) if name != JOB]
  try:
    if parse(stores.read_bytes(path)) == job:
      return
  except (FileNotFoundError, Malformed) as error:
    if others:  # of an unknown origin
      lock.close()
      raise UserError(
        f"{partial} holds {others[0]}, and its {JOB} is missing or damaged ({error}): if it is of no use, remove it"
      ) from None
  for name in others:
    stores.remove(stores.join(partial, name))
  write_bytes(path, json.dumps(job, ensure_ascii=False, indent=1).encode())


def clear(paths: Sequence[str]) -> None:
  """Removes the files that a killed process left of a part; a link is removed, never followed.

  Raises:
    OSError: one of the paths is a folder.
  """
  for path in paths:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(path)


def write_report(path: str, report: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
  """Writes the report of a part whose files are finished; its presence means that they are complete.

  Returns:
    The report, with "files", the size and hash of each, and "version", that of jflow.
  """
  report = {**report, "version": __version__, "files": {os.path.basename(file): files.entry(file) for file in paths}}
  files.write_json(path, {**report, _DIGEST: _digest(report)})
  return report


def read_report(path: str, by_size: bool = False) -> dict[str, Any] | None:
  """Returns the report of a part; None where it is missing, or it or a file of the part has changed.

  Args:
    path: of the report.
    by_size: whether files of this machine are not hashed, as those that were just made.
  """
  try:
    report = parse(stores.read_bytes(path))
    if not isinstance(report, dict) or report.pop(_DIGEST, None) != _digest(report):
      return None
    folder = path.rpartition("/")[0]
    for name, entry in report["files"].items():
      file = stores.join(folder, name)
      found = stores.find(file)
      if found is None or found.size != entry["bytes"]:
        return None
      # The hash of a store's file was checked when it was sent.
      if not (by_size or stores.is_address(path)) and files.sha256(file) != entry["sha256"]:
        return None
    return report
  except (FileNotFoundError, Malformed):
    return None
  except OSError:
    if stores.is_address(path):
      raise
    return None


def _digest(report: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()
