"""parquet: tables of images and texts, as the Hugging Face hub and img2dataset hold them.

An image is bytes, {"bytes", "path"}, or a list of either; a text is a caption, a conversation (a list of turns or
its JSON), or an interleaved document. A row group is a part, and becomes a shard.
"""

import os
from collections.abc import Iterator
from typing import Any

from jflow.data.importers import objects
from jflow.data.importers.importer import Item, Options
from jflow.data.importers.inputs import input_files, read_under
from jflow.data.records import RecordError
from jflow.errors import UserError

IMAGES = (*objects.IMAGES, "jpg", "png", "webp", "jpeg", "img", "image_bytes", "bytes")
_BATCH = 32  # rows in memory

Part = tuple[str, int, int, int]  # file, row group, its first row, its rows


class Parquet:
  """See the top of the module."""

  images_beside = True

  def __init__(self, options: Options):
    self._options = options
    self._paths, self.left_out = input_files(options.input, (".parquet",), "parquet")

  def files(self) -> list[str]:
    return self._paths

  def parts(self) -> list[Part]:
    """Returns the row groups.

    Raises:
      UserError: a file is no parquet file, or has no column of the name that was asked for.
    """
    parts = []
    for path in self._paths:
      if not os.path.getsize(path):
        parts.append((path, 0, 0, 0))
        continue
      with _open(path) as table:
        names = table.schema_arrow.names
        self._columns(path, names)
        row = 0
        for group in range(table.metadata.num_row_groups):
          rows = table.metadata.row_group(group).num_rows
          parts.append((path, group, row, rows))
          row += rows
    return parts

  def work(self, part: Part) -> int:
    return part[3]

  def items(self, part: Part) -> Iterator[Item]:
    path, group, first, rows = part
    if not os.path.getsize(path):
      yield Item(path, RecordError("empty_shard", "the file is empty"), {})
      return
    done = 0
    try:
      with _open(path) as table:
        image, drop = self._columns(path, table.schema_arrow.names)
        names = table.schema_arrow.names
        images = self._options.task != "text" or objects.is_conversation(names)
        wanted = [name for name in names if name != image or images]
        for batch in table.iter_batches(_BATCH, [group], wanted, use_threads=False):
          for fields in batch.to_pylist():
            yield self._item(f"{path} row {first + done}", path, fields, image, drop)
            done += 1
    except Exception as error:  # pyarrow raises many types on damaged pages
      if getattr(error, "errno", None):  # the disk, not the data
        raise
      message = f"the rest of the row group cannot be read ({type(error).__name__})"
      for number in range(done, rows):
        yield Item(f"{path} row {first + number}", RecordError("corrupt", message), {})

  def _columns(self, path: str, names: list[str]) -> tuple[str, tuple[str, ...]]:
    """Returns the column of the images ("" where there is none) and what is no metadata."""
    options = self._options
    for flag in ("image_column", "text_column"):
      if getattr(options, flag) and getattr(options, flag) not in names:
        raise UserError(
          f"{path} has no column {getattr(options, flag)!r}: --{flag} is one of {', '.join(names)}"
        )
    if not options.text_column:
      objects.require_text(path, names, options.task, "column")
    image = options.image_column or objects.spelled(names, IMAGES)
    if not image and options.task != "text":
      raise UserError(f"{path} has no column of images: name it by --image_column, one of {', '.join(names)}")
    return image, (image, options.text_column, "key")

  def _item(self, where: str, path: str, fields: dict[str, Any], image: str, drop: tuple[str, ...]) -> Item:
    try:
      images, value = (), fields.pop(image, None)
      if self._options.task == "text":
        images = () if objects.is_empty(value) else (value,)  # which makes it no text
      else:
        images = tuple(
          self._image(v, path) for v in (value if isinstance(value, list) else [value]) if v is not None
        )
      name = next(
        (str(fields[key]) for key in ("id", "key") if fields.get(key) is not None), where.split()[-1]
      )
      record = objects.make_record(name, fields, images, self._options.task, self._options.text_column)
      if not images and not record.turns and self._options.task != "text":
        raise RecordError("missing_image", f'"{image}" is empty')
      return Item(where, record, objects.notes(fields, drop))
    except RecordError as error:
      return Item(where, error, {})

  def _image(self, value: Any, path: str) -> bytes:
    if isinstance(value, dict):
      name, value = value.get("path"), value.get("bytes")
      if value is None and isinstance(name, str) and name:
        value = read_under(self._options.image_root or os.path.dirname(os.path.abspath(path)), name)
    if value is None:
      raise RecordError("missing_image", "the image has no bytes and no path")
    if not isinstance(value, bytes):
      raise RecordError("bad_field", f"an image should be bytes, not {type(value).__name__}")
    return value


def _open(path: str) -> Any:
  import pyarrow.parquet

  try:
    return pyarrow.parquet.ParquetFile(
      path, memory_map=True, pre_buffer=False, page_checksum_verification=True
    )
  except Exception as error:  # pyarrow raises many types on a damaged footer
    raise UserError(f"{path} is not a readable parquet file ({str(error)[:80]}): fetch it again") from None
