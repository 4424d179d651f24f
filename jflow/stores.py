"""Files in object stores, by their address: gs://, s3://, https://, hf:// and whatever else fsspec opens.

Each request is tried again, after a wait that doubles, where it may succeed: no connection, no answer, an answer that
is cut, 408, 425, 429 and all of 5xx. What is missing or forbidden is refused at once. A store that has never answered
is given up after seconds, as a wrong name is likely; one that has, after minutes, each try told. Nothing is taken for
whole before its size is right, and its hash where one is known.
"""

import base64
import collections
import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import io
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple, TypeVar

from jflow import files
from jflow.errors import UserError, install_line, one_line
from jflow.progress import say

BLOCK = 8 * 2**20  # bytes of a request
WAITS: Sequence[float] = (0.5, 1, 2, 4, 8, 16, 30, 60, 60, 60)  # seconds before a further try, four minutes in all
FIRST = 5  # of these, for a store that has not answered yet
_QUIET = 2  # tries that fail before one is told
_AT_ONCE = 32  # requests, where many files are asked for
_SILENCE = 60  # seconds without a byte after which a request has failed, where the store's library has no limit
_KEPT = 4  # blocks of an open file in memory: a table's columns are read in turn
_AGAIN = (408, 425, 429)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3", "http": "http", "https": "http"}
# What a store says of a file's content: another value, another content.
_VERSIONS = (
  "etag",
  "generation",
  "md5hash",
  "content-md5",
  "crc32c",
  "versionid",
  "blob_id",
  "lastmodified",
  "last-modified",
  "mtime",
  "created",
)
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, TypeError)
_answered: set[str] = set()  # stores that have, as "gs://bucket"
_T = TypeVar("_T")


class Stat(NamedTuple):
  """Size and version of a file, known without reading it."""

  size: int
  version: str  # another one after a change
  md5: str = ""  # in hex; "": the store does not say
  ranges: bool = True  # False: its server says that it gives whole files alone


def is_address(path: object) -> bool:
  """Whether a path is an address, PROTOCOL://..., and no file of this machine."""
  return _ADDRESS.match(str(path)) is not None


def join(folder: str, *names: str) -> str:
  """The path of a file below a folder, which may be an address."""
  return "/".join((folder.rstrip("/"), *names)) if is_address(folder) else os.path.join(folder, *names)


def absolute(path: str) -> str:
  """A path that is the same from any working directory; an address stays."""
  return path.rstrip("/") if is_address(path) else os.path.abspath(path)


def stat(path: str) -> Stat:
  """Size and version of a file.

  Raises:
    UserError: it does not exist, or the store is not open to us.
    OSError: the store answers no more.
  """
  if not is_address(path):
    found = os.stat(path)
    return Stat(found.st_size, str(found.st_mtime_ns))
  return stat_of(call(path, lambda store, name: fresh(store).info(name)))


def exists(path: str) -> bool:
  """Whether there is such a file or folder."""
  if not is_address(path):
    return os.path.exists(path)
  with contextlib.suppress(FileNotFoundError):
    return bool(call(path, lambda store, name: fresh(store).info(name), missing=True))
  return False


def find(path: str) -> Stat | None:
  """Size and version of a file; None where there is none of this name, as where a web server gives a page in its place:
  it does so for a folder.

  Raises:
    UserError: the store is not open to us.
    OSError: the store answers no more.
  """
  try:
    if is_address(path):
      info = call(path, lambda store, name: fresh(store).info(name), missing=True)
      page = info.get("mimetype") == "text/html" and not path.lower().endswith((".html", ".htm"))
      return None if page or info.get("type") == "directory" else stat_of(info)
    return stat(path) if os.path.isfile(path) else None
  except FileNotFoundError:
    return None


def each(function: Callable[[str], _T], paths: Sequence[str]) -> list[_T]:
  """Returns function(path) of each path; of a store's, many at a time."""
  if not any(map(is_address, paths)):
    return list(map(function, paths))
  with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
    return list(pool.map(function, paths))


def head(path: str, count: int) -> bytes:
  """The first bytes of a file, fewer of a smaller one."""
  if not is_address(path):
    with open(path, "rb") as file:
      return file.read(count)
  known = stat(path)
  _need_ranges(path, known, count)
  size = min(count, known.size)
  return _range(path, 0, size) if size else b""


