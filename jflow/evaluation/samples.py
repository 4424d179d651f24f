"""The predictions of an evaluation on disk: one line per sample, appended when complete, read again after a stop."""

import errno
import json
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from PIL import Image

from jflow.errors import UserError, one_line
from jflow.files import lock, write_first
from jflow.outputs import make_directory, writing


class Samples:
  """records.jsonl and settings.json of one output directory.

  Several processes may share a directory, each with its part of the samples and its own records file; all read what
  the others have written.
  """

  def __init__(
    self, directory: pathlib.Path, settings: Mapping[str, Any], part: tuple[int, int] = (0, 1), flag: str = "--output"
  ):
    """Opens or creates the directory.

    Args:
      directory: of the evaluation.
      settings: all that the predictions depend on, as JSON values. A directory holds the predictions of one setting.
      part: (number, parts): this process predicts every `parts`-th sample.
      flag: that named the directory, for messages.

    Raises:
      UserError: the directory holds another evaluation's predictions, is not writable, or another process writes
        this part.
      Stopped: the disk is full.
    """
    self._directory, (self._number, self._parts), self._flag = directory, part, flag
    name = "records.jsonl" if self._parts == 1 else f"records-{self._number}-of-{self._parts}.jsonl"
    self._path = directory / name
    make_directory(directory, flag)
    with writing(directory):
      self._compare(json.loads(json.dumps(settings)))
      self._file = open(self._path, "a+b", buffering=0)
    try:
      alone = lock(self._file)
    except OSError:  # a file system without locks
      alone = True
    if not alone:
      raise UserError(f"{flag}={directory}: another process writes {name} now; wait for it or stop it")
    self._cut_torn_line()

  def _compare(self, settings: dict[str, Any]) -> None:
    path = self._directory / "settings.json"
    if not path.exists() and any(one.stat().st_size for one in self._directory.glob("records*.jsonl")):
      raise UserError(
        f"{self._flag}={self._directory} holds predictions without settings.json, so nobody knows of what: "
        f"name another {self._flag}, or delete it to start over"
      )
    if write_first(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n"):
      return  # the first of several processes that start together
    before = settings_in(self._directory, self._flag) or {}
    for name in sorted(before.keys() | settings.keys()):
      if before.get(name) != settings.get(name):
        old = f"{name}={_short(before[name])}" if before.get(name) is not None else f"an unknown or no {name}"
        held = f"made with {old}, not {_short(settings.get(name))}"
        if name == "fingerprint":  # a hash says nothing to a reader
          held = "of another checkpoint, other weights or another VAE"
        raise UserError(
          f"{self._flag}={self._directory} holds predictions {held}: name another {self._flag}, or delete it to start over"
        )

  def _cut_torn_line(self) -> None:
    """Removes an incomplete last line, left by a process killed during a write; its sample is predicted again."""
    self._file.seek(0)
    whole = self._file.read().rfind(b"\n") + 1
    self._file.truncate(whole)
    self._file.seek(0, os.SEEK_END)

  def add(self, record: Mapping[str, Any]) -> None:
    """Appends one prediction, unbuffered, so that it survives a kill of the process.

    Args:
      record: JSON values, among them "key".

    Raises:
      Stopped: the disk is full.
    """
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    with writing(self._path):
      if self._file.write(line) != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  def read(self) -> dict[str, dict[str, Any]]:
    """All predictions so far by key, including those of other processes.

    Raises:
      UserError: a complete line is not a record.
    """
    out = {}
    for path in sorted(self._directory.glob("records*.jsonl")):
      lines = path.read_bytes().split(b"\n")[:-1]  # without the line that another process is writing
      for number, line in enumerate(lines, 1):
        try:
          record = json.loads(line)
        except (ValueError, RecursionError):
          record = None
        if not _is_record(record):
          raise UserError(f"{path}, line {number}, is no record: delete the line to make the sample again")
        out[record["key"]] = record
    return out

  def close(self) -> None:
    """Releases the part for other processes."""
    self._file.close()

  def mine(self, keys: Collection[str]) -> list[str]:
    """The keys that this process predicts, in their order."""
    return [key for i, key in enumerate(keys) if i % self._parts == self._number]


def settings_in(directory: pathlib.Path, flag: str = "--output") -> dict[str, Any] | None:
  """The content of settings.json in an evaluation's directory; None where there is no such file.

  Raises:
    UserError: the file is damaged.
  """
  return object_in(directory / "settings.json", f"name another {flag}, or delete {directory} to start over")


def object_in(path: pathlib.Path, hint: str) -> dict[str, Any] | None:
  """The JSON object of a file that an evaluation wrote; None where there is no such file.

  Raises:
    UserError: the file is damaged; `hint` says what to do.
  """
  try:
    value = json.loads(path.read_bytes())
  except (FileNotFoundError, NotADirectoryError):
    return None
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}") from None
  except (ValueError, RecursionError):
    value = None
  if not isinstance(value, dict):
    raise UserError(f"{path} is damaged, no JSON object: {hint}")
  return value


def _is_record(value: Any) -> bool:
  """Whether a value is a prediction: a key, with an answer (a string or a likelihood's pair) or a file name."""
  if not isinstance(value, dict) or not isinstance(value.get("key"), str):
    return False
  return isinstance(value.get("answer", ""), str | list) and isinstance(value.get("file", ""), str)


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 48 else f"{text[:20]}...{text[-8:]}"


def need(row: Mapping[str, Any], fields: Collection[str], where: str) -> None:
  """Raises a UserError that names the first of `fields` missing from a record, and the record's place."""
  for field in fields:
    if row.get(field) in (None, ""):
      raise UserError(f"{where} has no field {field!r}; it has {', '.join(map(str, row)) or 'none'}")


def need_all(wanted: Collection[str], present: Collection[str], what: str, hint: str) -> None:
  """Raises a UserError with the number of samples missing from `present`, and the first of them."""
  missing = [key for key in wanted if key not in present]
  if missing:
    some = ", ".join(map(str, missing[:3]))
    raise UserError(f"{what}: {len(missing)} of {len(wanted)} samples are missing ({some}...): {hint}")


def read_picture(path: pathlib.Path) -> Image.Image:
  """A picture of an evaluation, RGB.

  Raises:
    UserError: it is missing or damaged.
  """
  try:
    with Image.open(path) as image:
      return image.convert("RGB")
  except (OSError, SyntaxError, ValueError) as error:  # of Pillow, for damaged files
    raise UserError(
      f"picture {path} cannot be read ({one_line(error)}): delete it and run the same command again"
    ) from None
