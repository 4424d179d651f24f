"""text: documents, from plain text files and from JSON lines with "text" in them.

.txt .md             the file is a document, or each of its paragraphs or lines is: --documents
.jsonl .ndjson .json .jsonl.gz .json.gz   each line is an object

Large files are cut into parts where a document ends; small ones share a part.
"""

import os
from collections.abc import Iterator
from typing import BinaryIO

from jflow.data.importers import compressed, objects
from jflow.data.importers.importer import Item, Options, input_files
from jflow.data.records import Record, RecordError
from jflow.errors import UserError

DOCUMENTS = ("file", "paragraph", "line")
MAX_DOCUMENT = 64 * 2**20  # bytes
PART_BYTES = 64 * 2**20
_JSON = (".jsonl", ".ndjson", ".json")
_GZIP = (".jsonl.gz", ".json.gz")

Piece = tuple[str, int, int]  # file, first byte, one past the last


class Text:
  """See the top of the module."""

  images_beside = False

  def __init__(self, options: Options):
    if options.task != "text":
      raise UserError(f"--format=text holds documents: use --task=text, not {options.task}")
    if options.documents not in DOCUMENTS:
      raise UserError(f"--documents={options.documents} is unknown: use one of {', '.join(DOCUMENTS)}")
    self._options = options
    endings = (".txt", ".md", *_JSON, *_GZIP)
    self._paths = input_files(options.input, endings, "text")
    other = next((path for path in self._paths if not path.lower().endswith(endings)), None)
    if other:
      raise UserError(
        f"{other} is no text to learn from by its name: --format=text reads {', '.join(endings)}"
      )

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
        if not os.path.getsize(path):
          raise RecordError("empty_shard", "the file is empty")
        with open(path, "rb") as raw:
          raw.seek(start)
          gzipped = path.lower().endswith(_GZIP)
          file = compressed.unfold(raw) if gzipped else raw
          for document, length in _documents(file, None if gzipped else stop - start, self._kind(path)):
            item = self._item(path, start, document)
            start += length
            if item:
              yield item._replace(work=0 if gzipped else length)
      except RecordError as error:
        yield Item(path, error, {})

  def _kind(self, path: str) -> str:
    return "line" if path.lower().endswith(_JSON + _GZIP) else self._options.documents

  def _cut(self, path: str) -> list[Piece]:
    """Returns a file in pieces of about PART_BYTES, each of which ends where a document does."""
    size, kind = os.path.getsize(path), self._kind(path)
    if kind == "file" or not size or path.lower().endswith(_GZIP):
      return [(path, 0, size)]
    pieces, start = [], 0
    with open(path, "rb") as file:
      while start < size:
        file.seek(start + PART_BYTES)
        for number, (line, _) in enumerate(_lines(file)):
          if kind == "line" or (number and not line.strip()):  # the first may be the end of a line
            break
        stop = min(file.tell(), size)
        pieces.append((path, start, stop))
        start = stop
    return pieces

  def _item(self, path: str, start: int, document: bytes) -> Item | None:
    """Returns the item of a document that begins at a byte; None for a blank line."""
    kind = self._kind(path)
    if kind != "file" and not document.strip():
      return None
    where = path if kind == "file" else f"{path} byte {start}"
    name = os.path.basename(path) + ("" if kind == "file" else f":{start}")
    try:
      if len(document) > MAX_DOCUMENT:
        raise RecordError("too_large", f"the document has more than {MAX_DOCUMENT:,} bytes; see --documents")
      if not path.lower().endswith(_JSON + _GZIP):
        return Item(where, Record(name, (), document.decode("utf-8-sig"), ()), {})
      fields = objects.parse_object(document)
      name = str(fields.get("id", name))
      record = objects.make_record(name, fields, (), "text", self._options.text_column)
      return Item(where, record, objects.notes(fields))
    except UnicodeDecodeError:
      return Item(where, RecordError("invalid_utf8", "not valid UTF-8"), {})
    except RecordError as error:
      return Item(where, error, {})


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
  """Yields each line, of which no more than MAX_DOCUMENT + 1 bytes are kept, and its length."""
  while line := file.readline(MAX_DOCUMENT + 1):
    length, last = len(line), line
    while not last.endswith(b"\n") and (last := file.readline(2**20)):
      length += len(last)
    yield line, length


def _documents(file: BinaryIO, length: int | None, kind: str) -> Iterator[tuple[bytes, int]]:
  """Yields the documents of the next `length` bytes (None: of all), cut like lines, and the bytes that each takes."""
  if kind == "file":
    yield file.read(min(length, MAX_DOCUMENT + 1)), length
    return
  lines, kept, taken, done = [], 0, 0, 0
  for line, size in _lines(file):
    if kept <= MAX_DOCUMENT:
      lines.append(line)
      kept += len(line)
    taken += size
    done += size
    # A blank line ends a paragraph; before its first line it is a part of it.
    if kind == "line" or (not line.strip() and kept > len(line) and any(map(bytes.strip, lines))):
      yield b"".join(lines), taken
      lines, kept, taken = [], 0, 0
    if done == length:
      break
  if lines:
    yield b"".join(lines), taken
