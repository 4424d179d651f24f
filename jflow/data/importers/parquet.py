"""parquet: tables of images and texts, as the Hugging Face hub and img2dataset hold them.

An image is bytes, {"bytes", "path"}, a path, or a list of these; a text is a caption, a conversation (a list of turns
or its JSON), or an interleaved document. `datasets` writes images with palettes, CMYK and 16 bits as TIFF, which
becomes PNG. A row group is a part, and becomes a shard.

Each column is read separately, a few rows at a time, so that damage costs only the rows that need the value: a row
needs its image and text, and keeps numbers and short texts as metadata where they are readable.
"""

import collections
import functools
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jflow import stores
from jflow.data import images as images_lib
from jflow.data.importers import keys, media, objects
from jflow.data.importers.cells import broken_in
from jflow.data.importers.importer import Item, Options, make_item
from jflow.data.importers.inputs import input_files
from jflow.data.importers.reading import folder_of, read_under
from jflow.data.records import Record, RecordError, Unwanted
from jflow.errors import UserError

IMAGES = (*keys.IMAGES, "jpg", "png", "webp", "jpeg", "img", "image_bytes", "bytes")
MAX_RATIO = 100  # bytes of a row group to those of its file: images and text do not compress so well
MAX_ROWS = 100  # to a byte of the file
_BATCH_ROWS, _BATCH_BYTES = 32, 2**27  # of a column in memory, unless a single cell is larger

Part = tuple[str, int, int, int]  # file, row group, its first row, its rows


