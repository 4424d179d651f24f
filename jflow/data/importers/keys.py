"""The usual keys of JSON objects, and columns of tables, for images and text."""

from collections.abc import Iterable, Sequence

from jflow.errors import UserError

IMAGES = ("image", "images")
CONVERSATIONS = ("conversations", "messages", "texts")
CAPTIONS = ("caption", "text", "prompt", "description")
DOCUMENTS = ("text", "content", "document")
TEXTS = {*CONVERSATIONS, *CAPTIONS, *DOCUMENTS, "question", "answer", "id"}


def is_conversation(names: Iterable[str]) -> bool:
  """Whether the keys of an object or a table may be those of conversations, which may have images."""
  return bool(spelled(names, (*CONVERSATIONS, "question")))


def text_keys(task: str) -> tuple[str, ...]:
  """Returns the keys that may hold the text of a record, see `make_record`."""
  return {
    "understanding": (*CONVERSATIONS, *CAPTIONS, "question"),
    "generation": CAPTIONS,
    "text": (*CONVERSATIONS, *DOCUMENTS, "question"),
  }[task]


def spelled(names: Iterable[str], keys: Sequence[str]) -> str:
  """Returns the first of the usual keys among the names, in their spelling, or ""."""
  there = {name.lower(): name for name in names}
  there |= {name: name for name in names if name == name.lower()}
  return next((there[key] for key in keys if key in there), "")


def require_text(path: str, names: Sequence[str], task: str, what: str) -> None:
  """Checks that a table has a column of texts under a usual name.

  Raises:
    UserError: there is none.
  """
  if not spelled(names, text_keys(task)):
    raise UserError(f"{path} has no {what} of texts: name it by --text_column, one of {', '.join(names)}")
