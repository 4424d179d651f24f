"""A directory of unfinished work: one process writes in it, and the work of a killed one is continued."""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, TextIO

from jflow import files
from jflow.errors import UserError
from jflow.strict_json import Malformed

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
  try:
    os.makedirs(partial, exist_ok=True)
    lock = files.open_lock(os.path.join(partial, _LOCK))
  except OSError as error:
    raise UserError(f"{flag}: cannot write {partial} ({error.strerror})") from None
  try:
    if not files.lock(lock):
      lock.close()
      raise UserError(f"{partial} is being written by another process: wait until it ends")
  except OSError:  # a file system without locks
    pass
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
    The report, with "files": the size and hash of each.
  """
  report = {**report, "files": {os.path.basename(file): files.entry(file) for file in paths}}
  files.write_json(path, {**report, _DIGEST: _digest(report)})
  return report


def read_report(path: str) -> dict[str, Any] | None:
  """Returns the report of a part; None where it is missing, or it or a file of the part has changed."""
  try:
    report = files.read_object(path)
    if report.pop(_DIGEST, None) != _digest(report):
      return None
    for name, entry in report["files"].items():
      file = os.path.join(os.path.dirname(path), name)
      if not os.path.isfile(file) or files.sha256(file) != entry["sha256"]:
        return None
    return report
  except (OSError, Malformed):
    return None


def _digest(report: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()
