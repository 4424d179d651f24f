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


def write_json(path: pathlib.Path, body: dict[str, Any]) -> None:
  """Writes what a command did, for programs to read."""
  path.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