class Parquet:
  """The importer of parquet; see the top of the module."""

  flags = frozenset({"image_column", "image_root", "text_column"})
  reads_input = True
  images_beside = True

  def __init__(self, options: Options):
    self._options = options
    self._paths, self.left_out = input_files(options.input, (".parquet",), "parquet")
    self._known = dict(zip(self._paths, stores.each(stores.stat, self._paths)))  # once: a store is asked for each

  def files(self) -> list[str]:
    return self._paths

  def parts(self) -> list[Part]:
    """Returns the row groups.

    Raises:
      UserError: a file is not a parquet file, claims more than it can hold, or lacks a column that a flag names.
    """
    parts = []
    for path in self._paths:
      size = self._known[path].size
      if not size:
        parts.append((path, 0, 0, 0))
        continue
      with _open(path, self._known[path]) as table:
        self._columns(path, table.schema_arrow)
        row = 0
        for group in range(table.metadata.num_row_groups):
          rows = table.metadata.row_group(group).num_rows
          if not 0 <= rows <= MAX_ROWS * size:
            raise UserError(f"{path}: row group {group} claims {rows:,} rows in a file of {size:,} bytes")
          parts.append((path, group, row, rows))
          row += rows
    return parts

  def work(self, part: Part) -> int:
    return part[3]

  def items(self, part: Part) -> Iterator[Item]:
    path, group, first, rows = part
    if not (file_size := self._known[path].size):
      yield Item(path, RecordError("empty_shard", "the file is empty"), {})
      return
    with _open(path, self._known[path]) as table:
      columns = self._columns(path, table.schema_arrow)
      size = table.metadata.row_group(group).total_byte_size
      if size > MAX_RATIO * file_size + 2**20:
        bomb = RecordError("bomb", f"the row group unfolds to more than {MAX_RATIO} times the size of its file")
        yield from (Item(f"{path} row {number}", bomb, {}) for number in range(first, first + rows))
        return
      batch = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, size)))
      cells = {name: _cells(table, group, name, batch) for name in columns.read}
      for number in range(first, first + rows):
        fields = {name: next(values) for name, values in cells.items()}
        where = f"{path} row {number}"
        yield make_item(where, functools.partial(self._read, path, number, fields, columns))

  def _columns(self, path: str, schema: Any) -> "_Columns":
    """Returns the columns of a table that are read.

    Raises:
      UserError: there is none of images or texts, or of the name that was asked for, or there are several.
    """
    options, names = self._options, schema.names
    for flag in ("image_column", "text_column"):
      if getattr(options, flag) and getattr(options, flag) not in names:
        raise UserError(f"{path} has no column {getattr(options, flag)!r}: --{flag} is one of {', '.join(names)}")
    if not options.text_column:
      keys.require_text(path, names, options.task, "column")
    image = options.image_column or keys.spelled(names, IMAGES)
    if not image and options.task != "text":
      raise UserError(f"{path} has no column of images: name it by --image_column, one of {', '.join(names)}")
    texts = (options.text_column,) if options.text_column else (*keys.text_keys(options.task), "answer")
    read = {name for name in names if name in texts or (not options.text_column and name.lower() in texts)}
    # A document is imported without its image; a conversation with one is not text.
    if image and (options.task != "text" or keys.is_conversation(names)):
      read.add(image)
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if several := sorted(read.intersection(twice)):
      raise UserError(f"{path} has several columns {several[0]!r}: leave one of them")
    rest = [field for field in schema if field.name not in (*read, image, *twice)]
    others = tuple(field.name for field in rest if self._is_medium(field.name, names))
    read.update(others, {"id", "key"}.intersection(names).difference(twice))
    if options.task == "text" and keys.is_conversation(names):
      read.update(field.name for field in rest if _names_files(field.type))
    kept = self._notes({field.name: 0 for field in rest if _is_short(field.type)}, image)
    return _Columns(image, others, tuple(name for name in names if name in read or name in kept))

  def _is_medium(self, name: str, names: Sequence[str]) -> bool:
    """Returns whether a column may hold a medium, which makes its row one for another task or for none."""
    row = {**dict.fromkeys(names), name: b"contents"}
    try:
      media.check_media(row, self._options.text_column)
      return self._options.task == "text" and bool(media.images_of(row, "text"))
    except Unwanted:
      return True

  def _notes(self, fields: dict[str, Any], image: str) -> dict[str, Any]:
    return objects.notes(fields, (image, self._options.text_column, "key"))

  def _read(self, path: str, number: int, fields: dict[str, Any], columns: "_Columns") -> tuple[Record, dict[str, Any]]:
    task, image = self._options.task, columns.image
    for name in columns.media:
      if isinstance(fields[name], RecordError):
        raise fields[name]
    value = fields.pop(image, None)
    if isinstance(value, RecordError):
      raise value
    if task == "text":
      images = () if media.is_empty(value) else (value,)  # a row with it is not text
    else:
      values = value if isinstance(value, list) else [value]
      values = [None if isinstance(each, dict) and media.is_empty(each) else each for each in values]
      images = tuple(self._image(each, path) for each in values if each is not None)
    named = (fields.get(key) for key in ("id", "key"))
    name = next((str(each) for each in named if each is not None and not broken_in(each)), str(number))
    try:
      record = objects.make_record(name, fields, images, task, self._options.text_column)
    except Unwanted:
      raise
    except RecordError as error:
      raise broken_in(fields) or error from None
    if not images and not record.turns and task != "text":
      raise RecordError("missing_image", f'"{image}" is empty')
    return record, self._notes(fields, image)

  def _image(self, value: Any, path: str) -> bytes:
    """Returns an encoded image; `value` is its bytes, its path, or {"bytes", "path"}, of which the first counts."""
    if isinstance(value, dict):
      name, value = value.get("path"), value.get("bytes")
      value = name if value is None else value
    if isinstance(value, RecordError):
      raise value
    if isinstance(value, str) and value:
      value = read_under(self._options.image_root or folder_of(path), value)
    if value is None or value == "":
      raise RecordError("missing_image", "the image has no bytes and no path")
    if not isinstance(value, bytes):
      raise RecordError("bad_field", f"an image must be bytes, got {type(value).__name__}")
    return images_lib.tiff_as_png(value)


class _Columns(NamedTuple):
  """The columns of a table that are read."""

  image: str  # "" where there is none
  media: tuple[str, ...]  # columns that decide whether a row is used
  read: tuple[str, ...]  # and those of metadata


