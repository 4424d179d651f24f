"""llava-jsonl: JSON objects, one per line, or a JSON array of them; images are files beside the file.

{"id": ..., "image": "a.jpg" or ["a.jpg", "b.jpg"], "conversations": [
{"from": "human", "value": "<image>..."}, {"from": "gpt", "value": ...}, ...]},
or {"image": ..., "caption": ...}; objects.py has the other forms.
"""

import functools
from collections.abc import Iterator
from typing import Any

from jflow import stores
from jflow.data.importers import arrays, inputs, json_texts, keys, media, objects, reading
from jflow.data.importers.importer import Item, Options, make_item
from jflow.data.records import Record, RecordError, Unwanted
from jflow.errors import UserError

Part = tuple[str, int, int, int]  # file, first byte, or _ARRAY, first line or entry, how many
_ARRAY = -1


class Llava:
  """The importer of llava-jsonl; see the top of the module."""

  flags = frozenset({"image_column", "image_root", "part_records", "text_column"})
  reads_input = True
  images_beside = True

  def __init__(self, options: Options):
    self._options = options
    self._paths, self.left_out = inputs.input_files(options.input, (".jsonl", ".ndjson", ".json"), "llava-jsonl")
    self._root = options.image_root or (options.input if inputs.is_folder(options.input) else None)
    if self._root and not inputs.is_folder(self._root):
      raise UserError(f"--image_root {self._root} is not a directory")

  def files(self) -> list[str]:
    return self._paths

  def parts(self) -> list[Part]:
    return [part for path in self._paths for part in self._parts_of(path)]

  def work(self, part: Part) -> int:
    return part[3]

  def items(self, part: Part) -> Iterator[Item]:
    path, start, first, count = part
    if start == _ARRAY:
      for number, value in enumerate(_load_array(path)[first : first + count], start=first):
        yield self._item(path, f"{path} entry {number}", number, value)
      return
    with stores.open_file(path) as file:
      file.seek(start)
      for number, (line, _) in zip(range(first + 1, first + count + 1), reading.lines(file)):
        if not reading.is_blank(line):
          yield self._item(path, f"{path} line {number}", number, line)

  def _parts_of(self, path: str) -> list[Part]:
    reading.check_encoding(path)
    size = self._options.part_records
    if _is_array(path):
      count = len(_load_array(path))
      return [(path, _ARRAY, i, min(size, count - i)) for i in range(0, count, size)]
    parts, offset, start, first, number = [], 0, 0, 0, 0
    with stores.open_file(path) as file:
      for number, (_, length) in enumerate(reading.lines(file), start=1):
        offset += length
        if number - first == size:
          parts.append((path, start, first, size))
          start, first = offset, number
    if number > first:
      parts.append((path, start, first, number - first))
    return parts

  def _item(self, path: str, where: str, number: int, value: Any) -> Item:
    return make_item(where, lambda: self._record(path, number, value))

  def _record(self, path: str, number: int, value: Any) -> tuple[Record, dict[str, Any]]:
    if isinstance(value, RecordError):
      raise value
    if isinstance(value, bytes) and len(value) > reading.MAX_LINE:
      raise RecordError("too_large", f"the line has more than {reading.MAX_LINE:,} bytes")
    value = json_texts.parse_object(value) if isinstance(value, bytes) else value
    if not isinstance(value, dict):
      raise RecordError("broken_json", "not a JSON object")
    task, name = self._options.task, objects.name_of(value, number)
    media.check_media(value, self._options.text_column)
    paths = media.images_of(value, task, self._options.image_column)
    if not all(isinstance(path, str) and path for path in paths):
      key = self._options.image_column or keys.IMAGES[0]
      raise RecordError("bad_field", f'"{key}" must be a path or a list of paths')
    caption = value.get("caption", value.get("conversations"))
    if task == "understanding" and not paths and caption is None and isinstance(value.get("text"), str):
      raise Unwanted("text_only", "a document without an image is learned by --task=text")
    record = objects.make_record(name, value, tuple(paths), task, self._options.text_column)
    root = self._root or reading.folder_of(path)
    return record._replace(images=_read(root, paths)), objects.notes(value)


def _read(root: str, paths: list[str]) -> tuple[bytes, ...]:
  """Returns the contents of a record's images, which share one size limit."""
  images: dict[str, bytes] = {}
  left = reading.MAX_IMAGE_FILE
  for path in paths:
    if path not in images:
      images[path] = reading.read_under(root, path, left)
    left -= len(images[path])
    if left < 0:
      raise RecordError("too_large", f"the images of the record have more than {reading.MAX_IMAGE_FILE:,} bytes")
  return tuple(images[path] for path in paths)


def _is_array(path: str) -> bool:
  """Whether a file is one JSON array, and not lines that begin with one."""
  with stores.open_file(path) as file:
    line = next((line for line, _ in reading.lines(file) if not reading.is_blank(line)), b"")
    if not line.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
      return False
    if all(reading.is_blank(line) for line, _ in reading.lines(file)):
      return True
  try:
    json_texts.parse_json(line)
  except RecordError:
    return True
  return False


def _load_array(path: str) -> list[Any]:
  return _parse_array(path, stores.stat(path).version)


@functools.lru_cache(maxsize=1)
def _parse_array(path: str, changed: str) -> list[Any]:
  """Returns the entries of an array; `changed` is a key of the cache, another one after the file has changed."""
  with stores.open_file(path) as file:
    try:
      return arrays.parse_array(file.read())
    except RecordError as error:
      raise UserError(f"{path}: {error}") from None