def read_bytes(path: str, sha256: str | None = None) -> bytes:
  """The content of a small file.

  Raises:
    FileNotFoundError: there is none.
    UserError: the store is not open to us.
    Malformed: it is no regular file.
    OSError: the store answers no more, or the content has not the hash that is named.
  """
  if not is_address(path):
    return files.read_bytes(path)

  def read(store: Any, name: str) -> bytes:
    size, data = fresh(store).info(name)["size"], store.cat_file(name)
    if size not in (None, len(data)):
      raise OSError(f"{len(data):,} bytes came of {size:,}")
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
      raise OSError("the bytes have another hash than they should")
    return data

  return call(path, read, missing=True)


def open_file(path: str, known: Stat | None = None) -> BinaryIO:
  """Opens a file to read; one of a store is read by ranges, never as a whole. Its end is known: `size_of`.

  Args:
    path: of the file.
    known: what `stat` says of it; None: the store is asked.

  Raises:
    UserError: it does not exist, or the store is not open to us.
    OSError: it cannot be read.
  """
  if not is_address(path):
    return open(path, "rb")
  known = known or stat(path)
  _need_ranges(path, known, BLOCK)
  return io.BufferedReader(_Ranges(path, known), 2**16)


def size_of(file: BinaryIO) -> int:
  """The bytes of an open file; its position stays."""
  at = file.tell()
  size = file.seek(0, os.SEEK_END)
  file.seek(at)
  return size


def listed(folder: str) -> dict[str, Stat]:
  """The files below a folder of a store, those in folders inside it too, by their path from it; empty: there is
  none."""
  found, waiting = {}, [""]
  while waiting:
    below = waiting.pop()
    for name, kind, known in _entries(join(folder, below) if below else folder):
      if kind == "directory":
        waiting.append(below + name + "/")
      else:
        found[below + name] = known or stat(join(folder, below + name))
  return dict(sorted(found.items()))


def folders(folder: str) -> list[str]:
  """The names of the folders in a folder, in order; none where it is missing."""
  if is_address(folder):
    return sorted(name for name, kind, _ in _entries(folder) if kind == "directory")
  with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
    return sorted(entry.name for entry in entries if entry.is_dir())
  return []


def _entries(folder: str) -> list[tuple[str, str, Stat | None]]:
  """Name, type and what is known of each entry; fsspec's own walk would leave out folders that fail to answer."""

  def read(store: Any, name: str) -> list[tuple[str, str, Stat | None]]:
    root, out = name.rstrip("/") + "/", []
    for info in fresh(store).ls(root, detail=True):
      path = info["name"].rstrip("/")
      if path.startswith(root) and "/" not in path[len(root) :]:
        sized = info.get("type") != "directory" and isinstance(info.get("size"), int)
        out.append((path[len(root) :], info.get("type", "file"), stat_of(info) if sized else None))
    return out

  with contextlib.suppress(FileNotFoundError):
    return call(folder, read, missing=True)
  return []


def download(address: str, known: Stat, target: BinaryIO) -> str:
  """Copies a file of a store into an open one, which begins empty; returns the SHA-256 of what came.

  Raises:
    UserError: it is gone, or its server gives no ranges.
    OSError: the store answers no more, or `target` cannot be written, and then its `filename` is another.
  """
  _need_ranges(address, known, BLOCK)
  digest = hashlib.sha256()
  for start in range(0, known.size, BLOCK):
    data = _range(address, start, min(start + BLOCK, known.size))
    digest.update(data)
    target.write(data)
  return digest.hexdigest()


def remove(address: str) -> None:
  """Removes a file or folder of a store with all below it; a missing one is accepted."""
  with contextlib.suppress(FileNotFoundError):
    call(address, lambda store, name: fresh(store).rm(name, recursive=True), missing=True)


class _Ranges(io.RawIOBase):
  """A file of a store, read by blocks, of which the last few are kept."""

  def __init__(self, address: str, known: Stat):
    self._address, self._known, self._at = address, known, 0
    self._blocks: collections.OrderedDict[int, bytes] = collections.OrderedDict()

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._at

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._known.size}[whence]
    return self._at

  def readinto(self, buffer: Any) -> int:
    number, begin = divmod(self._at, BLOCK)
    if self._at >= self._known.size:
      return 0
    data = self._block(number)[begin : begin + len(buffer)]
    buffer[: len(data)] = data
    self._at += len(data)
    return len(data)

  def _block(self, number: int) -> bytes:
    if number not in self._blocks:
      stop = min((number + 1) * BLOCK, self._known.size)
      self._blocks[number] = _range(self._address, number * BLOCK, stop)
      if stop == self._known.size and stat(self._address) != self._known:
        raise OSError(errno.EIO, "it was changed while it was read", self._address)
      if len(self._blocks) > _KEPT:
        self._blocks.popitem(last=False)
    self._blocks.move_to_end(number)
    return self._blocks[number]


