"""webdataset: tar files whose members of the same name form a sample, as img2dataset writes them.

KEY.jpg (.jpeg .png .webp), several as KEY.0.jpg, KEY.1.jpg; KEY.txt holds the caption, KEY.json an object with a
caption or conversations and metadata. --image_column and --text_column may name the ending of another member
(input.jpg, outputs.txt, cap), and --text_column a key of KEY.json; where both are there, the member counts. KEY ends
at the first dot. The members of a sample stand together. A tar is a part, and becomes a shard.
"""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

from jflow import stores
from jflow.data.importers import json_texts, keys, media, objects, tar
from jflow.data.importers.importer import Item, Options, make_item
from jflow.data.importers.inputs import input_files, is_hidden
from jflow.data.records import Record, RecordError, Unwanted
from jflow.data.sequences import IMAGE_MARK

MAX_SAMPLE = 128 * 2**20  # bytes
_ENDINGS = (".tar", ".tar.gz", ".tgz")
# Contents that are not PNG, JPEG or WEBP are refused later.
_IMAGE = re.compile(r"(?:.*\.)?(?:jpe?g|png|webp|gif|bmp|tiff?|avif|heic)")


class WebDataset:
  """The importer of webdataset; see the top of the module."""

  flags = frozenset({"image_column", "text_column"})
  reads_input = True
  images_beside = False

  def __init__(self, options: Options):
    self._options = options
    self._paths, self.left_out = input_files(options.input, _ENDINGS, "webdataset")
    self._sizes = dict(zip(self._paths, stores.each(lambda path: stores.stat(path).size, self._paths)))
    self._image_ending, self._text_ending = (
      column.lower().lstrip(".") for column in (options.image_column, options.text_column)
    )

  def files(self) -> list[str]:
    return self._paths

  def parts(self) -> list[str]:
    return self._paths

  def work(self, part: str) -> int:
    return self._sizes[part]

  def items(self, part: str) -> Iterator[Item]:
    seen: set[str] = set()
    key, sample, size, position, read = "", {}, 0, 0, 0
    damaged = behind = False  # in or before the sample; since its last member

    def finish() -> Iterator[Item]:
      if sample:
        item = self._item(part, key, sample, seen, position - read)
        if not damaged or isinstance(item.record, (Record, Unwanted)):  # a missing member may be lost to the damage
          yield item

    for member in tar.members(part):
      if not member.name:
        damaged = behind = True
        yield Item(part, member.data, {}, 0)
        continue
      hidden = is_hidden(member.name) or os.path.basename(member.name).startswith("__")
      if hidden and not isinstance(member.data, RecordError):
        where = f"{part} member {member.name:.80}"
        yield Item(where, Unwanted("hidden", "what file managers and writers leave behind"), {}, 0)
        continue
      name, ending = _split(member.name)
      if name != key:
        yield from finish()
        damaged, sample, size, read = behind, {}, 0, position
      key, position, behind = name, member.position, False
      size += 0 if isinstance(member.data, RecordError) else len(member.data)
      if ending in sample:
        sample[ending] = RecordError("duplicate_key", f"the sample has two members that end in .{ending}")
      elif size > MAX_SAMPLE:
        sample[ending] = RecordError("too_large", f"the sample has more than {MAX_SAMPLE:,} bytes")
      else:
        sample[ending] = member.data
    yield from finish()

  def _item(self, part: str, key: str, sample: dict[str, bytes | RecordError], seen: set[str], work: int) -> Item:
    def read() -> tuple[Record, dict[str, Any]]:
      if key in seen:
        raise RecordError(
          "duplicate_key", "the key occurs twice in the tar: the members of a sample must follow one another"
        )
      seen.add(key)
      contents = {n: b"broken" if isinstance(data, RecordError) else data for n, data in sample.items()}
      media.check_media(contents, self._text_ending)
      if self._options.task == "text" and any(map(_IMAGE.fullmatch, sample)):
        raise Unwanted("with_images", "a sample with an image is not text")
      return self._record(key, sample)

    item = make_item(f"{part} sample {key:.80}", read, work)
    if isinstance(item.record, RecordError) and not isinstance(item.record, Unwanted):
      broken = next((data for data in sample.values() if isinstance(data, RecordError)), item.record)
      return item._replace(record=broken)
    return item

  def _record(self, key: str, sample: dict[str, bytes | RecordError]) -> tuple[Record, dict[str, Any]]:
    """Returns the record of a sample and its metadata; members that it does not need may be broken."""
    task, column = self._options.task, self._options.text_column
    named = bool(column) and self._text_ending in sample
    ending = self._text_ending if named else "txt"
    fields = self._fields(sample, not named and (bool(column) or ending not in sample or task != "generation"))
    texts = dict(fields)
    if ending in sample:
      texts[column if named else "text" if task == "text" else "caption"] = _text(ending, _sound(sample[ending]))
    wanted = self._image_ending
    images = tuple(
      _sound(data) for name, data in sample.items() if (name == wanted if wanted else _IMAGE.fullmatch(name))
    )
    if not images and task != "text" and not (task == "understanding" and _is_talk(sample, texts)):
      what = f"no {wanted}" if wanted else "no image"
      raise RecordError("missing_image", f"the sample has {what}, only {_listed(sample, {})}: see --image_column")
    try:
      return objects.make_record(key, texts, images, task, column), objects.notes(fields, ("key",))
    except RecordError as error:
      if error.reason in ("missing_caption", "missing_text"):
        message = f"{error}; the sample has only {_listed(sample, fields)}: see --text_column"
        raise RecordError(error.reason, message) from None
      raise

  def _fields(self, sample: dict[str, bytes | RecordError], needed: bool) -> dict[str, Any]:
    """Returns the object in KEY.json; empty where the member is missing, or broken and not needed."""
    try:
      return json_texts.parse_object(_sound(sample["json"])) if "json" in sample else {}
    except RecordError:
      if needed:
        raise
      return {}


def _is_talk(sample: dict[str, Any], fields: dict[str, Any]) -> bool:
  """Whether a sample without an image is a conversation that needs none and has no other members."""
  return set(sample) == {"json"} and keys.is_conversation(fields) and IMAGE_MARK not in json.dumps(fields)


def _sound(data: bytes | RecordError) -> bytes:
  """Returns the contents of a member that is needed.

  Raises:
    RecordError: the member is broken.
  """
  if isinstance(data, RecordError):
    raise data
  return data


def _text(ending: str, data: bytes) -> Any:
  """Returns the text of a member, or its value if it is JSON."""
  if ending.rpartition(".")[2] == "json":
    return json_texts.parse_json(data)
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError:
    raise RecordError("invalid_utf8", f"the text in .{ending} is not valid UTF-8") from None


def _listed(sample: dict[str, Any], fields: dict[str, Any]) -> str:
  """Returns the endings of a sample, and the keys of its JSON, for a message."""
  endings, named = (", ".join(f"{name or repr(name):.40}" for name in list(names)[:12]) for names in (sample, fields))
  return endings + (f" ({named})" if "json" in sample and named else "")


def _split(name: str) -> tuple[str, str]:
  """Returns the key and the ending: the name is cut at the first dot after the last slash."""
  folder, _, base = "/".join(part for part in name.split("/") if part not in ("", ".")).rpartition("/")
  stem, _, ending = base.partition(".")
  return f"{folder}/{stem}" if folder else stem, ending.lower()
