"""The images that a record names, and media in it that no task reads."""

import re
from collections.abc import Container, Mapping
from typing import Any

from jflow.data.importers.keys import CONVERSATIONS, IMAGES, TEXTS, is_conversation
from jflow.data.records import RecordError, Unwanted

# Media that no task reads: their keys and columns, and endings of their files.
_MEDIA = {
  "with_video": (
    "video",
    "videos",
    "video_path",
    "video_paths",
    "video_file",
    "video_files",
    "mp4",
    "m4v",
    "mov",
    "mkv",
    "webm",
    "avi",
  ),
  "with_audio": (
    "audio",
    "audios",
    "audio_path",
    "audio_paths",
    "audio_file",
    "audio_files",
    "input_audio",
    "wav",
    "flac",
    "mp3",
    "ogg",
    "opus",
    "m4a",
    "aac",
  ),
  "with_point_cloud": ("point_cloud", "point_clouds", "pointcloud", "pointclouds", "pcd", "ply"),
  "with_pdf": ("pdf", "pdfs"),
}
_MEDIUM_OF = {name: reason for reason, names in _MEDIA.items() for name in names}
# Keys that hold a medium if their value is the name of such a file; it may also be a description.
_PERHAPS = {
  **dict.fromkeys(("clip", "clips", "movie"), "with_video"),
  **dict.fromkeys(("sound", "sounds", "speech", "voice", "music"), "with_audio"),
  **dict.fromkeys(("points", "point", "lidar"), "with_point_cloud"),
}
# Keys of images, where their value is the name of such a file, that are not read unless --image_column
# names them.
_OTHER_IMAGES = (
  "img",
  "imgs",
  "img_path",
  "image_path",
  "image_paths",
  "image_file",
  "image_files",
  "picture",
  "pictures",
  "photo",
  "photos",
)
# Keys of a conversation for the place or the name of its medium.
_REFERENCE = re.compile(r"(video|audio|image|img)s?[_-]?(?:url|uri|link|id|name)s?")
_IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic")
_PLACE = ("path", "url", "uri", "file", "file_name", "filename", "name")  # of a file that an object describes
_MAX_NAME = 4096  # characters of the name of a file
_MAX_DEPTH = 16  # of lists and objects in which a value is looked for


def images_of(fields: Mapping[str, Any], task: str, column: str = "") -> list[Any]:
  """Returns the values of the first usual key that holds images, else those that parts of a conversation name.

  None is left out of a list: an interleaved document has a text there. In an object that names no image, `<image>` is
  text.

  Args:
    fields: the object.
    task: "understanding", "generation" or "text".
    column: the key to take instead of the usual ones.

  Raises:
    Unwanted: an image under an unusual key, and the task is text.
    RecordError: the same, for another task.
  """
  keys = (column,) if column else IMAGES
  value = next((fields[key] for key in keys if not is_empty(fields.get(key))), None)
  if value is not None:
    return [each for each in value if each is not None] if isinstance(value, (list, tuple)) else [value]
  if not column and (value := _of_parts(fields)):
    return value
  conversation = is_conversation(fields)
  for key in () if column else fields:
    lower, value = key.lower(), fields[key]
    named = conversation and lower not in TEXTS and _ending(value) in _IMAGE_ENDINGS
    named |= conversation and (_reference(lower) in ("image", "img") or _is_contents(value)) and _holds(value)
    if named or (lower in IMAGES and _holds(value)) or (lower in _OTHER_IMAGES and _is_file(value, _IMAGE_ENDINGS)):
      if task == "text":
        raise Unwanted("with_images", "a record with an image is not text")
      raise RecordError("missing_image", f"the image is under {key[:40]!r}: name it by --image_column")
  return []


def part_kind(part: Mapping[str, Any]) -> str:
  """Returns the kind of a part of a turn, such as "text", "image" or "video", or ""."""
  kind = part.get("type")
  return kind.lower().removesuffix("_url") if isinstance(kind, str) else ""