def _need_ranges(address: str, known: Stat, count: int) -> None:
  """Checks that so many bytes of a file can be had alone: before its server sends all of it into memory."""
  if not known.ranges and known.size > count:
    raise UserError(f"{address} cannot be read: its server gives whole files alone, not ranges of bytes")


def _range(address: str, start: int, stop: int) -> bytes:
  def read(store: Any, name: str) -> bytes:
    data = store.cat_file(name, start=start, end=stop)
    if len(data) > stop - start:  # no further try mends it
      raise NotImplementedError("its server gives whole files alone, not ranges of bytes")
    if len(data) != stop - start:
      raise OSError(f"{len(data):,} bytes came of {stop - start:,}")
    return data

  return call(address, read)


def call(address: str, request: Callable[[Any, str], _T], missing: bool = False) -> _T:
  """Returns request(store, name in it), tried as often as `WAITS` says.

  Args:
    address: of the file.
    request: what is asked for.
    missing: whether a file that is not there is a FileNotFoundError, not a UserError.
  """
  store, name = _open(address)
  host = re.match(r"[^/]*//[^/]*", address)
  place, failed = host[0] if host else address, 0
  while True:
    try:
      found = request(store, name)
      _answered.add(place)
      if failed > _QUIET:
        say(f"{place} answers again")
      return found
    except Exception as error:  # stores raise many types
      told = f"{type(error).__name__}: {one_line(error)}".rstrip(": ")
      if isinstance(error, FileNotFoundError):
        if missing:
          raise FileNotFoundError(errno.ENOENT, "no such file", address) from None
        raise UserError(f"{address} does not exist") from None
      if _is_permanent(error):
        raise UserError(f"{address} is not open to us or cannot be asked for that ({told})") from error
      waits = WAITS if place in _answered else WAITS[:FIRST]
      if failed == len(waits):
        message = f"no good answer in {failed + 1} tries over {sum(waits):.0f} s ({told})"
        if place in _answered:
          raise OSError(errno.EIO, message, address) from error
        raise UserError(f"{address}: {message}: is the name right, and is there a network?") from error
      wait = waits[failed] * random.uniform(0.75, 1.25)  # so that many hosts do not ask at once
      failed += 1
      if failed > _QUIET:
        say(f"{address}: {told}; try {failed + 1} of {len(waits) + 1} in {wait:.0f} s")
      time.sleep(wait)


def _is_permanent(error: Exception) -> bool:
  status = getattr(error, "status", getattr(error, "code", None))
  if isinstance(status, int) and 400 <= status < 500:
    return status not in _AGAIN
  return isinstance(error, _PERMANENT) or "Credential" in type(error).__name__


def _open(address: str) -> tuple[Any, str]:
  """The store of an address and the name in it.

  Raises:
    UserError: fsspec does not know the protocol, or its library is missing.
  """
  protocol = address.split("://")[0]
  try:
    store = _store(protocol, re.match(r"[^/]*//[^/]*", address)[0])  # type: ignore[index]
    return store, store._strip_protocol(address)
  except (ImportError, ValueError) as error:
    advice = f": {install_line(_EXTRAS[protocol])}" if protocol in _EXTRAS else ""
    raise UserError(f"{address} cannot be opened ({one_line(error)}){advice}") from error


@functools.lru_cache(maxsize=64)
def _store(protocol: str, root: str) -> Any:
  import fsspec

  options: dict[str, Any] = {}
  if protocol in ("http", "https"):
    import aiohttp

    options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(None, sock_connect=_SILENCE, sock_read=_SILENCE)}
  return fsspec.core.url_to_fs(root + "/", **options)[0]


def fresh(store: Any) -> Any:
  """A store without what it remembers of its folders."""
  store.invalidate_cache()
  return store


def stat_of(info: dict[str, Any]) -> Stat:
  if info.get("type") == "directory":
    raise IsADirectoryError(errno.EISDIR, "it is a folder")
  if not isinstance(info.get("size"), int):
    raise TypeError("the store does not say how large it is")
  lower = {key.lower(): value for key, value in info.items()}
  version = ";".join(f"{key}={lower[key]}" for key in _VERSIONS if lower.get(key) is not None)
  md5, etag = lower.get("md5hash") or lower.get("content-md5"), str(lower.get("etag") or "").strip('"')
  if isinstance(md5, str):
    with contextlib.suppress(ValueError):
      etag = base64.b64decode(md5).hex()
  md5 = etag if re.fullmatch("[0-9a-f]{32}", etag) else ""
  return Stat(info["size"], version, md5, info.get("partial") is not False)
