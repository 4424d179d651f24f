"""Token sequences of prompts, for inference, by the layouts of training (sequences.py)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jflow.data import sequences, templates
from jflow.data.records import RecordError, Turn
from jflow.data.sequences import IMAGE_MARK
from jflow.data.templates import ASSISTANT, USER
from jflow.data.tokenizer import SPEAKERS, Tokenizer
from jflow.errors import PromptTooLong, UserError

# The release's default system prompt.
SYSTEM_PROMPT = (
  "You are a helpful language and vision assistant. You are able to understand the visual content that the "
  "user provides, and assist the user with a variety of tasks using natural language."
)
# Other names of the speakers: OpenAI's of the system, those that Janus-Pro's examples use.
_ROLES = {"developer": "system"} | {token.lower(): role for role, token in SPEAKERS.items()}


class Prompt(NamedTuple):
  """The prompt of an answer: tokens and the slots of its images."""

  tokens: np.ndarray  # int32[n]
  image_starts: tuple[int, ...]  # first slot of each image, that of BOI; the P features follow

  def image_mask(self, image_patches: int) -> np.ndarray:
    """Returns bool[n], the mask of the image slots, 1 + P each."""
    mask = np.zeros(len(self.tokens), bool)
    for start in self.image_starts:
      mask[start : start + 1 + image_patches] = True
    return mask


def chat_prompt(
  messages: Sequence[Turn | Mapping[str, Any]],
  image_count: int,
  tokenizer: Tokenizer,
  image_patches: int,
  template: str = "chat",
  system: str = "",
  mark: str = IMAGE_MARK,
  context: int | None = None,
) -> Prompt:
  """Returns the prompt for the next answer of a conversation.

  Its turns need not alternate, unlike those of a training record: see `_history`.

  Args:
    messages: turns, or mappings with "role" ("user", "assistant", "system" or "developer", in any case) and
      "content". The last one, system turns aside, is the user's; an assistant's turn with empty content may
      follow, as in the release's examples.
    image_count: number of images that come with the messages.
    tokenizer: see `Tokenizer`.
    image_patches: P.
    template: "chat" or "pro", or "plain" for a model that has seen stages 1 and 2 only.
    system: system prompt, put first; the release's own is `SYSTEM_PROMPT`.
    mark: the text that stands for an image in a user's turn.
    context: most tokens that the prompt may have; None is no limit.

  Raises:
    UserError: a role is unknown, the conversation does not end with a question, or the marks do not match
      the images.
    PromptTooLong: the prompt does not fit the context.
  """
  templates.check(template)
  turns = _history([Turn("system", system), *map(_as_turn, messages)])
  if turns and turns[-1].role == "assistant" and not turns[-1].text:
    turns.pop()
  if not turns or turns[-1].role != "user" or not turns[-1].text:
    raise UserError("a conversation must end with a question of the user")
  if any(mark in turn.text for turn in turns if turn.role != "user"):
    raise UserError(f"the conversation cannot be read: {mark} shows an image, only a question can hold one")
  try:
    sequences.check_marks(sum(turn.text.count(mark) for turn in turns), image_count, mark)
  except RecordError as error:
    raise UserError(f"the conversation cannot be read: {error}") from None
  sequence = sequences.Sequence(tokenizer, image_patches, template)
  sequences.conversation(sequence, turns, mark)
  _check_context(len(sequence.tokens), context)
  return Prompt(np.asarray(sequence.tokens, np.int32), tuple(sequence.image_starts))


def generation_prompt(text: str, template: str, tokenizer: Tokenizer, context: int | None = None) -> np.ndarray:
  """Returns the prompt of an image to generate, int32[n]: BOS and the text.

  The tag that closes the release's prompt is left out: it is the first slot of the image (by flow the time token).

  Args:
    text: the user's prompt.
    template: of `templates.TEMPLATES`.
    context: most tokens that the prompt may have; None is no limit.

  Raises:
    UserError: the text is empty or too long.
  """
  templates.check(template)
  text = text.strip()
  if not text:
    raise UserError("the prompt is empty: say what to paint")
  pieces = (text,) if template == "plain" else (USER, f": {text}\n\n", ASSISTANT, ":")
  ids = templates.encode(template, tokenizer, *pieces)
  _check_context(1 + len(ids), context)
  return np.asarray([tokenizer.bos] + ids, np.int32)


def _history(turns: Sequence[Turn]) -> list[Turn]:
  """Normalises a history of turns to the alternating order of the templates.

  Consecutive turns of one speaker are joined by line breaks. A system turn is put before the open question, else before
  the next turn; several of them are joined as paragraphs. An answer may be empty.
  """
  out: list[Turn] = []
  for turn in turns:
    text = turn.text.strip()
    if turn.role == "system":
      if not text:
        continue
      at = len(out) - (bool(out) and out[-1].role == "user")
      if at and out[at - 1].role == "system":
        out[at - 1] = Turn("system", f"{out[at - 1].text}\n\n{text}")
      else:
        out.insert(at, Turn("system", text))
    elif out and out[-1].role == turn.role:
      out[-1] = Turn(turn.role, "\n".join(filter(None, (out[-1].text, text))))
    else:
      out.append(Turn(turn.role, text))
  return out


def _as_turn(message: Turn | Mapping[str, Any]) -> Turn:
  try:
    said = isinstance(message, Turn)
    role, text = message if said else (message["role"], message["content"])
  except (KeyError, TypeError):
    raise UserError(f'a message must hold "role" and "content", got {message!r:.80}') from None
  role = str(role).lower()
  role = _ROLES.get(role, role)
  if role not in ("system", "user", "assistant"):
    raise UserError(f"the role of a turn must be system, developer, user or assistant, got {role[:40]!r}")
  if not isinstance(text, str):
    raise UserError(f'the "content" of a message must be text, got {message!r:.80}')
  return Turn(role, text)


def _check_context(length: int, context: int | None) -> None:
  if context is not None and length > context:
    raise PromptTooLong(f"the prompt has {length:,} tokens, and the context holds {context:,}: shorten it")
