"""Output directories and files of the commands, with one-line errors."""

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
  """Creates a directory and tries to write in it, so that a wrong place is refused before the work starts.

  Raises:
    UserError: it cannot be made or written; the message names the flag and the directory.
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
  """Context manager around writes to `path`: an OSError, such as a full disk, ends the command with one line.

  Raises:
    Stopped: it cannot be written.
  """
  try:
    yield
  except OSError as error:
    raise Stopped(f"{path} cannot be written: {error.strerror or error}") from error


def replace(path: pathlib.Path, text: str) -> None:
  """Writes a file atomically: a reader sees the old one or the new one, even if several processes write it.

  Raises:
    Stopped: it cannot be written.
  """
  with new_file(path) as new:
    new.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files need not be Unicode


@contextlib.contextmanager
def new_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the name of a temporary file to write, which replaces `path` once it is complete.

  A link (/dev/stdout is one), a device or a pipe is written directly.

  Raises:
    Stopped: it cannot be written.
  """
  with writing(path), files.output(path) as new:
    yield new


def write_json(path: pathlib.Path, body: dict[str, Any]) -> None:
  """Writes a command's results as JSON. Standard output is appended to, even where `path` names its file.

  Raises:
    Stopped: it cannot be written.
  """
  text = json.dumps(body, indent=1, ensure_ascii=False) + "\n"
  if not _is_stdout(path):
    replace(path, text)
    return
  with writing(path):  # opening it again would overwrite the lines so far
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace"))
    sys.stdout.buffer.flush()


def _is_stdout(path: pathlib.Path) -> bool:
  try:
    return os.path.samestat(path.stat(), os.fstat(sys.stdout.fileno()))
  except (OSError, ValueError, AttributeError):  # no such file, or a stream without one
    return False
