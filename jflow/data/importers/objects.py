"""JSON objects and table rows as records: captions, documents, questions and conversations in their usual forms."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jflow.data.importers.json_texts import parse_json
from jflow.data.importers.keys import CAPTIONS, CONVERSATIONS, DOCUMENTS, IMAGES, TEXTS
from jflow.data.importers.media import check_media, images_of, part_kind
from jflow.data.records import Record, RecordError, Turn, Unwanted
from jflow.data.sequences import IMAGE_MARK

# Names of the two speakers in data sets, in lower case.
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
_TURN = ("from", "role"), ("value", "content")
_MAX_NOTE = 1000  # characters of a value that is kept as metadata


def make_record(name: str, fields: Mapping[str, Any], images: tuple[Any, ...], task: str, column: str = "") -> Record:
  """Builds the record of an object whose images are known.

  Args:
    name: the record's id.
    fields: the object. Keys of its text, by task; the first one present counts:
      understanding  a conversation (`CONVERSATIONS`); "question" and "answer"; a caption (`CAPTIONS`), which
                     with image marks in it is an interleaved document
      generation     a caption
      text           a conversation; a document (`DOCUMENTS`)
    images: for the record.
    task: "understanding", "generation" or "text".
    column: the key to take instead of the usual ones.

  Raises:
    Unwanted: the record has a medium that the task does not read.
    RecordError: no key holds text, or it has the wrong form.
  """
  check_media(fields, column, bool(images))
  if task == "text" and (images or images_of(fields, task)):
    raise Unwanted("with_images", "a record with an image is not text")
  keys = (column,) if column else (DOCUMENTS if task == "text" else CAPTIONS)
  if task != "generation":
    value = _first(fields, (column,) if column else CONVERSATIONS)
    if isinstance(value, str) and value.lstrip().startswith("[") and not column:
      value = parse_json(value)
    if isinstance(value, (list, tuple)) and (value or column or _first(fields, keys) is None):
      return _from_list(name, value, images, task)
    if value is not None and not column and not isinstance(value, (list, tuple)):
      raise RecordError("bad_field", f"the conversation must be a list of turns, got {type(value).__name__}")
    if not column and isinstance(fields.get("question"), str) and isinstance(fields.get("answer"), str):
      marks = "" if IMAGE_MARK in fields["question"] else IMAGE_MARK * len(images) + "\n" * bool(images)
      turns = Turn("user", marks + fields["question"]), Turn("assistant", fields["answer"])
      return Record(name, images, "", turns)
  text = _first(fields, keys)
  if text is None:
    reason = "missing_text" if task == "text" else "missing_caption"
    raise RecordError(reason, f"no text: {_listed(keys)} is missing")
  if not isinstance(text, str):
    raise RecordError("bad_field", f"{_listed(keys)} must be text, got {type(text).__name__}")
  return Record(name, images, text, ())


def name_of(fields: Mapping[str, Any], otherwise: Any) -> str:
  """Returns the id of an object, or the other name where it has none.

  Raises:
    RecordError: it is neither text nor a number.
  """
  name = fields.get("id")
  if name is not None and not isinstance(name, (str, int, float)):
    raise RecordError("bad_field", f'"id" must be text or a number, got {type(name).__name__}')
  return str(otherwise if name is None else name)


def notes(fields: Mapping[str, Any], leave_out: Iterable[str] = ()) -> dict[str, Any]:
  """Returns the metadata to keep of an object: numbers and short strings, without its text."""
  without = {*IMAGES, *TEXTS, *leave_out}
  kept = {}
  for key, value in fields.items():
    short = isinstance(value, str) and len(value) <= _MAX_NOTE
    number = isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))
    if key not in without and key.lower() not in without and (short or number):
      kept[key] = value
  return kept


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
      raise RecordError("bad_turns", "a turn must be an object")
    if isinstance(value.get("user"), str) and isinstance(value.get("assistant"), str):
      marks = "" if turns or IMAGE_MARK in value["user"] else IMAGE_MARK * len(images)
      turns += [Turn("user", marks + value["user"]), Turn("assistant", value["assistant"])]
      continue
    role, said = (next((value[k] for k in keys if value.get(k) is not None), None) for keys in _TURN)
    text, image = _content(said)
    shown = shown or image
    if not isinstance(role, str) or text is None:
      raise RecordError("bad_turns", 'a turn must hold "from" ("human" or "gpt") and "value", both text')
    role = role.strip().lower()
    if role == "system" and not text.strip():
      continue
    if role == "system":
      raise RecordError("bad_turns", "a system turn is not learned from: leave it out, or put it into the question")
    if role not in _ROLES:
      raise RecordError("bad_turns", f'a turn must be of "human" or "gpt" (or user, assistant, ...), got {role[:40]!r}')
    turns.append(Turn(_ROLES[role], text))
  if shown:
    _check_parts(images, task)
  return Record(name, images, "", tuple(turns))


def _check_parts(images: tuple[Any, ...], task: str) -> None:
  """Checks that a record has images where one of the parts of its text is an image."""
  if not images and task == "text":
    raise Unwanted("with_images", "a record with an image is not text")
  if not images:
    raise RecordError("image_count", 'a part of the text is an image, and neither it nor "images" names one')


def _content(value: Any) -> tuple[str | None, bool]:
  """Returns the text of a turn, None where it has another form, and whether an image is a part of it.

  The content is a text, or a list of {"type": "text" or "image"}, whose parts are joined.
  """
  if isinstance(value, str):
    return value, False
  if not isinstance(value, (list, tuple)) or not all(isinstance(piece, Mapping) for piece in value):
    return None, False
  pieces, image = [], False
  for piece in value:
    kind = part_kind(piece)
    check_media({kind: kind or None, **piece})
    if kind == "image":
      image = True
      pieces.append(IMAGE_MARK)
    elif isinstance(piece.get("text"), str):
      pieces.append(piece["text"])
    else:
      return None, False
  return "".join(pieces), image
