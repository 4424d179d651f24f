"""imagefolder: a folder of pictures, each with a text beside it, or with metadata.jsonl or metadata.csv.

  0001.jpg, 0001.txt             the text of the file of the same name; --text_column names another ending
  metadata.jsonl                 {"file_name": "0001.jpg", "text": "..."}, one object per line
  metadata.csv                   the same as a table: file_name,text

`file_name` starts from the folder of the metadata. Other keys are those of llava-jsonl: caption, question and answer,
conversations. Hugging Face's `datasets` reads the same folders.
"""

import collections
import csv
import functools
import glob
import io
import os
from collections.abc import Iterator
from typing import Any

from jflow.data.importers import inputs, json_texts, objects, reading
from jflow.data.importers.importer import Item, Options, make_item
from jflow.data.records import Record, RecordError
from jflow.errors import UserError

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
_METADATA = ("metadata.jsonl", "metadata.csv")
_FILE_NAME = "file_name"
_ENDING = "txt"
_LONGEST = 2**20  # bytes of a text beside a picture
_MAX_METADATA = 2**31  # bytes; it is held in memory

Part = tuple[str, int, int]  # file of metadata, or "": pictures with texts; first entry; how many


class ImageFolder:
  """The importer of imagefolder; see the top of the module."""

  flags = frozenset({"part_records", "text_column"})
  reads_input = True
  images_beside = True

  def __init__(self, options: Options):
    self._options, folder = options, options.input
    inputs.refuse_address(folder, "imagefolder")
    if not os.path.isdir(folder):
      raise UserError(f"--input={folder} must be a folder of pictures for --format=imagefolder")
    found = sorted(path for name in _METADATA for path in glob.glob(f"{glob.escape(folder)}/**/{name}", recursive=True))
    self._tables = [path for path in found if not inputs.is_hidden(os.path.relpath(path, folder))]
    twice = [at for at, count in collections.Counter(map(os.path.dirname, self._tables)).items() if count > 1]
    if twice:
      raise UserError(f"{twice[0]} holds both {' and '.join(_METADATA)}: keep one")
    self._images, self.left_out = [], {}
    if not self._tables:
      self._images, self.left_out = inputs.input_files(folder, _IMAGES, "imagefolder")
      ending = options.text_column or _ENDING
      self._images = [path for path in self._images if path.lower().endswith(_IMAGES)]
      if self._images and not any(os.path.exists(_beside(path, ending)) for path in self._images):
        raise UserError(
          f"{folder} holds {len(self._images):,} pictures and no text: it needs {' or '.join(_METADATA)}, or a file "
          f"such as {os.path.basename(_beside(self._images[0], ending))} beside each picture"
        )

  def files(self) -> list[str]:
    texts = (_beside(path, self._options.text_column or _ENDING) for path in self._images)
    return [*self._tables, *self._images, *filter(os.path.exists, texts)]

  def parts(self) -> list[Part]:
    size = self._options.part_records
    counts = [(path, len(_rows(path))) for path in self._tables] or [("", len(self._images))]
    return [(path, first, min(size, count - first)) for path, count in counts for first in range(0, count, size)]

  def work(self, part: Part) -> int:
    return part[2]

  def items(self, part: Part) -> Iterator[Item]:
    path, first, count = part
    for number in range(first, first + count):
      if path:
        where, row = _rows(path)[number]
        yield make_item(f"{path} {where}", functools.partial(self._of_row, path, number, row))
      else:
        image = self._images[number]
        yield make_item(image, functools.partial(self._of_image, image))

  def _of_row(self, path: str, number: int, row: Any) -> tuple[Record, dict[str, Any]]:
    if isinstance(row, RecordError):
      raise row
    name = row.get(_FILE_NAME)
    if not isinstance(name, str) or not name:
      raise RecordError("missing_image", f'"{_FILE_NAME}" must be the path of a picture')
    fields = {key: value for key, value in row.items() if key != _FILE_NAME}
    record = objects.make_record(
      objects.name_of(row, number), fields, (name,), self._options.task, self._options.text_column
    )
    return record._replace(images=(reading.read_under(os.path.dirname(path), name),)), objects.notes(fields)

  def _of_image(self, path: str) -> tuple[Record, dict[str, Any]]:
    folder, name = os.path.split(path)
    beside = _beside(path, self._options.text_column or _ENDING)
    try:
      with open(beside, "rb") as file:
        text = file.read(_LONGEST + 1)
    except FileNotFoundError:
      raise RecordError("missing_caption", f"no text: {os.path.basename(beside)} is missing") from None
    if len(text) > _LONGEST:
      raise RecordError("too_large", f"{os.path.basename(beside)} has more than {_LONGEST:,} bytes")
    try:
      caption = text.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
      raise RecordError("invalid_utf8", f"{os.path.basename(beside)} is not valid UTF-8") from None
    record = objects.make_record(os.path.splitext(name)[0], {"caption": caption}, (name,), self._options.task)
    return record._replace(images=(reading.read_under(folder, name),)), {}


def _beside(path: str, ending: str) -> str:
  """The text of a picture: its name with another ending."""
  return f"{os.path.splitext(path)[0]}.{ending}"


def _rows(path: str) -> list[tuple[str, Any]]:
  return _read(path, os.stat(path).st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _read(path: str, changed: int) -> list[tuple[str, Any]]:
  """Returns (place, row or RecordError) of metadata; `changed` is a key of the cache, another after a change.

  Raises:
    UserError: the file is too large, not UTF-8, or a table without the column of pictures.
  """
  if os.path.getsize(path) > _MAX_METADATA:
    raise UserError(f"{path} has more than {_MAX_METADATA:,} bytes: cut it, with its pictures, into several folders")
  reading.check_encoding(path)
  with open(path, "rb") as file:
    data = file.read()
  return list(_of_lines(data) if path.endswith(".jsonl") else _of_table(path, data))


def _of_lines(data: bytes) -> Iterator[tuple[str, Any]]:
  for number, line in enumerate(data.split(b"\n"), 1):
    if not reading.is_blank(line):
      try:
        row: Any = json_texts.parse_object(line)
      except RecordError as error:
        row = error
      yield f"line {number}", row


def _of_table(path: str, data: bytes) -> Iterator[tuple[str, Any]]:
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError:
    raise UserError(f"{path} must be UTF-8 text") from None
  table = csv.reader(io.StringIO(text, newline=""), strict=True)
  try:
    header = next(table, [])
    if _FILE_NAME not in header or len(set(header)) < len(header):
      raise UserError(f"{path} must begin with the names of its columns, {_FILE_NAME} among them and none twice")
    for row in table:
      if row:
        fits = len(row) == len(header)
        what = RecordError("broken_row", f"{len(row)} cells in place of {len(header)}")
        yield f"line {table.line_num}", dict(zip(header, row)) if fits else what
  except csv.Error as error:
    raise UserError(f"{path} line {table.line_num} is no line of a table: {error}") from None
