"""JSON objects and table rows as records: which keys hold the text, and in what forms."""

import json
import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from jflow.data.examples import IMAGE_MARK
from jflow.data.records import Record, RecordError, Turn, Unwanted
from jflow.errors import UserError

IMAGES = ("image", "images")
CONVERSATIONS = ("conversations", "messages", "texts")
CAPTIONS = ("caption", "text", "prompt", "description")
DOCUMENTS = ("text", "content", "document")
_TEXTS = {*CONVERSATIONS, *CAPTIONS, *DOCUMENTS, "question", "answer", "id"}

# Names that data sets give to the two who speak, in lower case.
_ROLES = {
  **dict.fromkeys(("human", "user", "prompter"), "user"),
  **dict.fromkeys(
    (
      "gpt",
      "assistant",
      "bot",
      "chatbot",
      "chatgpt",
      "model",
      "ai",
      "gpt4",
      "gpt-4",
      "bard",
      "bing",
      "claude",
    ),
    "assistant",
  ),
}
# Media that no task reads: keys and columns that hold one, and endings of files that are one.
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
# Keys that hold a medium where their value is the name of such a file: they may as well hold a word about it.
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
# Keys of a conversation that say where its medium lies, or which it is.
_REFERENCE = re.compile(r"(video|audio|image|img)s?[_-]?(?:url|uri|link|id|name)s?")
_IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic")
_TURN = ("from", "role"), ("value", "content")
_PLACE = ("path", "url", "uri", "file", "file_name", "filename", "name")  # of a file that an object describes
_MAX_NOTE = 1000  # characters of a value that is kept as metadata
_MAX_NAME = 4096  # characters of the name of a file
_MAX_DEPTH = 16  # of lists and objects in which a value is looked for


def make_record(name: str, fields: Mapping[str, Any], images: tuple[Any, ...], task: str, column: str = "") -> Record:
  """Returns the record of an object whose images are known.

  Args:
    name: the record's id.
    fields: the object. What holds its text, by task; the first that is there counts:
      understanding  a conversation (`CONVERSATIONS`); "question" and "answer"; a caption (`CAPTIONS`), which
                     with image marks in it is an interleaved document
      generation     a caption
      text           a conversation; a document (`DOCUMENTS`)
    images: as the record is to hold them.
    task: "understanding", "generation" or "text".
    column: the key to take instead of the usual ones.

  Raises:
    Unwanted: the record has a medium that the task does not read.
    RecordError: no key holds text, or it has the wrong form.
  """
  check_media(fields, column, bool(images))
  if task == "text" and (images or images_of(fields, task)):
    raise Unwanted("with_images", "a record with an image is no text")
  keys = (column,) if column else (DOCUMENTS if task == "text" else CAPTIONS)
  if task != "generation":
    value = _first(fields, (column,) if column else CONVERSATIONS)
    if isinstance(value, str) and value.lstrip().startswith("[") and not column:
      value = parse_json(value)
    if isinstance(value, (list, tuple)) and (value or column or _first(fields, keys) is None):
      return _from_list(name, value, images, task)
    if value is not None and not column and not isinstance(value, (list, tuple)):
      raise RecordError("bad_field", f"the conversation should be a list of turns, not {type(value).__name__}")
    if not column and isinstance(fields.get("question"), str) and isinstance(fields.get("answer"), str):
      marks = "" if IMAGE_MARK in fields["question"] else IMAGE_MARK * len(images) + "\n" * bool(images)
      turns = Turn("user", marks + fields["question"]), Turn("assistant", fields["answer"])
      return Record(name, images, "", turns)
  text = _first(fields, keys)
  if text is None:
    reason = "missing_text" if task == "text" else "missing_caption"
    raise RecordError(reason, f"no text: {_listed(keys)} is missing")
  if not isinstance(text, str):
    raise RecordError("bad_field", f"{_listed(keys)} should be text, not {type(text).__name__}")
  return Record(name, images, text, ())


def name_of(fields: Mapping[str, Any], otherwise: Any) -> str:
  """Returns the id of an object, or the other name where it has none.

  Raises:
    RecordError: it is neither text nor a number.
  """
  name = fields.get("id")
  if name is not None and not isinstance(name, (str, int, float)):
    raise RecordError("bad_field", f'"id" should be text or a number, not {type(name).__name__}')
  return str(otherwise if name is None else name)


