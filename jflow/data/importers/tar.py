"""Reads tar files as a stream, within limits. Nothing is ever written: a member is a name and bytes in memory.

Python's tarfile reads the long names and extended headers of a file whole, whatever size they claim, and follows
links and sparse maps. This reader takes plain files alone and says what is wrong with the others.
"""

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from jflow.data.importers import compressed
from jflow.data.records import RecordError

MAX_MEMBER = 64 * 2**20  # bytes of a file in a tar
_MAX_NAME = 1024
_MAX_HEADER = 64 * 2**10  # bytes of an extended header
_BLOCK = 512
_KINDS = {
  b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
  b"S": "a sparse file",
}  # fmt: skip


class Member(NamedTuple):
  """A file in a tar, or what is wrong with it."""

  name: str
  data: bytes | RecordError
  position: int  # bytes of the tar file read so far


def members(path: str) -> Iterator[Member]:
  """Yields the files of a tar or tar.gz in order. Folders are left out.

  What is no plain file, has a name that leads outside, or is too large comes with a `RecordError` "tar_member".

  Raises:
    RecordError: the tar is empty ("empty_shard"), cut or damaged ("broken_tar", "broken_gzip"), or unfolds too far
      ("bomb"). What came before it is whole.
  """
  with open(path, "rb") as raw:
    stream = _Stream(raw, compressed.is_gzip(path))
    pending: dict[str, str] = {}
    while True:
      header = stream.read(_BLOCK)
      if not header and not stream.offset:
        raise RecordError("empty_shard", "the file is empty")
      if len(header) < _BLOCK:
        raise RecordError("broken_tar", "the tar is cut: it has no end mark")
      if not any(header):
        return
      name, size, kind = _parse(header)
      if kind in (b"L", b"x"):
        if size > _MAX_HEADER:
          stream.skip(size)
          pending = {"path": "?" * _MAX_NAME}
          continue
        text = stream.read_whole(size)
        pending |= {"path": text.rstrip(b"\0").decode("utf-8", "replace")} if kind == b"L" else _pax(text)
        continue
      if kind in (b"K", b"g", b"5"):  # the target of a link, defaults, a folder
        stream.skip(size)
        pending = pending if kind == b"K" else {}
        continue
      name, size = pending.get("path", name), _number(pending.get("size", size))
      problem = _problem(name, kind, size, pending)
      pending = {}
      if problem:
        stream.skip(size)
        yield Member(
          name[:_MAX_NAME], RecordError("tar_member", f"member {name[:80]!r} {problem}"), raw.tell()
        )
      else:
        yield Member(name, stream.read_whole(size), raw.tell())


class _Stream:
  """The bytes of a tar, uncompressed."""

  def __init__(self, raw: BinaryIO, gzipped: bool):
    self._file = compressed.unfold(raw) if gzipped else raw
    self._size = None if gzipped else os.fstat(raw.fileno()).st_size
    self.offset = 0

  def read(self, count: int) -> bytes:
    data = self._file.read(count)
    self.offset += len(data)
    return data

  def read_whole(self, size: int) -> bytes:
    """Returns the contents of a member and passes over what fills its last block."""
    data = self.read(size)
    padding = -size % _BLOCK
    if len(data) < size or len(self.read(padding)) < padding:
      raise RecordError("broken_tar", "the tar is cut in the middle of a member")
    return data

  def skip(self, size: int) -> None:
    size += -size % _BLOCK
    if self._size is not None:
      if self.offset + size > self._size:
        raise RecordError("broken_tar", "the tar is cut in the middle of a member")
      self._file.seek(size, os.SEEK_CUR)
      self.offset += size
      return
    while size:
      step = self.read(min(size, 2**20))
      if not step:
        raise RecordError("broken_tar", "the tar is cut in the middle of a member")
      size -= len(step)


def _parse(header: bytes) -> tuple[str, int, bytes]:
  """Returns the name, the size and the kind that a header block gives."""
  unsigned = sum(header[:148]) + 8 * 32 + sum(header[156:])
  if _octal(header[148:156]) != unsigned:
    raise RecordError("broken_tar", "a header of the tar is damaged, and what follows it is lost")
  name = header[:100].split(b"\0")[0]
  if header[257:263] == b"ustar\0" and header[345] != 0:
    name = header[345:500].split(b"\0")[0] + b"/" + name
  field = header[124:136]
  size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)
  return name.decode("utf-8", "replace"), size, header[156:157]


def _octal(field: bytes) -> int:
  try:
    return int(field.split(b"\0")[0].strip() or b"0", 8)
  except ValueError:
    raise RecordError("broken_tar", "a header of the tar is damaged, and what follows it is lost") from None


def _number(value: int | str) -> int:
  try:
    size = int(value)
  except ValueError:
    size = -1
  if size < 0:
    raise RecordError("broken_tar", "an extended header of the tar is damaged")
  return size


def _pax(text: bytes) -> dict[str, str]:
  """Returns the fields of an extended header, lines of LENGTH KEY=VALUE."""
  fields = {}
  while text:
    length, _, rest = text.partition(b" ")
    if not length.isdigit() or not len(length) + 2 < int(length) <= len(text):
      raise RecordError("broken_tar", "an extended header of the tar is damaged")
    key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
    fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
    text = text[int(length) :]
  return fields


def _problem(name: str, kind: bytes, size: int, extended: dict[str, str]) -> str:
  """Returns why a member is refused; empty where it is a plain file with a name below the folder."""
  if kind not in (b"0", b"\0", b"7"):
    return f"is {_KINDS.get(kind, 'of an unknown kind')}"
  if any(key.startswith("GNU.sparse") for key in extended):
    return "is a sparse file"
  if len(name) >= _MAX_NAME:
    return f"has a name of {_MAX_NAME:,} or more characters"
  if not name or name.startswith(("/", "\\")) or name[1:2] == ":":
    return "has an absolute name"
  if ".." in name.replace("\\", "/").split("/"):
    return 'has a name with ".."'
  if size > MAX_MEMBER:
    return f"has {size:,} bytes, more than {MAX_MEMBER:,}"
  return ""
