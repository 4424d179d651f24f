"""What the commands write beside their pictures and answers."""

import contextlib
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from jflow import files
from jflow.errors import Stopped, UserError


def make_directory(directory: pathlib.Path, flag: str) -> None:
  """Creates a directory, and tries to write there, before the work starts: a wrong place should not cost it.

  Raises:
    UserError: naming the flag and the directory.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"{flag}: directory {directory} cannot be made: {error.strerror}") from error
  try:
    tempfile.TemporaryFile(dir=directory).close()
  except OSError as error:
    raise UserError(f"{flag}: directory {directory} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Around what writes a file or into a directory: a full disk ends the command with one line.

  Raises:
    Stopped: it cannot be written.
  """
  try:
    yield
  except OSError as error:
    raise Stopped(f"{path} cannot be written: {error.strerror or error}") from error


def replace(path: pathlib.Path, text: str) -> None:
  """Writes a file so that a reader sees the old one or the new one, also where several processes write it.

  Raises:
    Stopped: it cannot be written.
  """
  with new_file(path) as new:
    new.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files need not be Unicode


@contextlib.contextmanager
def new_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the name of a file of this process, to write; it takes the place of `path` once it is whole.

  A link, as /dev/stdout is one, a device or a pipe is written straight.

  Raises:
    Stopped: it cannot be written.
  """
  with writing(path), files.output(path) as new:
    yield new


def write_json(path: pathlib.Path, body: dict[str, Any]) -> None:
  """Writes what a command did, for programs to read. What is standard output goes behind what stands there.

  Raises:
    Stopped: it cannot be written.
  """
  text = json.dumps(body, indent=1, ensure_ascii=False) + "\n"
  if not _is_stdout(path):
    replace(path, text)
    return
  with writing(path):  # to open it again would write over the lines so far
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace"))
    sys.stdout.buffer.flush()


def _is_stdout(path: pathlib.Path) -> bool:
  try:
    return os.path.samestat(path.stat(), os.fstat(sys.stdout.fileno()))
  except (OSError, ValueError, AttributeError):  # no such file, no stream, or one that is no file
    return False
