"""JSON objects and table rows as records: which keys hold the text, and in what forms."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jflow.data.examples import IMAGE_MARK
from jflow.data.records import Record, RecordError, Turn
from jflow.errors import UserError

IMAGES = ("image", "images")
CONVERSATIONS = ("conversations", "messages", "texts")
CAPTIONS = ("caption", "text", "prompt", "description")
DOCUMENTS = ("text", "content", "document")

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_MAX_NOTE = 1000  # characters of a value that is kept as metadata


def make_record(
  name: str, fields: Mapping[str, Any], images: tuple[bytes, ...], task: str, column: str = ""
) -> Record:
  """Returns the record of an object whose images were read.

  Args:
    name: the record's id.
    fields: the object. What holds its text, by task; the first that is there counts:
      understanding  a conversation (`CONVERSATIONS`); "question" and "answer"; a caption (`CAPTIONS`), which with
                     image marks in it is an interleaved document
      generation     a caption
      text           a conversation; a document (`DOCUMENTS`)
    images: encoded.
    task: "understanding", "generation" or "text".
    column: the key to take instead of the usual ones.

  Raises:
    RecordError: no key holds text, or it has the wrong form.
  """
  keys = (column,) if column else (DOCUMENTS if task == "text" else CAPTIONS)
  if task != "generation":
    value = _first(fields, (column,) if column else CONVERSATIONS)
    if isinstance(value, str) and value.lstrip().startswith("[") and not column:
      value = parse_json(value)
    if isinstance(value, (list, tuple)):
      return _from_list(name, value, images)
    if value is not None and not column:
      raise RecordError(
        "bad_field", f"the conversation should be a list of turns, not {type(value).__name__}"
      )
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


def notes(fields: Mapping[str, Any], leave_out: Iterable[str] = ()) -> dict[str, Any]:
  """Returns what is kept of an object as metadata: numbers and short strings, without its text."""
  without = {*IMAGES, *CONVERSATIONS, *CAPTIONS, *DOCUMENTS, "question", "answer", "id", *leave_out}
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
    RecordError: it is not UTF-8 ("invalid_utf8"), not JSON ("broken_json"), or an object in it names a key twice
      ("duplicate_key"), where readers differ in what they take.
  """
  try:
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    return json.loads(text, object_pairs_hook=_object)
  except UnicodeDecodeError:
    raise RecordError("invalid_utf8", "not valid UTF-8") from None
  except (ValueError, RecursionError) as error:
    raise RecordError("broken_json", f"not valid JSON ({str(error)[:80]})") from None


def parse_object(text: bytes | str) -> dict[str, Any]:
  """Returns a JSON object; see `parse_json`."""
  value = parse_json(text)
  if not isinstance(value, dict):
    raise RecordError("broken_json", "not a JSON object")
  return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    raise RecordError("duplicate_key", f"the key {twice[:40]!r} stands twice in an object")
  return value


def text_keys(task: str) -> tuple[str, ...]:
  """Returns the keys that may hold the text of a record, see `make_record`."""
  return {
    "understanding": (*CONVERSATIONS, *CAPTIONS, "question"),
    "generation": CAPTIONS,
    "text": (*CONVERSATIONS, *DOCUMENTS, "question"),
  }[task]


def spelled(names: Iterable[str], keys: Sequence[str]) -> str:
  """Returns the first of the usual keys that is among names, as it is spelled there ("TEXT"); "" where none is."""
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


def _from_list(name: str, values: Sequence[Any], images: tuple[bytes, ...]) -> Record:
  """Returns the record of a list: turns, pairs of question and answer, or an interleaved document."""
  if not values:
    raise RecordError("no_answer", "the conversation is empty")
  if all(value is None or isinstance(value, str) for value in values) and None in values:
    return Record(name, images, "\n\n".join(IMAGE_MARK if v is None else v for v in values), ())
  turns = []
  for value in values:
    if not isinstance(value, Mapping):
      raise RecordError("bad_turns", "a turn should be an object")
    if isinstance(value.get("user"), str) and isinstance(value.get("assistant"), str):
      marks = "" if turns or IMAGE_MARK in value["user"] else IMAGE_MARK * len(images)
      turns += [Turn("user", marks + value["user"]), Turn("assistant", value["assistant"])]
      continue
    role = value.get("from", value.get("role"))
    text = _content(value.get("value", value.get("content")))
    if role == "system":
      raise RecordError(
        "bad_turns", "a system turn is not learned from: leave it out, or put it into the question"
      )
    if role not in _ROLES or text is None:
      raise RecordError("bad_turns", 'a turn should hold "from" ("human" or "gpt") and "value"')
    turns.append(Turn(_ROLES[role], text))
  return Record(name, images, "", tuple(turns))


def _content(value: Any) -> str | None:
  """Returns the text of a turn: as it is, or put together from a list of {"type": "text" or "image"}."""
  if isinstance(value, str):
    return value
  if not isinstance(value, (list, tuple)) or not all(isinstance(piece, Mapping) for piece in value):
    return None
  pieces = []
  for piece in value:
    if piece.get("type") == "image":
      pieces.append(IMAGE_MARK)
    elif isinstance(piece.get("text"), str):
      pieces.append(piece["text"])
    else:
      return None
  return "".join(pieces)
