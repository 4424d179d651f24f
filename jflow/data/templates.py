"""Templates of conversations: how a prompt and the turns of a conversation become tokens.

plain   no speakers; stages 1 and 2
chat    `User: QUESTION\\n\\nAssistant: ANSWER`, speakers as words; JanusFlow and Janus-1.3B
pro     the same with `<|User|>` and `<|Assistant|>`, a special token each; Janus-Pro
"""

import enum
from typing import Any

from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.generation.base import family

TEMPLATES = ("plain", "chat", "pro")


class Speaker(enum.Enum):
  """The place of a speaker's name in a text; the value is the tokenizer's attribute."""

  USER = "user"
  ASSISTANT = "assistant"


USER, ASSISTANT = Speaker.USER, Speaker.ASSISTANT
_WORDS = {USER: "User", ASSISTANT: "Assistant"}


def check(template: str, tokenizer: Tokenizer | None = None) -> None:
  """Raises UserError where the template is unknown, or the tokenizer lacks a token that it needs."""
  if template not in TEMPLATES:
    raise UserError(f"template {template!r} is unknown: use one of {', '.join(TEMPLATES)}")
  if template == "pro" and tokenizer is not None:
    tokenizer.need("template 'pro'", *(speaker.value for speaker in Speaker))


def encode(template: str, tokenizer: Tokenizer, *pieces: str | Speaker) -> list[int]:
  """Returns the ids of texts and speakers one after the other; what has no special token between is one text."""
  out, text = [], ""
  for piece in pieces:
    if isinstance(piece, str):
      text += piece
    elif template == "pro":
      out += tokenizer.encode(text) if text else []
      out, text = [*out, getattr(tokenizer, piece.value)], ""
    else:
      text += _WORDS[piece]
  return out + tokenizer.encode(text) if text else out


def check_fits(template: str, tokenizer: Tokenizer, model: Any) -> None:
  """Checks a tokenizer against the template and the config of the model that it is used with.

  Raises:
    UserError: it lacks a special token that either needs, or has ids that the model does not.
  """
  tokenizer.check_fits(model.language_model.vocab_size)
  tokenizer.need(f"model.generation.kind={model.generation.kind!r}", *family(model.generation).tokens)
  check(template, tokenizer)
