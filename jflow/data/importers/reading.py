"""Readers of an input's files: images below a folder, lines, and the encoding of a text."""

import codecs
import errno
import os
import posixpath
import stat
from collections.abc import Iterator
from typing import BinaryIO

from jflow import git_lfs, stores
from jflow.data.records import RecordError
from jflow.errors import UserError

MAX_IMAGE_FILE = 256 * 2**20  # bytes; no image within `images.MAX_PIXELS` needs more
MAX_LINE = 64 * 2**20  # bytes of a line, or of a document
# Errors of the machine, not of the data: the import ends, and running the same command continues it.
_TRANSIENT = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def read_under(root: str, name: str, limit: int = MAX_IMAGE_FILE) -> bytes:
  """Returns the contents of an image file below a folder.

  Args:
    root: the folder.
    name: relative to it, or absolute.
    limit: bytes that the file may have.

  Raises:
    RecordError: it is outside the folder ("outside_root"), missing ("missing_image"), a folder, a pipe or a device
      ("not_a_file"), too large ("too_large"), or a git-lfs pointer ("git_lfs_pointer").
  """
  if stores.is_address(root):
    return _read_in_store(root, name, limit)
  root = os.path.normpath(os.path.abspath(root))
  path = os.path.normpath(os.path.join(root, name))
  if os.path.commonpath([path, root]) != os.path.commonpath([root]):  # which writes "//folder" as "/folder"
    raise RecordError("outside_root", f"image {name:.200} lies outside {root} (llava-jsonl, parquet: set --image_root)")
  try:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
      raise RecordError("not_a_file", f"image {name:.200} is a folder, a pipe or a device")
    if status.st_size > limit:
      raise RecordError("too_large", f"the images of the record have more than {MAX_IMAGE_FILE:,} bytes")
    with open(path, "rb") as file:
      data = file.read()
  except (OSError, ValueError) as error:
    if getattr(error, "errno", None) in _TRANSIENT:
      raise
    hint = "(llava-jsonl, parquet: see --image_root)"  # imagefolder refuses the flag
    raise RecordError("missing_image", f"image {name:.200} not found in {root} {hint}") from None
  if git_lfs.is_pointer(data):
    raise RecordError("git_lfs_pointer", f"image {name:.200} is a git-lfs pointer: run `git lfs pull` in {root}")
  return data


def _read_in_store(root: str, name: str, limit: int) -> bytes:
  """`read_under` for a folder of a store."""
  below = posixpath.normpath(name)
  if stores.is_address(name) or below.startswith(("/", "../")) or below == "..":
    raise RecordError("outside_root", f"image {name:.200} lies outside {root} (llava-jsonl, parquet: set --image_root)")
  path = stores.join(root, below)
  found = stores.find(path)
  if found is None:
    raise RecordError(
      "missing_image", f"image {name:.200} not found in {root} (llava-jsonl, parquet: see --image_root)"
    )
  if found.size > limit:
    raise RecordError("too_large", f"the images of the record have more than {MAX_IMAGE_FILE:,} bytes")
  return stores.read_bytes(path)


def folder_of(path: str) -> str:
  """The folder that a file lies in."""
  return path.rpartition("/")[0] if stores.is_address(path) else os.path.dirname(os.path.abspath(path))


def lines(file: BinaryIO, limit: int = MAX_LINE) -> Iterator[tuple[bytes, int]]:
  """Yields each line, cut to at most `limit` + 1 bytes, and its full length.

  Only a line feed ends a line.
  """
  while line := file.readline(limit + 1):
    length, last = len(line), line
    while not last.endswith(b"\n") and (last := file.readline(2**20)):
      length += len(last)
    yield line, length


def is_blank(line: bytes) -> bool:
  """Whether a line is blank: white space, or the byte order mark with which some editors begin a file."""
  return not line.strip(b" \t\r\n\v\f\xef\xbb\xbf")


def is_utf16(data: bytes) -> bool:
  """Whether a text begins as UTF-16 or UTF-32 does: with its byte order mark, or every other byte 0."""
  head = data[: 2 * (min(len(data), 16) // 2)]
  return data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)) or (
    any(head) and len(head) >= 8 and not (any(head[::2]) and any(head[1::2]))
  )


def check_encoding(path: str) -> None:
  """Checks that a file of many records may be UTF-8.

  Raises:
    UserError: it is UTF-16 or UTF-32.
  """
  if is_utf16(stores.head(path, 16)):
    raise UserError(f"{path} is UTF-16 or UTF-32 text: convert it to UTF-8, as in iconv -f UTF-16 -t UTF-8")
