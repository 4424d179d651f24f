"""Reads gzip files with a limit to how far they unfold."""

import gzip
import io
import os
import zlib
from typing import BinaryIO

from jflow.data.records import RecordError

MAX_RATIO = 100  # images and text do not shrink so far


def is_gzip(path: str) -> bool:
  with open(path, "rb") as file:
    return file.read(2) == b"\x1f\x8b"


def unfold(raw: BinaryIO) -> io.BufferedReader:
  """Returns the uncompressed contents of an open gzip file, as a file.

  Its reads raise `RecordError`: "broken_gzip" where the file is cut or damaged, "bomb" where it unfolds to more than
  `MAX_RATIO` times its size (and a MiB).
  """
  return io.BufferedReader(_Unfolded(raw), 2**18)


class _Unfolded(io.RawIOBase):
  def __init__(self, raw: BinaryIO):
    self._file = gzip.GzipFile(fileobj=raw)
    self._left = os.fstat(raw.fileno()).st_size * MAX_RATIO + 2**20

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: memoryview) -> int:
    try:
      count = self._file.readinto(buffer)
    except (OSError, EOFError, zlib.error) as error:
      raise RecordError("broken_gzip", f"the file is cut or damaged ({type(error).__name__})") from None
    self._left -= count
    if self._left < 0:
      raise RecordError("bomb", f"the file unfolds to more than {MAX_RATIO} times its size")
    return count
