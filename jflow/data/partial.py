"""A directory of work that is not whole yet: one process writes in it, and a killed one's work is taken up again."""

import fcntl
import json
import os
import shutil
from typing import Any, TextIO

from jflow.errors import UserError

_JOB, _LOCK = "job.json", "lock"


def open_partial(partial: str, job: dict[str, Any], flag: str) -> TextIO:
  """Makes the directory and locks it; returns the lock, which ends with the process.

  What another job left there, or this one on files that changed since, is removed.

  Args:
    partial: the directory.
    job: what the work depends on, as JSON has it.
    flag: the option that named the place, for messages.

  Raises:
    UserError: it cannot be written, or another process writes in it.
  """
  try:
    os.makedirs(partial, exist_ok=True)
    lock = open(os.path.join(partial, _LOCK), "w")
  except OSError as error:
    raise UserError(f"{flag}: cannot write {partial} ({error.strerror})") from None
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise UserError(f"{partial} is being written by another process: wait until it ends") from None
  except OSError:  # a file system without locks
    pass
  path = os.path.join(partial, _JOB)
  try:
    with open(path, encoding="utf-8") as file:
      if json.load(file) == job:
        return lock
  except (OSError, ValueError):
    pass
  for entry in list(os.scandir(partial)):
    if entry.is_dir(follow_symlinks=False):
      shutil.rmtree(entry.path)
    elif entry.name != _LOCK:
      os.remove(entry.path)
  write_json(path, job)
  return lock


def write_json(path: str, value: Any) -> None:
  """Writes a file that is either whole or not there."""
  # A lone surrogate, in a message or the name of a file, so becomes its escape.
  with open(path + ".tmp", "w", encoding="utf-8", errors="backslashreplace") as file:
    json.dump(value, file, ensure_ascii=False, indent=1)
    file.flush()
    os.fsync(file.fileno())
  os.rename(path + ".tmp", path)
