"""What the commands write beside their pictures and answers."""

import json
import pathlib
from typing import Any

from jflow.errors import UserError


def make_directory(directory: pathlib.Path, flag: str) -> None:
  """Creates a directory before the work starts: a place that cannot be written should not cost it.

  Raises:
    UserError: naming the flag and the directory.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"{flag}: directory {directory} cannot be made: {error.strerror}") from error


def replace(path: pathlib.Path, text: str) -> None:
  """Writes a file so that a reader sees the old one or the new one."""
  new = path.with_name(path.name + ".part")
  new.write_text(text, encoding="utf-8")
  new.replace(path)


def write_json(path: pathlib.Path, body: dict[str, Any]) -> None:
  """Writes what a command did, for programs to read."""
  path.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
