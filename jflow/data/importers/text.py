"""text: documents in plain text files, and in JSON lines with a key "text".

.txt .md             the file is a document, or each of its paragraphs or lines is: --documents
.jsonl .ndjson .json .jsonl.gz .json.gz   each line is an object

Large files are cut into parts between documents; small ones share a part.
"""

import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from jflow import stores
from jflow.data.importers import compressed, inputs, json_texts, objects, reading
from jflow.data.importers.importer import Item, Options, make_item
from jflow.data.records import Record, RecordError
from jflow.errors import UserError

DOCUMENTS = ("file", "paragraph", "line")
MAX_DOCUMENT = reading.MAX_LINE
PART_BYTES = 64 * 2**20
_JSON = (".jsonl", ".ndjson", ".json")
_GZIP = (".jsonl.gz", ".json.gz")

Piece = tuple[str, int, int]  # file, first byte, one past the last


class Text:
  """The importer of text; see the top of the module."""

  flags = frozenset({"documents", "part_records", "text_column"})
  reads_input = True
  images_beside = False

  def __init__(self, options: Options):
    if options.task != "text":
      raise UserError(f"--format=text holds documents: use --task=text, not {options.task}")
    if options.documents not in DOCUMENTS:
      raise UserError(f"--documents={options.documents} is unknown: use one of {', '.join(DOCUMENTS)}")
    self._options = options
    endings = (".txt", ".md", *_JSON, *_GZIP)
    self._paths, self.left_out = inputs.input_files(options.input, endings, "text")
    other = next((path for path in self._paths if not path.lower().endswith(endings)), None)
    if other:
      raise UserError(f"{other} is not text to learn from, by its name: --format=text reads {', '.join(endings)}")

  def files(self) -> list[str]:
    return self._paths

  def parts(self) -> list[tuple[Piece, ...]]:
    parts, part, size = [], [], 0
    for path in self._paths:
      for piece in self._cut(path):
        length = piece[2] - piece[1]
        if part and (size + length > PART_BYTES or len(part) == self._options.part_records):
          parts.append(tuple(part))
          part, size = [], 0
        part.append(piece)
        size += length
    return parts + ([tuple(part)] if part else [])

  def work(self, part: tuple[Piece, ...]) -> int:
    return sum(stop - start for _, start, stop in part)

  def items(self, part: tuple[Piece, ...]) -> Iterator[Item]:
    for path, start, stop in part:
      try:
        if not stores.stat(path).size:
          raise RecordError("empty_shard", "the file is empty")
        with stores.open_file(path) as raw:
          raw.seek(start)
          gzipped, kind = compressed.is_gzip(path), self._kind(path)
          file = compressed.unfold(raw) if gzipped else raw
          for document, length in _documents(file, None if gzipped else stop - start, kind):
            if kind == "file" or not reading.is_blank(document):
              yield self._item(path, start, document, 0 if gzipped else length)
            start += length
      except RecordError as error:
        yield Item(path, error, {})

  def _kind(self, path: str) -> str:
    return "line" if path.lower().endswith(_JSON + _GZIP) else self._options.documents

  def _cut(self, path: str) -> list[Piece]:
    """Cuts a file into pieces of about PART_BYTES between documents."""
    size, kind = stores.stat(path).size, self._kind(path)
    if kind == "file" or not size or compressed.is_gzip(path):
      return [(path, 0, size)]
    reading.check_encoding(path)
    pieces, start = [], 0
    with stores.open_file(path) as file:
      while start < size:
        file.seek(start + PART_BYTES)
        for number, (line, _) in enumerate(reading.lines(file)):
          if kind == "line" or (number and not line.strip()):  # the first may be the end of a line
            break
        stop = min(file.tell(), size)
        pieces.append((path, start, stop))
        start = stop
    return pieces

  def _item(self, path: str, start: int, document: bytes, work: int) -> Item:
    """Returns the item of a document that begins at a byte."""
    where = path if self._kind(path) == "file" else f"{path} byte {start}"
    return make_item(where, lambda: self._record(path, start, document), work)

  def _record(self, path: str, start: int, document: bytes) -> tuple[Record, dict[str, Any]]:
    name = os.fsencode(os.path.basename(path)).decode("utf-8", "backslashreplace")  # a name need not be Unicode
    name += "" if self._kind(path) == "file" else f":{start}"
    if len(document) > MAX_DOCUMENT:
      raise RecordError("too_large", f"the document has more than {MAX_DOCUMENT:,} bytes; see --documents")
    if reading.is_utf16(document):
      raise RecordError("invalid_utf8", "UTF-16 or UTF-32 text: convert it to UTF-8, as in iconv -f UTF-16 -t UTF-8")
    if path.lower().endswith(_JSON + _GZIP):
      fields = json_texts.parse_object(document)
      record = objects.make_record(objects.name_of(fields, name), fields, (), "text", self._options.text_column)
      return record, objects.notes(fields)
    try:
      return Record(name, (), document.decode("utf-8-sig"), ()), {}
    except UnicodeDecodeError:
      raise RecordError("invalid_utf8", "not valid UTF-8") from None


def _documents(file: BinaryIO, length: int | None, kind: str) -> Iterator[tuple[bytes, int]]:
  """Yields the documents of the next `length` bytes (None: of all), cut like lines, and the bytes of each.

  A long document is cut as by `reading.lines`.
  """
  if kind == "file":
    content = file.read(MAX_DOCUMENT + 1 if length is None else min(length, MAX_DOCUMENT + 1))
    yield content, len(content) if length is None else length
    return
  document, taken, done = bytearray(), 0, 0
  begun = False  # whether the document holds more than blank lines
  for line, size in reading.lines(file, MAX_DOCUMENT):
    if len(document) <= MAX_DOCUMENT:
      document += line
    taken += size
    done += size
    # A blank line ends a paragraph; one before its first line is a part of it.
    blank = not line.strip()
    if kind == "line" or (blank and begun):
      yield bytes(document), taken
      document.clear()
      taken, begun = 0, False
    elif not blank:
      begun = True
    elif len(document) > MAX_DOCUMENT // 2:  # nothing but blank lines so far
      document.clear()
    if done == length:
      break
  if document:
    yield bytes(document), taken
