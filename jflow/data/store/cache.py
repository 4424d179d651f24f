"""A bounded cache of files of object stores, one per host: whole copies, the least recently used removed first.

  CACHE/shards/HASH-NAME    a copy; its time of change is that of its last use
  CACHE/shards/locks/00     a lock, under which the files whose hash begins so are fetched, opened or removed

All processes of a host share it. A copy may be removed while another process reads it, whose open file lives on until it
closes it. A name is a hash of address, size and content, so that no copy is ever out of date. A copy is checked by size
whenever it is opened, and by its hash when it came, or when a record of it is found to be damaged.
"""

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from jflow import files, stores
from jflow.errors import UserError
from jflow.progress import say

USUAL = "~/.cache/jflow"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_T = TypeVar("_T")


class Remote(NamedTuple):
  """A file of a store, as it must be."""

  address: str
  size: int
  version: str  # its SHA-256 in hex, or what the store says of its content

  @property
  def name(self) -> str:
    return f"{hashlib.sha256(repr(self).encode()).hexdigest()[:24]}-{os.path.basename(self.address)}"

  @property
  def sha256(self) -> str:
    """The hash of its content; "": it is not known."""
    return self.version.removeprefix("sha256:") if self.version.startswith("sha256:") else ""


class Cache:
  """The copies below a folder. Picklable."""

  def __init__(self, folder: str, most: float, field: str = "data.cache"):
    """Opens a cache.

    Args:
      folder: of this machine.
      most: bytes of all copies; what processes hold open of removed ones comes on top.
      field: that named the folder, for messages.

    Raises:
      UserError: the folder cannot be written.
    """
    self._root, self._most, self._field = os.path.join(os.path.expanduser(folder), "shards"), most, field
    try:
      os.makedirs(os.path.join(self._root, "locks"), exist_ok=True)
      files.open_lock(self._lock_name("00")).close()
    except OSError as error:
      raise UserError(f"{field}={folder} cannot be written ({error.strerror}): name a folder of a local disk") from None

  def check(self, remote: Remote) -> None:
    """Checks that a file may ever lie here.

    Raises:
      UserError: it is larger than the whole cache.
    """
    if remote.size > self._most:
      raise UserError(
        f"{self._field}_gib={self._most / 2**30:g} must hold {remote.address} of {remote.size / 2**30:.3g} GiB, and "
        "better the shards of several steps"
      )

  def open(self, remote: Remote, opener: Callable[[str], _T]) -> _T:
    """Returns opener(path of the copy), which is fetched if it is not there.

    Raises:
      UserError: the store has it no more, or with another content.
      OSError: the store answers no more, or the disk is full.
    """
    path = os.path.join(self._root, remote.name)
    with self._locked(remote.name):
      if not _has_size(path, remote.size):
        self._fetch(remote, path)
      with contextlib.suppress(OSError):
        os.utime(path)
      return opener(path)

  def drop_damaged(self, remote: Remote) -> bool:
    """Removes a copy whose bytes are not those of the store any more; returns whether it has."""
    path = os.path.join(self._root, remote.name)
    with self._locked(remote.name):
      try:
        if remote.sha256 and files.sha256(path) == remote.sha256:
          return False
      except OSError:
        pass
      files.remove(path)
    return True

  def has(self, remote: Remote) -> bool:
    """Whether a copy is there."""
    return _has_size(os.path.join(self._root, remote.name), remote.size)

  def touch(self, remote: Remote) -> None:
    """Notes that a copy, which is open, is in use."""
    with contextlib.suppress(OSError):
      os.utime(os.path.join(self._root, remote.name))

  def _fetch(self, remote: Remote, path: str) -> None:
    """Copies a file, and waits for the disk where that is full; its lock is held."""
    told = False
    for tries, wait in enumerate((*stores.WAITS, None)):
      try:
        self._make_room(remote.size)
        self._copy(remote, path)
        if told:
          say(f"{self._root} has room again")
        return
      except OSError as error:
        if error.errno not in _FULL:
          raise
        if self._make_room(remote.size, remote.size) and not tries:  # other files fill the disk: fewer copies
          continue
        if wait is None:
          raise OSError(
            error.errno,
            f"the disk has no room for a shard of {remote.size:,} bytes: make some, or name another {self._field}",
            self._root,
          ) from None
        if wait and not told:
          say(f"{self._root}: the disk is full; waiting for room for {remote.size:,} bytes")
          told = True
        time.sleep(wait)

  def _copy(self, remote: Remote, path: str) -> None:
    """Copies a file, twice where it came with another hash; of what fails nothing is left."""
    known = stores.Stat(remote.size, remote.version)
    new = path + files.PART
    try:
      for _ in range(2):
        with open(new, "wb") as file:
          if remote.size:
            with _only_full():
              os.posix_fallocate(file.fileno(), 0, remote.size)
          digest = stores.download(remote.address, known, file)
          file.flush()
          os.fsync(file.fileno())
        if not remote.sha256 or digest == remote.sha256:
          return os.replace(new, path)
      raise UserError(
        f"{remote.address} has not the bytes that its list of hashes says: it was changed or damaged; prepare the "
        "source again"
      )
    finally:
      files.remove(new)

  def _make_room(self, size: int, freed: int = 0) -> bool:
    """Removes the copies that were not used for the longest, until `size` more bytes fit and so many are freed.

    Returns whether a copy was removed.
    """
    begun = -freed
    with self._locked("room"):
      held = []
      with os.scandir(self._root) as entries:
        for entry in entries:
          with contextlib.suppress(OSError):  # it was just removed
            if entry.is_file(follow_symlinks=False):
              found = entry.stat(follow_symlinks=False)
              held.append((found.st_mtime_ns, found.st_size, entry.name))
      total = sum(bytes for _, bytes, _ in held) + size
      for _, bytes, name in sorted(held):
        if total <= self._most and begun >= 0:
          break
        if self._remove(name):
          total, begun = total - bytes, begun + bytes
    return begun > -freed

  def _remove(self, name: str) -> bool:
    """Removes a copy, or what a killed process left of one, unless a process is at it; returns whether it has."""
    with contextlib.suppress(OSError), files.open_lock(self._lock_name(name)) as lock:
      if files.lock(lock):
        os.unlink(os.path.join(self._root, name))
        return True
    return False

  @contextlib.contextmanager
  def _locked(self, name: str) -> Iterator[None]:
    with files.open_lock(self._lock_name(name)) as lock:
      with contextlib.suppress(OSError):  # a file system without locks: processes may fetch a file twice
        files.lock(lock, wait=True)
      yield

  def _lock_name(self, name: str) -> str:
    return os.path.join(self._root, "locks", name if name == "room" else name[:2])


@contextlib.contextmanager
def _only_full() -> Iterator[None]:
  """Passes the error of a full disk alone: some file systems reserve nothing."""
  try:
    yield
  except OSError as error:
    if error.errno in _FULL:
      raise


def _has_size(path: str, size: int) -> bool:
  try:
    return os.stat(path).st_size == size
  except OSError:
    return False
