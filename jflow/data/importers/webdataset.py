"""webdataset: tar files whose members of the same name form a sample, as img2dataset writes them.

KEY.jpg (.jpeg .png .webp), several as KEY.0.jpg, KEY.1.jpg; KEY.txt holds the caption, KEY.json an object with a
caption or conversations and metadata. The members of a sample stand together. A tar is a part, and becomes a shard.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

from jflow.data.importers import objects, tar
from jflow.data.importers.importer import Item, Options
from jflow.data.importers.inputs import input_files, is_hidden
from jflow.data.records import Record, RecordError, Unwanted

MAX_SAMPLE = 128 * 2**20  # bytes
# What is no PNG, JPEG or WEBP is refused later, by its contents.
_IMAGE = re.compile(r"(?:.*\.)?(?:jpe?g|png|webp|gif|bmp|tiff?|avif|heic)")


class WebDataset:
  """See the top of the module."""

  images_beside = False

  def __init__(self, options: Options):
    self._options = options
    self._paths, self.left_out = input_files(options.input, (".tar", ".tar.gz", ".tgz"), "webdataset")

  def files(self) -> list[str]:
    return self._paths

  def parts(self) -> list[str]:
    return self._paths

  def work(self, part: str) -> int:
    return os.path.getsize(part)

  def items(self, part: str) -> Iterator[Item]:
    seen: set[str] = set()
    key, sample, position, read = "", {}, 0, 0
    damaged = behind = False  # in or before the sample; since its last member

    def finish() -> Iterator[Item]:
      if sample:
        item = self._item(part, key, sample, seen, position - read)
        if not damaged or isinstance(item.record, (Record, Unwanted)):  # what it lacks, the damage took
          yield item

    for member in tar.members(part):
      if not member.name:
        damaged = behind = True
        yield Item(part, member.data, {}, 0)
        continue
      hidden = is_hidden(member.name) or os.path.basename(member.name).startswith("__")
      if hidden and not isinstance(member.data, RecordError):
        continue  # what file managers and writers leave behind
      name, ending = _split(member.name)
      if name != key:
        yield from finish()
        damaged, sample, read = behind, {}, position
      key, position, behind = name, member.position, False
      sample[ending] = _fitting(sample, ending, member.data)
    yield from finish()

  def _item(
    self, part: str, key: str, sample: dict[str, bytes | RecordError], seen: set[str], work: int
  ) -> Item:
    where = f"{part} sample {key:.80}"
    try:
      for data in sample.values():
        if isinstance(data, RecordError):
          raise data
      if key in seen:
        raise RecordError(
          "duplicate_key", "the key stands twice in the tar: the members of a sample should stand together"
        )
      seen.add(key)
      objects.check_media(sample)
      fields = objects.parse_object(sample["json"]) if "json" in sample else {}
      if self._options.task == "text" and any(map(_IMAGE.fullmatch, sample)):
        raise Unwanted("with_images", "a sample with an image is no text")
      record = self._record(key, fields, sample)
      return Item(where, record, objects.notes(fields, ("key",)), work)
    except RecordError as error:
      return Item(where, error, {}, work)

  def _record(self, key: str, fields: dict[str, Any], sample: dict[str, bytes]) -> Record:
    task, column = self._options.task, self._options.text_column
    if "txt" in sample:
      try:
        text = sample["txt"].decode("utf-8-sig")
      except UnicodeDecodeError:
        raise RecordError("invalid_utf8", "the text is not valid UTF-8") from None
      fields = {**fields, "text" if task == "text" else "caption": text}
    wanted = self._options.image_column.lower()
    images = tuple(
      data for name, data in sample.items() if (name == wanted if wanted else _IMAGE.fullmatch(name))
    )
    if not images and task != "text":
      raise RecordError("missing_image", f"the sample has no image, only {', '.join(sample)}")
    return objects.make_record(key, fields, images, task, column)


def _fitting(
  sample: dict[str, bytes | RecordError], ending: str, data: bytes | RecordError
) -> bytes | RecordError:
  """Returns what a sample is to hold of a member: its data, unless it came before or there is too much."""
  if ending in sample:
    return RecordError("duplicate_key", f"the sample has two members that end in .{ending}")
  if (
    isinstance(data, bytes)
    and len(data) + sum(len(d) for d in sample.values() if isinstance(d, bytes)) > MAX_SAMPLE
  ):
    return RecordError("too_large", f"the sample has more than {MAX_SAMPLE:,} bytes")
  return data


def _split(name: str) -> tuple[str, str]:
  """Returns the key and the ending: the name is cut at the first dot after the last slash."""
  folder, _, base = name.removeprefix("./").rpartition("/")
  stem, _, ending = base.partition(".")
  return f"{folder}/{stem}" if folder else stem, ending.lower()
