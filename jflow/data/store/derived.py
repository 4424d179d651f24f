"""The cache of data derived from a source: its lengths and packing plans.

Files are kept beside the records where that is a folder of this machine that can be written, else under
`data.plan_cache`. A file's name is a hash of all that it depends on, so that it is never out of date. Files are written
atomically; of several processes that need the same one, the first makes it and the others wait.
"""

import collections
import contextlib
import glob
import hashlib
import os
from collections.abc import Iterator
from typing import Any

from jflow import files, stores
from jflow.data.records import Source


def places(source: Source, cache: str) -> list[str]:
  """Returns the folders to look in, the best first; none for a source that has no fingerprint."""
  if not hasattr(source, "fingerprint"):
    return []
  found = [source.directory] if hasattr(source, "directory") and not stores.is_address(source.directory) else []
  return found + ([os.path.expanduser(cache)] if cache else [])


def name(kind: str, *key: Any) -> str:
  """Returns "kind-HASH", with a hash of all that the file depends on."""
  return f"{kind}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"


def find(folders: list[str], file: str) -> str | None:
  """Returns the path of a cached file, in the first folder that has it."""
  return next((path for folder in folders if os.path.exists(path := os.path.join(folder, file))), None)


@contextlib.contextmanager
def alone(folders: list[str], file: str) -> Iterator[str | None]:
  """Locks a file to write; yields its path, or None where no folder can be written.

  What processes that were killed while they wrote it have left is removed. Waits while another process holds the lock,
  so look for the file again inside. The lock ends with its process.
  """
  for folder in folders:
    path = os.path.join(folder, file)
    try:
      os.makedirs(folder, exist_ok=True)
      handle = files.open_lock(path + ".lock")
    except OSError:
      continue
    with handle:
      with contextlib.suppress(OSError):  # a file system without locks: each process makes its own
        files.lock(handle, wait=True)
        _clear(path)
      try:
        yield path
      finally:
        with contextlib.suppress(OSError):
          os.unlink(path + ".lock")
    return
  yield None


def _clear(path: str) -> None:
  """Removes unfinished versions of a file or folder whose lock is held."""
  for unfinished in ("[0-9a-f]" * 32, "[0-9a-f]" * 8 + files.PART):  # of plans.py, of `files.replacing`
    for left in glob.glob(f"{glob.escape(path)}.{unfinished}"):
      files.remove(left)


def counts(value: Any) -> collections.Counter:
  """Checks the counts by reason of a file and returns them.

  Raises:
    ValueError: the value has another form.
  """
  pairs = value.items() if isinstance(value, dict) else [(None, None)]
  if not all(isinstance(name, str) and type(number) is int and number >= 0 for name, number in pairs):
    raise ValueError(f"no counts: {str(value)[:80]}")
  return collections.Counter(dict(pairs))