def images_of(fields: Mapping[str, Any], task: str, column: str = "") -> list[Any]:
  """Returns the images that an object names, as it names them: the first of the usual keys that holds one.

  Of a list, what is None is left out: an interleaved document has a text there. An object that names no image
  may hold `<image>`, which is text.

  Args:
    fields: the object.
    task: "understanding", "generation" or "text".
    column: the key to take instead of the usual ones.

  Raises:
    Unwanted: an image stands under a key that is not among the usual ones, and the task is text.
    RecordError: the same for another task.
  """
  keys = (column,) if column else IMAGES
  value = next((fields[key] for key in keys if not is_empty(fields.get(key))), None)
  if value is not None:
    return [each for each in value if each is not None] if isinstance(value, (list, tuple)) else [value]
  conversation = is_conversation(fields)
  for key in () if column else fields:
    lower, value = key.lower(), fields[key]
    named = conversation and lower not in _TEXTS and _ending(value) in _IMAGE_ENDINGS
    named |= conversation and (_reference(lower) in ("image", "img") or _is_contents(value)) and _holds(value)
    if named or (lower in IMAGES and _holds(value)) or (lower in _OTHER_IMAGES and _is_file(value, _IMAGE_ENDINGS)):
      if task == "text":
        raise Unwanted("with_images", "a record with an image is no text")
      raise RecordError("missing_image", f"the image stands under {key[:40]!r}: name it by --image_column")
  return []


def check_media(names: Mapping[str, Any], column: str = "", pictured: bool = False) -> None:
  """Checks that an object, or a sample of files, holds no medium that is not read.

  Args:
    names: keys and their values, or endings of files and their contents; one that is empty does not count.
    column: the key of the texts, which holds no medium whatever its name.
    pictured: whether the record has an image that `names` does not hold.

  Raises:
    Unwanted: it does: "with_video", "with_audio", "with_point_cloud" or "with_pdf".
  """
  # Beside an image the name of a video or of a document says where the image is from.
  pictured |= any(
    name.lower() in (*IMAGES, *_OTHER_IMAGES, *_IMAGE_ENDINGS) and not is_empty(value) for name, value in names.items()
  )
  guess = not pictured and is_conversation(names)
  for name, value in names.items():
    key = name.lower().rpartition(".")[2]
    reason = _MEDIUM_OF.get(key)
    if reason is None and _is_file(value, _MEDIUM_OF):
      reason = _PERHAPS.get(key)
    if reason is None and guess and key not in _TEXTS:
      reason = _MEDIUM_OF.get(_ending(value)) or _MEDIUM_OF.get(_reference(key))
    if reason and name != column and _holds(value):
      raise Unwanted(reason, f"{name[:40]!r} holds what no task reads")


