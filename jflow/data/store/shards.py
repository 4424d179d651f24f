"""The entries of ArrayRecord files by their number, from a folder or through the cache of a store's (cache.py)."""

import bisect
import itertools
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jflow import files, stores
from jflow.data.store import cache as cache_lib
from jflow.errors import Stopped, UserError
from jflow.strict_json import Malformed

CHECKSUMS = "sha256sums.txt"  # of a folder's files, for copies of it
_OPEN = 64  # shards of a store that a process holds open at most
_OF_A_PROCESS = ("_lock", "_renewing", "_open", "_checked")
_TOUCHED = 30  # seconds between two notes that a copy is in use


class Entries(Protocol):
  """Random access to entries. Picklable; of many threads at once."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> bytes: ...


def open_entries(
  directory: str, names: Sequence[str], lengths: Sequence[int], cache: cache_lib.Cache | None, again: str
) -> Entries:
  """Opens the entries of files of a directory, one file after the other.

  Args:
    directory: of this machine or of a store.
    names: of the files.
    lengths: entries of each. With them, no file is opened before it is read.
    cache: for a store.
    again: how to make the files again, for messages.

  Raises:
    UserError: a file of a store is missing there or does not fit the cache.
  """
  if not stores.is_address(directory):
    from array_record.python import array_record_data_source

    paths = [f"{os.path.join(directory, name)}[0:{length}]" for name, length in zip(names, lengths, strict=True)]
    return array_record_data_source.ArrayRecordDataSource(paths)
  if cache is None:
    raise UserError(f"{directory} is in a store: copy it to this machine first")
  return _Cached(remotes(directory, names, again), lengths, cache, again)


def sizes(directory: str, names: Sequence[str], again: str) -> list[int]:
  """The bytes of files of a directory.

  Raises:
    UserError: one is missing; `again` is said to do then.
  """
  if stores.is_address(directory):
    return [remote.size for remote in remotes(directory, names, again)]
  for name in names:
    if not os.path.isfile(path := os.path.join(directory, name)):
      raise UserError(f"{path} is missing: {again}")
  return [os.path.getsize(os.path.join(directory, name)) for name in names]


def remotes(directory: str, names: Sequence[str], again: str) -> list[cache_lib.Remote]:
  """The files of a directory of a store, with their hashes where it has a list of them.

  Raises:
    UserError: a file is missing.
  """
  found, known = stores.listed(directory), checksums(directory)
  if missing := next((name for name in names if name not in found), None):
    raise UserError(f"{stores.join(directory, missing)} is missing: {again}")
  hashes = (f"sha256:{known[name]}" if name in known else found[name].version for name in names)
  return [
    cache_lib.Remote(stores.join(directory, name), found[name].size, version) for name, version in zip(names, hashes)
  ]


def checksums(directory: str) -> dict[str, str]:
  """Name -> SHA-256 in hex of the files of a directory; empty for one that was written before there was a list.

  Raises:
    UserError: the list is damaged.
  """
  path = stores.join(directory, CHECKSUMS)
  try:
    lines = stores.read_bytes(path).decode("utf-8").splitlines()
  except FileNotFoundError:
    return {}
  except (Malformed, UnicodeDecodeError) as error:
    raise UserError(f"{path} is damaged ({error}): prepare the source again") from None
  found = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in lines]
  if not all(found):
    raise UserError(f"{path} is damaged: line {found.index(None) + 1} is no hash and name: prepare the source again")
  return {match[2]: match[1] for match in found if match}


def write_checksums(directory: str, known: Mapping[str, str]) -> None:
  """Writes the list of a folder of this machine, as `sha256sum` reads it: name -> SHA-256 in hex."""
  files.write_text(os.path.join(directory, CHECKSUMS), "".join(f"{known[name]}  {name}\n" for name in sorted(known)))


class _Cached:
  """Entries of files of a store."""

  def __init__(self, remotes: Sequence[cache_lib.Remote], lengths: Sequence[int], cache: cache_lib.Cache, again: str):
    self._remotes, self._ends, self._cache, self._again = remotes, list(itertools.accumulate(lengths)), cache, again
    if remotes:
      cache.check(max(remotes, key=lambda remote: remote.size))
    self._begin()

  def _begin(self) -> None:
    self._lock, self._renewing = threading.Lock(), threading.Lock()
    self._open: OrderedDict[int, tuple[Any, float]] = OrderedDict()  # shard -> its reader, last note of its use
    self._checked: set[int] = set()  # shards of which an entry was damaged

  def __getstate__(self) -> dict[str, Any]:
    return {name: value for name, value in vars(self).items() if name not in _OF_A_PROCESS}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state)
    self._begin()

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, index: int) -> bytes:
    """Returns an entry.

    Raises:
      Stopped: the store answers no more, or the disk of the cache is full.
      UserError: the store has the file no more.
    """
    shard = bisect.bisect_right(self._ends, index)
    place = index - (self._ends[shard - 1] if shard else 0)
    reader = self._reader(shard)
    try:
      return reader.read([place])[0]
    except Exception:  # damage: of the copy or of the file itself
      if not self._renewed(shard, reader):
        raise
    return self._reader(shard).read([place])[0]

  def _reader(self, shard: int) -> Any:
    """The reader of a shard, shared by the threads; its last user closes it."""
    remote, now = self._remotes[shard], time.monotonic()
    with self._lock:
      reader, noted = self._open.get(shard, (None, now))
      if reader is not None:
        if now - noted > _TOUCHED:
          self._cache.touch(remote)
          noted = now
        self._open[shard] = reader, noted
        self._open.move_to_end(shard)
        return reader
    try:
      reader = self._cache.open(remote, _open_reader)
    except OSError as error:
      raise Stopped(
        f"{error.filename or remote.address}: {error.strerror or error}; the same command goes on from the last "
        "checkpoint"
      ) from None
    with self._lock:
      for other in [one for one in self._open if not self._cache.has(self._remotes[one])]:
        del self._open[other]  # its copy was removed, and takes room until it is closed
      self._open[shard] = reader, now
      while len(self._open) > _OPEN:
        self._open.popitem(last=False)
    return reader

  def _renewed(self, shard: int, reader: Any) -> bool:
    """Whether the copy that a reader found damaged was not that of the store, and another is fetched in its place.

    Threads that have met the same damage wait for the first of them.
    """
    with self._renewing:
      if shard not in self._checked and self._cache.drop_damaged(self._remotes[shard]):
        with self._lock:
          self._open.pop(shard, None)
      self._checked.add(shard)
      with self._lock:
        return self._open.get(shard, (None,))[0] is not reader


def _open_reader(path: str) -> Any:
  from array_record.python import array_record_module

  return array_record_module.ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=32768)
