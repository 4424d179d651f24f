"""git-lfs pointers: the few lines that a checkout has in place of a large file that was not fetched."""

import os

from jflow.errors import UserError

_FIRST = b"version https://git-lfs.github.com/spec/"
_MAX_BYTES = 1024  # first bytes of a pointer


def is_pointer(data: bytes) -> bool:
  """Whether the contents of a file are a pointer."""
  return len(data) < _MAX_BYTES and data.startswith(_FIRST) and b"\noid sha256:" in data


def is_pointer_file(path: str) -> bool:
  """Whether a file is a pointer; only small ones are opened."""
  if os.path.getsize(path) >= _MAX_BYTES:
    return False
  with open(path, "rb") as file:
    return is_pointer(file.read(_MAX_BYTES))


def check(paths: list[str]) -> None:
  """Checks that none of the files is a pointer.

  Raises:
    UserError: one is a pointer; the message says how many are.
  """
  pointers = [path for path in paths if is_pointer_file(path)]
  if pointers:
    others = f", as are {len(pointers) - 1:,} more of {len(paths):,}" if len(pointers) > 1 else ""
    raise UserError(f"{pointers[0]} is a git-lfs pointer{others}, not the data: run `git lfs pull` in its folder")