def _is_file(value: Any, endings: Container[str]) -> bool:
  """Whether a value is the contents of a file, or the name of one with one of the endings.

  Of a list, the first is.
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
  """Whether a value says that there is nothing: None, "", [], or a list or an object of nothing but such."""
  if isinstance(value, Mapping) and value:
    value = list(value.values())
  if isinstance(value, (list, tuple)):
    return depth < _MAX_DEPTH and all(is_empty(each, depth + 1) for each in value)
  return value is None or (isinstance(value, (str, bytes)) and not value)


def _holds(value: Any) -> bool:
  """Whether a value may be a medium, or name it: no number, and not empty."""
  return isinstance(value, (str, bytes, list, tuple, Mapping)) and bool(value) and not is_empty(value)


def notes(fields: Mapping[str, Any], leave_out: Iterable[str] = ()) -> dict[str, Any]:
  """Returns what is kept of an object as metadata: numbers and short strings, without its text."""
  without = {*IMAGES, *_TEXTS, *leave_out}
  kept = {}
  for key, value in fields.items():
    short = isinstance(value, str) and len(value) <= _MAX_NOTE
    number = isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))
    if key not in without and key.lower() not in without and (short or number):
      kept[key] = value
  return kept


def parse_json(text: bytes | str) -> Any:
  """Returns the value of a JSON text.

  Raises:
    RecordError: it is not UTF-8 ("invalid_utf8"), not JSON ("broken_json"), or an object in it names a key
      twice ("duplicate_key"), where readers differ in what they take.
  """
  try:
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    return json.loads(text, object_pairs_hook=_object)
  except UnicodeDecodeError:
    raise RecordError("invalid_utf8", "not valid UTF-8") from None
  except (ValueError, RecursionError) as error:
    raise broken_json(error) from None


def broken_json(error: Exception) -> RecordError:
  """Returns what is told of a text that is not JSON."""
  return RecordError("broken_json", f"not valid JSON ({str(error)[:80]})")


def parse_object(text: bytes | str) -> dict[str, Any]:
  """Returns a JSON object; see `parse_json`."""
  value = parse_json(text)
  if not isinstance(value, dict):
    raise RecordError("broken_json", "not a JSON object")
  return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) < len(pairs):
    seen: set[str] = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))
    raise RecordError("duplicate_key", f"the key {twice[:40]!r} stands twice in an object")
  return value


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def is_conversation(names: Iterable[str]) -> bool:
  """Whether an object or a table may hold conversations, which a picture can belong to, by its keys."""
  return bool(spelled(names, (*CONVERSATIONS, "question")))


def text_keys(task: str) -> tuple[str, ...]:
  """Returns the keys that may hold the text of a record, see `make_record`."""
  return {
    "understanding": (*CONVERSATIONS, *CAPTIONS, "question"),
    "generation": CAPTIONS,
    "text": (*CONVERSATIONS, *DOCUMENTS, "question"),
  }[task]


def spelled(names: Iterable[str], keys: Sequence[str]) -> str:
  """Returns the first of the usual keys that is among names, as it is spelled there, or ""."""
  there = {name.lower(): name for name in names}
  there |= {name: name for name in names if name == name.lower()}
  return next((there[key] for key in keys if key in there), "")


def require_text(path: str, names: Sequence[str], task: str, what: str) -> None:
  """Checks that a table has a column of texts under a usual name.

  Raises:
    UserError: it has none.
  """
  if not spelled(names, text_keys(task)):
    raise UserError(f"{path} has no {what} of texts: name it by --text_column, one of {', '.join(names)}")


def _first(fields: Mapping[str, Any], keys: Sequence[str]) -> Any:
  found = next((fields[key] for key in keys if fields.get(key) is not None), None)
  if found is None:
    lower = {name.lower(): value for name, value in fields.items() if value is not None}
    found = next((lower[key] for key in keys if key in lower), None)
  return found


def _listed(keys: Sequence[str]) -> str:
  return " or ".join(f'"{key}"' for key in keys)


def _from_list(name: str, values: Sequence[Any], images: tuple[Any, ...], task: str) -> Record:
  """Returns the record of a list: turns, pairs of question and answer, or an interleaved document."""
  if not values:
    raise RecordError("no_answer", "the conversation is empty")
  if any(value is None for value in values) and all(value is None or isinstance(value, str) for value in values):
    _check_parts(images, task)
    return Record(name, images, "\n\n".join(IMAGE_MARK if v is None else v for v in values), ())
  turns, shown = [], False
  for value in values:
    if isinstance(value, (list, tuple)) and len(value) == 2:  # as `prepare` writes them
      value = {"from": value[0], "value": value[1]}
    if not isinstance(value, Mapping):
      raise RecordError("bad_turns", "a turn should be an object")
    if isinstance(value.get("user"), str) and isinstance(value.get("assistant"), str):
      marks = "" if turns or IMAGE_MARK in value["user"] else IMAGE_MARK * len(images)
      turns += [Turn("user", marks + value["user"]), Turn("assistant", value["assistant"])]
      continue
    role, said = (next((value[k] for k in keys if value.get(k) is not None), None) for keys in _TURN)
    text, image = _content(said)
    shown = shown or image
    if not isinstance(role, str) or text is None:
      raise RecordError("bad_turns", 'a turn should hold "from" ("human" or "gpt") and "value", both text')
    role = role.strip().lower()
    if role == "system" and not text.strip():
      continue
    if role == "system":
      raise RecordError("bad_turns", "a system turn is not learned from: leave it out, or put it into the question")
    if role not in _ROLES:
      raise RecordError("bad_turns", f'a turn is of "human" or "gpt" (or user, assistant, ...), not {role[:40]!r}')
    turns.append(Turn(_ROLES[role], text))
  if shown:
    _check_parts(images, task)
  return Record(name, images, "", tuple(turns))


def _check_parts(images: tuple[Any, ...], task: str) -> None:
  """Checks that a record has images where its text is made of parts of which one is an image."""
  if not images and task == "text":
    raise Unwanted("with_images", "a record with an image is no text")
  if not images:
    raise RecordError("image_count", "a part of the text is an image, and the record names none")


def _content(value: Any) -> tuple[str | None, bool]:
  """Returns the text of a turn, None where it has another form, and whether an image is a part of it.

  The text is as it is, or put together from a list of {"type": "text" or "image"}.
  """
  if isinstance(value, str):
    return value, False
  if not isinstance(value, (list, tuple)) or not all(isinstance(piece, Mapping) for piece in value):
    return None, False
  pieces, image = [], False
  for piece in value:
    kind = piece.get("type")
    kind = kind.lower().removesuffix("_url") if isinstance(kind, str) else ""
    check_media({kind: kind or None, **piece})
    if kind == "image":
      image = True
      pieces.append(IMAGE_MARK)
    elif isinstance(piece.get("text"), str):
      pieces.append(piece["text"])
    else:
      return None, False
  return "".join(pieces), image
