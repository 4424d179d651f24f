"""A bounded cache of files of object stores, one per host: whole copies, the least recently used removed first.

  CACHE/shards/HASH-NAME    a copy; its time of change is that of its last use
  CACHE/shards/locks/000    a lock, under which the files whose hash begins so are fetched, opened or removed

All processes of a host share it. A copy may be removed while another process reads it, whose open file lives on until
it closes it. A name is a hash of address, size and content, so that no copy is ever out of date. A copy is checked by
size whenever it is opened, and by its hash when it came, or when a record of it is found to be damaged.
"""

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple, TypeVar

from jflow import files, stores
from jflow.errors import UserError
from jflow.progress import say

USUAL = "~/.cache/jflow"
_POLL = 0.02  # seconds
_SHARED = 3  # digits of a hash: 4,096 locks, so that a file whose store fails makes hardly another one wait
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
      files.open_lock(self._lock_name("0" * _SHARED)).close()
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
    waits, told = iter(stores.WAITS), False
    while True:
      try:
        with self._locked(remote.name):
          if _has_size(path, remote.size) or self._fetch(remote, path):
            with contextlib.suppress(OSError):
              os.utime(path)
            if told:
              say(f"{self._root} has room again")
            return opener(path)
        time.sleep(_POLL)  # files that others fetch are in the way, and without a lock held they all come
      except OSError as error:
        if error.errno not in _FULL:
          raise
        if (wait := next(waits, None)) is None:
          message = (
            f"the disk has no room for a shard of {remote.size:,} bytes: make some, or name another {self._field}"
          )
          raise OSError(error.errno, message, self._root) from None
        if not told:
          say(f"{self._root}: the disk is full; waiting for room for {remote.size:,} bytes")
          told = True
        time.sleep(wait)

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

  def _fetch(self, remote: Remote, path: str) -> bool:
    """Copies a file, whose lock is held; of what fails nothing is left. Returns False where there is no room yet."""
    known, new = stores.Stat(remote.size, remote.version), path + files.PART
    try:
      with open(new, "wb") as file:
        if not self._reserve(remote, file):
          return False
        for _ in range(2):
          file.seek(0)
          digest = stores.download(remote.address, known, file)
          if not remote.sha256 or digest == remote.sha256:
            file.flush()
            os.fsync(file.fileno())
            os.replace(new, path)
            return True
      raise UserError(
        f"{remote.address} has not the bytes that its list of hashes says: it was changed or damaged; prepare the "
        "source again"
      )
    finally:
      files.remove(new)

  def _reserve(self, remote: Remote, file: BinaryIO) -> bool:
    """Takes room for a file, where need be from the copies that were not used for the longest; returns whether it fits.

    Raises:
      OSError: the disk is full of other files.
    """
    with self._locked("room"):
      held, total = self._held(), remote.size
      total += sum(size for _, size, _ in held)
      while held and total > self._most:
        total -= self._remove(held.pop(0), remote)
      while total <= self._most:
        try:
          if remote.size:
            os.posix_fallocate(file.fileno(), 0, remote.size)
          return True
        except OSError as error:
          if error.errno not in _FULL:  # a file system that reserves nothing
            return True
          if not held:
            raise
          self._remove(held.pop(0), remote)
    return False

  def _held(self) -> list[tuple[int, int, str]]:
    """(time of last use, bytes, name) of all copies, the least recently used first."""
    found = []
    with os.scandir(self._root) as entries:
      for entry in entries:
        with contextlib.suppress(OSError):  # it was just removed
          if entry.is_file(follow_symlinks=False):
            known = entry.stat(follow_symlinks=False)
            found.append((known.st_mtime_ns, known.st_size, entry.name))
    return sorted(found)

  def _remove(self, held: tuple[int, int, str], remote: Remote) -> int:
    """Removes a copy, or what a killed process left of one, unless another is at it; returns the bytes that are free.

    Args:
      held: of `_held`.
      remote: the file whose lock this process holds.
    """
    _, size, name = held
    if name == remote.name + files.PART:
      return 0
    with contextlib.suppress(OSError), files.open_lock(self._lock_name(name)) as lock:
      if name[:_SHARED] == remote.name[:_SHARED] or files.lock(lock):
        os.unlink(os.path.join(self._root, name))
        return size
    return 0

  @contextlib.contextmanager
  def _locked(self, name: str) -> Iterator[None]:
    with files.open_lock(self._lock_name(name)) as lock:
      with contextlib.suppress(OSError):  # a file system without locks: processes may fetch a file twice
        files.lock(lock, wait=True)
      yield

  def _lock_name(self, name: str) -> str:
    return os.path.join(self._root, "locks", name if name == "room" else name[:_SHARED])


def _has_size(path: str, size: int) -> bool:
  try:
    return os.stat(path).st_size == size
  except OSError:
    return False
