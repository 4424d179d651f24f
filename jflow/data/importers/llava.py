"""llava-jsonl: a file of JSON objects, one per line, or a JSON array of them; images are files beside it.

{"id": ..., "image": "a.jpg" or ["a.jpg", "b.jpg"], "conversations": [
{"from": "human", "value": "<image>..."}, {"from": "gpt", "value": ...}, ...]},
or {"image": ..., "caption": ...}.
"""

import functools
import json
import os
from collections.abc import Iterator
from typing import Any

from jflow.data.importers.importer import Item, Options
from jflow.data.records import Record, RecordError, Turn
from jflow.errors import UserError

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class Llava:
  """See the top of the module."""

  def __init__(self, options: Options):
    path = options.input
    if not os.path.isfile(path):
      raise UserError(f"input {path} not found: --format=llava-jsonl reads one .jsonl or .json file")
    self._path, self._task, self._part_records = path, options.task, options.part_records
    self._root = os.path.normpath(
      os.path.abspath(options.image_root or os.path.dirname(os.path.abspath(path)))
    )
    if not os.path.isdir(self._root):
      raise UserError(f"--image_root {self._root} is not a directory")

  def files(self) -> list[str]:
    return [self._path]

  def parts(self) -> list[tuple[int, int, int]]:
    """Returns (first byte, first line, lines) of each part; of an array, the bytes are left at 0."""
    if self._is_array():
      count = len(_load_array(self._path))
      return [(0, i, min(self._part_records, count - i)) for i in range(0, count, self._part_records)]
    parts, offset, start, first, number = [], 0, 0, 0, 0
    with open(self._path, "rb") as file:
      for number, line in enumerate(file, start=1):
        offset += len(line)
        if number - first == self._part_records:
          parts.append((start, first, number - first))
          start, first = offset, number
    if number > first:
      parts.append((start, first, number - first))
    return parts

  def work(self, part: tuple[int, int, int]) -> int:
    return part[2]

  def items(self, part: tuple[int, int, int]) -> Iterator[Item]:
    start, first, count = part
    if self._is_array():
      for number, value in enumerate(_load_array(self._path)[first : first + count], start=first):
        yield self._item(f"{self._path} entry {number}", number, value)
      return
    with open(self._path, "rb") as file:
      file.seek(start)
      for number in range(first + 1, first + count + 1):
        line = file.readline()
        if line.strip():
          yield self._item(f"{self._path} line {number}", number, line)

  def _is_array(self) -> bool:
    with open(self._path, "rb") as file:
      return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")

  def _item(self, where: str, number: int, value: Any) -> Item:
    try:
      value = parse_json(value) if isinstance(value, bytes) else value
      if not isinstance(value, dict):
        raise RecordError("broken_json", "not a JSON object")
      record = Record(str(value.get("id", number)), self._images(value), *llava_text(value, self._task))
      return Item(where, record, {})
    except RecordError as error:
      return Item(where, error, {})

  def _images(self, value: dict[str, Any]) -> tuple[bytes, ...]:
    names = value.get("image", value.get("images", ()))
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
      raise RecordError("bad_field", '"image" should be a path or a list of paths')
    images = []
    for name in names:
      path = os.path.normpath(os.path.join(self._root, name))
      if os.path.commonpath([path, self._root]) != self._root:
        raise RecordError("outside_root", f"image {name} lies outside {self._root}: set --image_root")
      try:
        with open(path, "rb") as file:
          images.append(file.read())
      except (OSError, ValueError):
        raise RecordError("missing_image", f"image {name} not found in {self._root}") from None
    return tuple(images)


def parse_json(line: bytes) -> Any:
  """Returns the value of a JSON text.

  Raises:
    RecordError: it is not UTF-8 ("invalid_utf8") or not JSON ("broken_json").
  """
  try:
    return json.loads(line.decode("utf-8-sig"))
  except UnicodeDecodeError:
    raise RecordError("invalid_utf8", "not valid UTF-8") from None
  except (ValueError, RecursionError) as error:
    raise RecordError("broken_json", f"not valid JSON ({str(error)[:80]})") from None


def llava_text(value: dict[str, Any], task: str) -> tuple[str, tuple[Turn, ...]]:
  """Returns the text and the turns of a LLaVA object.

  Raises:
    RecordError: a field has the wrong form.
  """
  conversations = value.get("conversations")
  if conversations is None or task == "generation":
    text = value.get("caption", value.get("text", ""))
    if not isinstance(text, str):
      raise RecordError("bad_field", '"caption" should be text')
    return _valid(text), ()
  if not isinstance(conversations, list) or not conversations:
    raise RecordError("no_answer", "the conversation is empty")
  turns = []
  for turn in conversations:
    role, text = (
      (turn.get("from", turn.get("role")), turn.get("value", turn.get("content")))
      if isinstance(turn, dict)
      else (None, None)
    )
    if role not in _ROLES or not isinstance(text, str):
      raise RecordError("bad_turns", 'a turn should hold "from" ("human" or "gpt") and "value"')
    turns.append(Turn(_ROLES[role], _valid(text)))
  return "", tuple(turns)


def _valid(text: str) -> str:
  """Returns the text if UTF-8 can hold it; JSON lets lone surrogates through."""
  try:
    text.encode("utf-8")
  except UnicodeEncodeError:
    raise RecordError("invalid_utf8", "the text holds a lone surrogate") from None
  return text


@functools.lru_cache(maxsize=1)
def _load_array(path: str) -> list[Any]:
  with open(path, "rb") as file:
    try:
      return parse_json(file.read())
    except RecordError as error:
      raise UserError(f"{path}: {error}") from None
