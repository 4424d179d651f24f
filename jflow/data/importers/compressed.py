"""A gzip reader with a limit on the uncompressed size, and a check that names other kinds of compression."""

import gzip
import io
import re
import zlib
from collections.abc import Sequence
from typing import BinaryIO

from jflow import stores
from jflow.data.records import RecordError
from jflow.errors import UserError

MAX_RATIO = 100  # images and text do not compress so well
_GZIP = b"\x1f\x8b\x08"
_OTHERS = (  # first bytes of files, their format, and the program that unpacks them
  (rb"BZh[1-9]1AY&SY", "compressed by bzip2", "bunzip2"),
  (rb"\xfd7zXZ\0", "compressed by xz", "unxz"),
  (rb"\x28\xb5\x2f\xfd", "compressed by zstd", "unzstd"),
  (rb"\x04\x22\x4d\x18", "compressed by lz4", "unlz4"),
  (rb"\x1f[\x9d\xa0]", "compressed by compress", "uncompress"),
  (rb"LZIP\x01", "compressed by lzip", "lzip -d"),
  (rb"PK\x03\x04", "a zip archive", "unzip"),
  (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x"),
  (rb"Rar!\x1a\x07", "a rar archive", "unrar x"),
)
_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".z")
_ENDINGS_OF_TARS = (".tbz2", ".tbz", ".txz", ".tzst")


def with_compressed(endings: tuple[str, ...]) -> tuple[str, ...]:
  """Returns endings of file names, and those of the same files compressed."""
  tars = _ENDINGS_OF_TARS if ".tgz" in endings else ()
  return (*endings, *(each + more for each in endings for more in _ENDINGS), *tars)


def check(paths: Sequence[str], gzip_is_read: bool) -> None:
  """Checks by its first bytes that no file is compressed in an unsupported format.

  Raises:
    UserError: a file is; the message says how to unpack it.
  """
  others = _OTHERS if gzip_is_read else (*_OTHERS, (re.escape(_GZIP), "compressed by gzip", "gunzip"))
  for path, start in zip(paths, stores.each(lambda path: stores.head(path, 16), paths)):
    for pattern, what, tool in others:
      if re.match(pattern, start):
        raise UserError(f"{path} is {what}, which this format is not read from: `{tool}` it first")


def is_gzip(path: str) -> bool:
  return stores.head(path, len(_GZIP)) == _GZIP


def unfold(raw: BinaryIO) -> io.BufferedReader:
  """Returns the uncompressed contents of an open gzip file, as a file.

  Its reads raise `RecordError`: "broken_gzip" where the file is cut or damaged, "bomb" where its contents are larger
  than `MAX_RATIO` times its size (and a MiB).
  """
  return io.BufferedReader(_Unfolded(raw), 2**18)


class _Unfolded(io.RawIOBase):
  def __init__(self, raw: BinaryIO):
    self._file = gzip.GzipFile(fileobj=raw)
    self._left = stores.size_of(raw) * MAX_RATIO + 2**20

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: memoryview) -> int:
    try:
      data = self._file.read1(len(buffer))  # the contents end where the damage begins
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
      raise RecordError("broken_gzip", f"the file is cut or damaged ({type(error).__name__})") from None
    buffer[: len(data)] = data
    self._left -= len(data)
    if self._left < 0:
      raise RecordError("bomb", f"the file unfolds to more than {MAX_RATIO} times its size")
    return len(data)
