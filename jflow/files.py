"""Atomic writes, untrusting reads, and locks between processes.

A new file replaces the old one by a rename, once its bytes are on the disk: neither a kill, a full disk nor a power cut
leaves half of it. A link is replaced and never followed, so nothing elsewhere changes. A file that is read may be cut,
empty, of another type or binary: `Malformed` says in one line what is wrong, without the file's name.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import stat
import uuid
from collections.abc import Iterator
from typing import IO, Any, TextIO

from jflow.strict_json import Malformed, parse

PART = ".part"  # ends the name of a file that is being written


@contextlib.contextmanager
def replacing(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the name of a temporary file to write, which replaces `path` once it is complete and on the disk.

  Raises:
    OSError: it cannot be written; `filename` is `path`. The old file is unchanged, and nothing is left behind.
  """
  path = pathlib.Path(path)
  new = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PART}")
  try:
    yield new
    sync(new)
    os.replace(new, path)
    sync(path.parent)
  except OSError as error:
    if error.filename not in (None, str(new), new):  # of another file, which the caller read
      raise
    raise OSError(error.errno, error.strerror or str(error), str(path)) from error
  finally:
    with contextlib.suppress(OSError):
      new.unlink(missing_ok=True)


@contextlib.contextmanager
def output(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
  """`replacing` for a path that a user named: a link (/dev/stdout), a device or a pipe is written directly.

  Raises:
    OSError: it cannot be written.
  """
  path = pathlib.Path(path)
  if path.is_symlink() or (path.exists() and not path.is_file()):
    yield path
  else:
    with replacing(path) as new:
      yield new


def write_text(path: str | pathlib.Path, text: str) -> None:
  """Writes a text file atomically; a lone surrogate, as in a file's name, becomes its escape.

  Raises:
    OSError: see `replacing`.
  """
  with replacing(path) as new:
    new.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def write_first(path: str | pathlib.Path, text: str) -> bool:
  """Writes a text file atomically unless it exists; of several processes that call it together, one writes.

  Returns:
    Whether this call has written it.

  Raises:
    OSError: see `replacing`.
  """
  path = pathlib.Path(path)
  new = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PART}")
  try:
    new.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    sync(new)
    os.link(new, path)
    return True
  except FileExistsError:
    return False
  except OSError:  # a file system without links, or a full one, where the next call fails too
    if path.exists():
      return False
    write_text(path, text)
    return True
  finally:
    new.unlink(missing_ok=True)


def write_bytes(path: str | pathlib.Path, content: bytes) -> None:
  """Writes a file atomically.

  Raises:
    OSError: see `replacing`.
  """
  with replacing(path) as new:
    new.write_bytes(content)


def write_json(path: str | pathlib.Path, value: Any) -> None:
  """Writes a value as JSON, atomically.

  Raises:
    OSError: see `replacing`.
  """
  write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def publish(folder: str | pathlib.Path, target: str | pathlib.Path) -> None:
  """Renames a finished folder into place, once all that it holds is on the disk.

  Raises:
    OSError: it cannot be written, or `target` exists and is not an empty folder.
  """
  for directory, _, names in os.walk(folder):
    for name in names:
      if not os.path.islink(path := os.path.join(directory, name)):
        sync(path)
    sync(directory)
  os.rename(folder, target)
  sync(os.path.dirname(os.path.abspath(target)))


def sync(path: str | pathlib.Path) -> None:
  """Waits until a file, or the names in a folder, are on the disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  except OSError:
    if not os.path.isdir(path):  # some file systems sync no folders
      raise
  finally:
    os.close(handle)


def sha256(path: str | pathlib.Path) -> str:
  """Hash of a file's content."""
  return digest(path, "sha256")


def digest(path: str | pathlib.Path, kind: str) -> str:
  """Hash of a file's content, of a kind that hashlib knows."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, kind).hexdigest()


def entry(path: str | pathlib.Path) -> dict[str, Any]:
  """The entry of a file in a manifest, size and hash, once its bytes are on the disk."""
  sync(path)
  return {"bytes": os.path.getsize(path), "sha256": sha256(path)}


def remove(path: str | pathlib.Path) -> None:
  """Removes a file, a folder with its contents, or a link but not its target; a missing path is accepted."""
  if os.path.isdir(path) and not os.path.islink(path):
    shutil.rmtree(path)
  else:
    pathlib.Path(path).unlink(missing_ok=True)


def link(source: str, target: str) -> None:
  """Links a file to a second name, or copies it where the file system has no links."""
  try:
    os.link(source, target)
  except OSError:
    shutil.copyfile(source, target)


def set_aside(path: str | pathlib.Path, word: str) -> pathlib.Path:
  """Renames a file or folder to NAME.WORD, or NAME.WORD-2 and so on, and returns the new name."""
  aside = _free(pathlib.Path(path), word)
  os.rename(path, aside)
  return aside


def keep_copy(path: str | pathlib.Path, word: str) -> pathlib.Path:
  """Copies a file to NAME.WORD, or NAME.WORD-2 and so on, and returns the copy's name."""
  aside = _free(pathlib.Path(path), word)
  with replacing(aside) as new:
    shutil.copyfile(path, new)
  return aside


def _free(path: pathlib.Path, word: str) -> pathlib.Path:
  names = (path.with_name(f"{path.name}.{word}{f'-{n}' if n > 1 else ''}") for n in range(1, 1_000_000))
  return next(name for name in names if not os.path.lexists(name))


def are_counts(values: Any) -> bool:
  """Whether a value is a list of whole numbers that are not negative."""
  return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**60 for n in values)


def read_bytes(path: str | pathlib.Path) -> bytes:
  """Returns the content of a regular file; a pipe or a device, which may be endless, is refused.

  Raises:
    FileNotFoundError: there is no such file.
    Malformed: it cannot be read.
  """
  try:
    if not stat.S_ISREG(os.stat(path).st_mode):
      raise Malformed("it is not a file")
    return pathlib.Path(path).read_bytes()
  except FileNotFoundError:
    raise
  except OSError as error:
    raise Malformed(f"it cannot be read: {error.strerror or error}") from error


def read_object(path: str | pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    FileNotFoundError: there is no such file.
    Malformed: it cannot be read or holds no object.
  """
  value = parse(read_bytes(path))
  if not isinstance(value, dict):
    raise Malformed(f"it holds a {type(value).__name__} instead of an object")
  return value


def open_lock(path: str | pathlib.Path) -> TextIO:
  """Opens a file to lock, or creates it; it may hold any text.

  Raises:
    OSError: it cannot be created, or the path is a link, a folder or a pipe.
  """
  handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
  if not stat.S_ISREG(os.fstat(handle).st_mode):
    os.close(handle)
    raise OSError(errno.EINVAL, "Not a file", str(path))
  return open(handle, "r+", encoding="utf-8", errors="replace")


def lock(handle: IO[Any], wait: bool = False) -> bool:
  """Locks an open file until it is closed or the process ends, however it ends.

  Args:
    handle: the file.
    wait: until another process lets go of it.

  Returns:
    Whether this process holds it; False: another one does.

  Raises:
    OSError: the file system has no locks.
  """
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    return True
  except BlockingIOError:
    return False
