"""llava-jsonl: JSON objects, one per line, or a JSON array of them; images are files beside the file.

{"id": ..., "image": "a.jpg" or ["a.jpg", "b.jpg"], "conversations": [
{"from": "human", "value": "<image>..."}, {"from": "gpt", "value": ...}, ...]},
or {"image": ..., "caption": ...}; objects.py has the other forms.
"""

import functools
import os
from collections.abc import Iterator
from typing import Any

from jflow.data.examples import IMAGE_MARK
from jflow.data.importers import objects
from jflow.data.importers.importer import Item, Options, input_files, read_under
from jflow.data.records import Record, RecordError
from jflow.errors import UserError

Part = tuple[str, int, int, int]  # file, first byte, first line, lines; the bytes of an array are left at 0


class Llava:
  """See the top of the module."""

  images_beside = True

  def __init__(self, options: Options):
    self._options = options
    self._paths = input_files(options.input, (".jsonl", ".json"), "llava-jsonl")
    self._root = options.image_root or (options.input if os.path.isdir(options.input) else None)
    if self._root and not os.path.isdir(self._root):
      raise UserError(f"--image_root {self._root} is not a directory")

  def files(self) -> list[str]:
    return self._paths

  def parts(self) -> list[Part]:
    return [part for path in self._paths for part in self._parts_of(path)]

  def work(self, part: Part) -> int:
    return part[3]

  def items(self, part: Part) -> Iterator[Item]:
    path, start, first, count = part
    if _is_array(path):
      for number, value in enumerate(_load_array(path)[first : first + count], start=first):
        yield self._item(path, f"{path} entry {number}", number, value)
      return
    with open(path, "rb") as file:
      file.seek(start)
      for number in range(first + 1, first + count + 1):
        line = file.readline()
        if line.strip():
          yield self._item(path, f"{path} line {number}", number, line)

  def _parts_of(self, path: str) -> list[Part]:
    size = self._options.part_records
    if _is_array(path):
      count = len(_load_array(path))
      return [(path, 0, i, min(size, count - i)) for i in range(0, count, size)]
    parts, offset, start, first, number = [], 0, 0, 0, 0
    with open(path, "rb") as file:
      for number, line in enumerate(file, start=1):
        offset += len(line)
        if number - first == size:
          parts.append((path, start, first, size))
          start, first = offset, number
    if number > first:
      parts.append((path, start, first, number - first))
    return parts

  def _item(self, path: str, where: str, number: int, value: Any) -> Item:
    try:
      value = objects.parse_object(value) if isinstance(value, bytes) else value
      if not isinstance(value, dict):
        raise RecordError("broken_json", "not a JSON object")
      name = str(value.get("id", number))
      paths = self._paths_of_images(value)
      task, caption = self._options.task, value.get("caption", value.get("conversations"))
      document = caption is None and isinstance(value.get("text"), str) and IMAGE_MARK not in value["text"]
      if (task == "text" and paths) or (task == "understanding" and not paths and document):
        dropped = "with_images" if paths else "text_only"
        return Item(where, Record(name, (), "", ()), {}, dropped=dropped)
      root = self._root or os.path.dirname(os.path.abspath(path))
      images = tuple(read_under(root, path) for path in paths)
      record = objects.make_record(name, value, images, self._options.task, self._options.text_column)
      return Item(where, record, objects.notes(value))
    except RecordError as error:
      return Item(where, error, {})

  def _paths_of_images(self, value: dict[str, Any]) -> list[str]:
    keys = (self._options.image_column,) if self._options.image_column else objects.IMAGES
    names = next((value[key] for key in keys if value.get(key) is not None), ())
    names = [names] if isinstance(names, str) else names
    if isinstance(names, list):
      names = [name for name in names if name is not None]  # an interleaved document has a text there
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
      raise RecordError("bad_field", f'"{keys[0]}" should be a path or a list of paths')
    return list(names)


def _is_array(path: str) -> bool:
  with open(path, "rb") as file:
    return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


@functools.lru_cache(maxsize=1)
def _load_array(path: str) -> list[Any]:
  with open(path, "rb") as file:
    try:
      return objects.parse_json(file.read())
    except RecordError as error:
      raise UserError(f"{path}: {error}") from None