def _of_parts(fields: Mapping[str, Any]) -> list[Any]:
  """Returns what parts such as {"type": "image", "image": PATH} or {"type": "image_url", "image_url": {"url": PATH}} name."""
  named = []
  for turns in (fields[key] for key in CONVERSATIONS if isinstance(fields.get(key), (list, tuple))):
    for turn in (turn for turn in turns if isinstance(turn, Mapping)):
      parts = turn.get("content")
      for part in parts if isinstance(parts, (list, tuple)) else ():
        if isinstance(part, Mapping) and part_kind(part) == "image":
          value = next((part[key] for key in (*IMAGES[:1], "image_url", *_PLACE) if not is_empty(part.get(key))), None)
          named.append(value.get("url") if isinstance(value, Mapping) and "url" in value else value)
    break
  return [value for value in named if value is not None]


def check_media(names: Mapping[str, Any], column: str = "", pictured: bool = False) -> None:
  """Checks that an object, or a sample of files, holds no medium that is not read.

  Args:
    names: keys and their values, or endings of files and their contents; empty ones do not count.
    column: the key of the texts, which is not a medium, whatever its name.
    pictured: whether the record has an image that `names` does not hold.

  Raises:
    Unwanted: there is one: "with_video", "with_audio", "with_point_cloud" or "with_pdf".
  """
  # Beside an image, the name of a video or a document is the image's source.
  pictured |= any(
    name.lower() in (*IMAGES, *_OTHER_IMAGES, *_IMAGE_ENDINGS) and not is_empty(value) for name, value in names.items()
  )
  guess = not pictured and is_conversation(names)
  for name, value in names.items():
    key = name.lower().rpartition(".")[2]
    reason = _MEDIUM_OF.get(key)
    if reason is None and _is_file(value, _MEDIUM_OF):
      reason = _PERHAPS.get(key)
    if reason is None and guess and key not in TEXTS:
      reason = _MEDIUM_OF.get(_ending(value)) or _MEDIUM_OF.get(_reference(key))
    if reason and name != column and _holds(value):
      raise Unwanted(reason, f"{name[:40]!r} holds what no task reads")


def _is_file(value: Any, endings: Container[str]) -> bool:
  """Whether a value, or the first of a list, is the contents of a file, or a file name with one of the endings.

  The other values of a list are not checked.
  """
  first = value[0] if isinstance(value, (list, tuple)) and value else value
  return isinstance(first, (bytes, Mapping)) or _ending(first) in endings


def _is_contents(value: Any) -> bool:
  """Whether a value, or the first of a list, is {"bytes", "path"} as `datasets` stores pictures."""
  first = value[0] if isinstance(value, (list, tuple)) and value else value
  return isinstance(first, Mapping) and bool(first.get("bytes"))


def _reference(key: str) -> str:
  """Returns the medium that a key such as "video_url" or "image_id" refers to, or ""."""
  match = _REFERENCE.fullmatch(key)
  return match[1] if match else ""


def _ending(value: Any) -> str:
  """Returns the ending of the file that a value, or the first of a list, is the name or address of, or ""."""
  first = value[0] if isinstance(value, (list, tuple)) and value else value
  if isinstance(first, Mapping):
    first = next((first[key] for key in _PLACE if first.get(key)), None)
  if isinstance(first, str) and "://" in first[:32]:
    first = re.split("[?#]", first, maxsplit=1)[0]
  if not isinstance(first, str) or len(first) > _MAX_NAME or any(map(str.isspace, first)):
    return ""
  stem, _, ending = first.rpartition(".")
  return ending.lower() if stem else ""


def is_empty(value: Any, depth: int = 0) -> bool:
  """Whether a value is empty: None, "", [], or a list or an object of only such values."""
  if isinstance(value, Mapping) and value:
    value = list(value.values())
  if isinstance(value, (list, tuple)):
    return depth < _MAX_DEPTH and all(is_empty(each, depth + 1) for each in value)
  return value is None or (isinstance(value, (str, bytes)) and not value)


def _holds(value: Any) -> bool:
  """Whether a value may be a medium or its name: neither a number nor empty."""
  return isinstance(value, (str, bytes, list, tuple, Mapping)) and bool(value) and not is_empty(value)
