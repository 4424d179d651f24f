"""A streaming reader of tar files within limits. It never extracts to disk: a member is a name and bytes in memory.

Python's tarfile reads long names and extended headers of any claimed size into memory, and follows links and sparse
maps. This reader accepts only plain files and reports what is wrong with the others.
"""

import os
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from jflow import stores
from jflow.data.importers import compressed
from jflow.data.records import RecordError

MAX_MEMBER = 64 * 2**20  # bytes of a file in a tar
_MAX_NAME = 1024
_MAX_HEADER = 64 * 2**10  # bytes of an extended header
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_PAX_FIELD = re.compile(rb"([0-9]{1,9}) ([^=]*+)=")
_KINDS = {
  b"1": "a hard link",
  b"2": "a symbolic link",
  b"3": "a device",
  b"4": "a device",
  b"6": "a pipe",
  b"S": "a sparse file",
}
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"6")  # of any claimed size


class Member(NamedTuple):
  """A file in a tar, or the error in its place. An empty name stands for damage to the tar itself."""

  name: str
  data: bytes | RecordError
  position: int  # bytes of the tar file read so far


def members(path: str) -> Iterator[Member]:
  """Yields the files of a tar or tar.gz in order. Folders are left out.

  A member that is not a plain file, has a name outside the folder, or is too large has a `RecordError` "tar_member".
  Damage is reported under an empty name: an empty file ("empty_shard"), too large once uncompressed ("bomb"), cut or
  damaged ("broken_tar", "broken_gzip"). After a damaged header, reading continues at the next sound one. After an end
  mark another tar may follow, as `cat` joins them; anything else there is damage.
  """
  with stores.open_file(path) as raw:
    stream = _Stream(raw, compressed.is_gzip(path))
    while True:
      try:
        member = _next(stream, raw)
      except RecordError as error:
        yield Member("", error, raw.tell())
        if error.reason == "broken_tar" and stream.find_header():
          continue
        return
      if member is None:
        return
      yield member


def _next(stream: "_Stream", raw: BinaryIO) -> Member | None:
  """Returns the next file, or None at the end mark."""
  extended: dict[str, str] = {}
  while True:
    begun = stream.offset
    header = stream.header()
    if not header and not begun:
      raise RecordError("empty_shard", "the file is empty")
    if len(header) < _BLOCK:
      raise RecordError("broken_tar", "the tar is cut: it has no end mark")
    if header == _ZEROS:
      if stream.pass_zeros():
        continue
      return None
    name, size, kind = _parse(header)
    if kind in (b"L", b"x"):
      if size > _MAX_HEADER:
        stream.skip(size)
        extended = {"path": "?" * _MAX_NAME}
        continue
      text = stream.read_whole(size)
      extended |= {"path": _text(text.split(b"\0")[0])} if kind == b"L" else _pax(text)
      continue
    if kind in (b"K", b"g", b"V"):  # the target of a link, defaults, the tar's own name
      stream.skip(size)
      extended = extended if kind == b"K" else {}
      continue
    name, size = extended.get("path", name), _number(extended.get("size", size))
    if kind == b"5" or (kind == b"\0" and name.endswith("/")):  # a folder
      extended = {}
      continue
    problem = _problem(name, kind, size, extended)
    if problem:
      if kind not in _WITHOUT_DATA:
        stream.skip(size)
      error = RecordError("tar_member", f"member {name[:80]!r} {problem}")
      return Member(name[:_MAX_NAME] or "?", error, raw.tell())
    return Member(name, stream.read_whole(size), raw.tell())


class _Stream:
  """The bytes of a tar, uncompressed."""

  def __init__(self, raw: BinaryIO, gzipped: bool):
    self._file = compressed.unfold(raw) if gzipped else raw
    self._size = None if gzipped else stores.size_of(raw)
    self._found = b""
    self.offset = 0

  def read(self, count: int) -> bytes:
    data = self._file.read(count)
    self.offset += len(data)
    return data

  def header(self) -> bytes:
    """Returns the next block: the one that `find_header` found, or one that is read."""
    found, self._found = self._found, b""
    return found or self.read(_BLOCK)

  def pass_zeros(self) -> bool:
    """Skips blocks of zeros; returns whether a header follows.

    Raises:
      RecordError: something else follows.
    """
    while (block := self.read(_BLOCK)) == _ZEROS:
      pass
    if not any(block):
      return False
    if len(block) < _BLOCK or not _is_header(block):
      raise RecordError("broken_tar", "what follows the end mark of the tar is not a tar")
    self._found = block
    return True

  def find_header(self) -> bool:
    """Skips blocks up to a header with a valid checksum; returns whether there is one."""
    try:
      while len(block := self.read(_BLOCK)) == _BLOCK:
        if block[257:262] == b"ustar" and _is_header(block):
          self._found = block
          return True
    except RecordError:  # of the gzip stream
      pass
    return False

  def read_whole(self, size: int) -> bytes:
    """Returns the contents of a member and skips the padding of its last block."""
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
  field = header[124:136]
  size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal_or_none(field)
  if not _is_header(header) or size is None:
    raise RecordError("broken_tar", "a header of the tar is damaged")
  name = header[:100].split(b"\0")[0]
  if header[257:263] == b"ustar\0" and header[345] != 0:
    name = header[345:500].split(b"\0")[0] + b"/" + name
  return _text(name), size, header[156:157]


def _is_header(block: bytes) -> bool:
  """Returns whether the checksum of a block is valid; its own field counts as spaces."""
  return sum(block[:148]) + 8 * 32 + sum(block[156:]) == _octal_or_none(block[148:156])


def _text(name: bytes) -> str:
  """Decodes a name; in one that is not UTF-8 each byte becomes a character, so that different names stay different."""
  try:
    return name.decode("utf-8")
  except UnicodeDecodeError:
    return name.decode("latin-1")


def _octal_or_none(field: bytes) -> int | None:
  text = field.split(b"\0")[0].strip()
  return int(text or b"0", 8) if not text.strip(b"01234567") else None


def _number(value: int | str) -> int:
  if isinstance(value, str) and not re.fullmatch("[0-9]{1,20}", value):
    raise RecordError("broken_tar", "an extended header of the tar is damaged")
  return int(value)


def _pax(text: bytes) -> dict[str, str]:
  """Returns the fields of an extended header, lines of LENGTH KEY=VALUE."""
  fields, start = {}, 0
  while start < len(text):
    match = _PAX_FIELD.match(text, start)
    end = start + int(match[1]) if match else 0
    if not match or not match.end() < end <= len(text):
      raise RecordError("broken_tar", "an extended header of the tar is damaged")
    fields[_text(match[2])] = _text(text[match.end() : end - 1])
    start = end
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