def _cells(table: Any, group: int, name: str, rows: int) -> Iterator[Any]:
  """Yields the values of a column in a row group, without end: a `RecordError` where there is none or it is unreadable.

  The column's own metadata are not read: pyarrow ends the process where they are damaged.
  """
  try:
    for batch in table.iter_batches(rows, [group], [name], use_threads=False):
      yield from map(_value, batch.column(name))
    broken = RecordError("corrupt", f'"{name}" ends before the row group does')
  except Exception as error:  # pyarrow raises many types on damaged pages
    if isinstance(error, UserError) or getattr(error, "errno", None):  # the disk or the store, not the data
      raise
    broken = RecordError("corrupt", f'the rest of "{name}" in the row group cannot be read ({type(error).__name__})')
  while True:
    yield broken


def _value(cell: Any) -> Any:
  """Returns a cell as a Python value, with a `RecordError` in place of a part that cannot be converted."""
  try:
    return cell.as_py()
  except UnicodeDecodeError:
    broken = RecordError("invalid_utf8", "the text is not valid UTF-8")
  except Exception as error:  # a date or a number out of Python's range
    broken = RecordError("bad_field", f"a value cannot be read ({type(error).__name__})")
  if hasattr(cell, "keys"):
    return {field.name: _value(cell[i]) for i, field in enumerate(cell.type)}
  return list(map(_value, cell.values)) if hasattr(cell, "values") else broken


def _is_short(kind: Any) -> bool:
  """Returns whether a column may be kept as metadata: numbers and texts."""
  from pyarrow import types

  kind = getattr(kind, "storage_type", kind)
  kind = kind.value_type if types.is_dictionary(kind) else kind
  texts = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
  return texts or types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)


def _names_files(kind: Any) -> bool:
  """Returns whether a column may hold lists of names of files, or objects that describe a file."""
  from pyarrow import types

  lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
  listed = any(is_list(kind) for is_list in lists)
  kind = kind.value_type if listed else kind
  return types.is_struct(kind) or (listed and (types.is_string(kind) or types.is_large_string(kind)))


def _open(path: str, known: stores.Stat) -> Any:
  import pyarrow.parquet

  try:
    return pyarrow.parquet.ParquetFile(
      stores.open_file(path, known) if stores.is_address(path) else path,
      metadata=_plain_metadata(path, known),
      memory_map=True,
      pre_buffer=False,
      page_checksum_verification=True,
    )
  except Exception as error:  # pyarrow raises many types on a damaged footer
    if stores.is_address(path) and (isinstance(error, UserError) or getattr(error, "errno", None)):
      raise  # of the store
    raise UserError(f"{path} is not a readable parquet file ({str(error)[:80]}){_advice(path)}") from None


@functools.lru_cache(maxsize=1)  # reading them again for each row group would take quadratic time
def _plain_metadata(path: str, known: stores.Stat) -> Any:
  """Returns the metadata of a file without the Arrow schema that its writer may have added.

  The schema would restore types, such as dictionaries, in which a single text that is not UTF-8 costs the whole column.
  With `known`, a file that has changed since the last call is read again.
  """
  import pyarrow.parquet

  with stores.open_file(path, known) as file:
    size = file.seek(-8, os.SEEK_END) + 8
    length = int.from_bytes(file.read(4), "little")
    file.seek(max(0, size - 8 - length))
    footer = file.read()
  plain = footer.replace(b"ARROW:schema", b"(not used).s") if footer.endswith(b"PAR1") else footer
  return pyarrow.parquet.read_metadata(io.BytesIO(b"PAR1" + plain))


def _advice(path: str) -> str:
  start = stores.head(path, 6)
  if start == b"ARROW1":
    return ": it is an Arrow file, which pyarrow.parquet.write_table writes as parquet"
  return ": decrypt it first" if start[:4] == b"PARE" else ": fetch it again"
