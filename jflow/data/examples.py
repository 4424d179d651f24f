"""Token sequences of records, for training, and of prompts, for inference, by the same layouts.

Legend: n tokens of a sample, P patches of an image.

  reading an image    BOI image*P EOI          the model takes BOI's slot for its start vector
  understanding       BOS <image>QUESTION ANSWER EOS
    plain caption     BOS <image>Generate the caption of this picture. CAPTION EOS
    chat, pro         BOS User: <image>...\\n\\nAssistant: ANSWER EOS User: ...
    interleaved       BOS TEXT <image> TEXT <image> ... EOS
  generation          BOS PROMPT IMAGE           the image's tokens are its family's (generation/): flow T z*P, codes BOI c*P
    chat, pro         BOS User: PROMPT\\n\\nAssistant: IMAGE
  text                BOS DOCUMENT EOS

The loss covers the answers, captions and documents with their EOS, not the user's turns and no image. Not in the paper:
of an interleaved document it covers all the text.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jflow import batch as batch_lib
from jflow.data import templates
from jflow.data.records import Record, RecordError, Turn
from jflow.data.templates import ASSISTANT, USER, Speaker
from jflow.data.tokenizer import SPEAKERS, SPECIAL_TOKENS, Tokenizer
from jflow.errors import PromptTooLong, UserError
from jflow.generation.base import Layout, Written

IMAGE_MARK = "<image>"
MARKS = (IMAGE_MARK, SPECIAL_TOKENS["image"])  # the second is the published code's
CAPTION_PROMPT = "Generate the caption of this picture."
# The release's default system prompt.
SYSTEM_PROMPT = (
  "You are a helpful language and vision assistant. You are able to understand the visual content that the "
  "user provides, and assist the user with a variety of tasks using natural language."
)

# Other names of the speakers: OpenAI's of the system, those that Janus-Pro's examples use.
_ROLES = {"developer": "system"} | {token.lower(): role for role, token in SPEAKERS.items()}

# Possessive, and never from the middle of a run, so that matching takes linear time.
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++[\"')\]]*+(?=\s|$)|[。！？]++|\n")
_THREE_WORDS = re.compile(r"\s*+\S++\s++\S++\s++\S")


class Sample(NamedTuple):
  """A training sequence, its images not yet decoded."""

  tokens: np.ndarray  # int32[n]
  targets: np.ndarray  # int32[n]; tokens moved by one
  loss_mask: np.ndarray  # bool[n]; where the next token is learned
  positions: np.ndarray  # int32[n]
  image_starts: tuple[int, ...]  # first slot of each image
  image_kinds: tuple[int, ...]  # batch.READ or batch.WRITE
  images: tuple[Any, ...]  # as in Record
  stored: tuple[np.ndarray, ...] = ()  # see Batch.stored, per image, where it is precomputed


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


def build(
  record: Record,
  task: str,
  tokenizer: Tokenizer,
  template: str,
  image_patches: int,
  rng: np.random.Generator | None = None,
  first_sentence: float = 0.0,
  prompt_drop: float = 0.0,
  layout: Layout | None = None,
  caption_prompt: str = CAPTION_PROMPT,
) -> Sample:
  """Returns the training sequence of a record.

  Without `rng` it is the longest sequence that the record can give, for planning rows.

  Args:
    record: the record.
    task: "understanding", "generation" or "text".
    tokenizer: see `Tokenizer`.
    template: of `templates.TEMPLATES`.
    image_patches: P.
    rng: for the two probabilities below.
    first_sentence: probability that generation keeps only the caption's first sentence.
    prompt_drop: probability that generation drops the prompt; see `generation.base.Layout`.
    layout: where an image to write stands, of its family (generation/); None for a task that writes none.
    caption_prompt: what asks for the caption of a picture that comes without a question.

  Raises:
    RecordError: the record does not fit its task.
  """
  check(record, task)
  mark = IMAGE_MARK if record.images else ""
  try:
    if task == "generation":
      caption, drop = _caption(record.text.strip(), rng, first_sentence, prompt_drop)
      if layout is None:
        raise TypeError("the layout of an image to write is missing")
      prompt = generation_prompt(caption, template, tokenizer)
      return _written(layout.sequence(prompt, drop, tokenizer, image_patches), record, tokenizer)
    sequence = _Sequence(tokenizer, image_patches, template)
    if not record.turns and (task == "text" or IMAGE_MARK in record.text):
      _document(sequence, record.text, mark)
    else:
      _conversation(sequence, record.turns or _caption_turns(record, template, caption_prompt), mark)
    return sequence.sample(record.images)
  except UserError as error:
    raise RecordError("invalid_utf8", str(error)) from None


def check(record: Record, task: str) -> None:
  """Checks that a record has the images and text of its task; the images are not opened.

  Where the record has no image, `<image>` is text.

  Raises:
    RecordError: something is missing or left over.
  """
  if task == "generation":
    if len(record.images) != 1:
      raise RecordError("image_count", f"a generation record has one image, not {len(record.images)}")
  elif task == "understanding":
    if not record.images:
      raise RecordError("image_count", "an understanding record has at least one image")
  elif record.images:
    raise RecordError("image_count", f"a text record has no image, and this one has {len(record.images)}")
  if record.turns and task != "generation":
    if record.turns[-1].role != "assistant":
      raise RecordError("no_answer", "the conversation has no answer to its last question")
    _check_turns(record.turns, len(record.images), IMAGE_MARK if record.images else "")
  elif not (record.text.replace(IMAGE_MARK, "") if record.images else record.text).strip():
    raise RecordError("empty_text" if task == "text" else "empty_caption", "the text is empty")
  elif task == "understanding" and IMAGE_MARK in record.text:
    _check_marks(record.text.count(IMAGE_MARK), len(record.images), IMAGE_MARK)


def learnable(turns: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], list[str]]:
  """Returns the turns to train on, as LLaVA selects them, and the names of those that were left out.

  A conversation that begins with the assistant loses that turn ("first_answer"), one that ends with the user its last
  question ("last_question"). A single turn is kept, although there is nothing in it to train on.
  """
  left_out = []
  if len(turns) > 1 and turns[0].role == "assistant":
    turns, left_out = turns[1:], ["first_answer"]
  if len(turns) > 1 and turns[-1].role == "user":
    turns, left_out = turns[:-1], [*left_out, "last_question"]
  return turns, left_out


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
    _check_marks(sum(turn.text.count(mark) for turn in turns), image_count, mark)
  except RecordError as error:
    raise UserError(f"the conversation cannot be read: {error}") from None
  sequence = _Sequence(tokenizer, image_patches, template)
  _conversation(sequence, turns, mark)
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


def first_sentence_of(caption: str) -> str:
  """Returns a caption's first sentence.

  It ends at . ! ? before white space, at their Chinese forms, or at a line break, and has at least three
  words (or Chinese punctuation), so that "St. Peter's in Rome." stays whole.
  """
  words = _THREE_WORDS.match(caption)
  enough = words.end() if words else len(caption) + 1
  for match in _SENTENCE_END.finditer(caption):
    if match.end() >= enough or match.group()[0] in "。！？":
      return caption[: match.end()].strip()
  return caption.strip()


class _Sequence:
  """A builder of a sequence: its tokens, their loss mask, and the slots of images."""

  def __init__(self, tokenizer: Tokenizer, image_patches: int, template: str):
    self.tokenizer, self.template = tokenizer, template
    self.image_patches = image_patches
    self.tokens = [tokenizer.bos]
    self.learned = [False]
    self.image_starts: list[int] = []

  def add(self, ids: Sequence[int], learned: bool = False) -> None:
    self.tokens.extend(ids)
    self.learned.extend([learned] * len(ids))

  def text(self, *pieces: str | Speaker, learned: bool = False) -> None:
    self.add(templates.encode(self.template, self.tokenizer, *pieces), learned)

  def image(self) -> None:
    self.image_starts.append(len(self.tokens))
    self.add([self.tokenizer.image_start] + [self.tokenizer.image] * self.image_patches)
    self.add([self.tokenizer.image_end])

  def sample(self, images: tuple[Any, ...]) -> Sample:
    """The finished sequence of a record without an image to write."""
    tokens = np.asarray(self.tokens, np.int32)
    positions = np.arange(len(tokens), dtype=np.int32)
    targets = np.append(tokens[1:], np.int32(self.tokenizer.pad))
    loss_mask = np.append(np.asarray(self.learned[1:], bool), False)
    kinds = (batch_lib.READ,) * len(self.image_starts)
    return Sample(tokens, targets, loss_mask, positions, tuple(self.image_starts), kinds, images)


def _caption(
  caption: str, rng: np.random.Generator | None, first_sentence: float, prompt_drop: float
) -> tuple[str, bool]:
  """Returns the caption, perhaps shortened, and whether the prompt is dropped."""
  shorten, drop = (False, False) if rng is None else rng.random(2) < (first_sentence, prompt_drop)
  return first_sentence_of(caption) if shorten else caption, bool(drop)


def _written(written: Written, record: Record, tokenizer: Tokenizer) -> Sample:
  """Returns the sample of a prompt and its image; none of its tokens carries the text loss."""
  tokens = written.tokens
  targets = np.append(tokens[1:], np.int32(tokenizer.pad))
  nothing = np.zeros(len(tokens), bool)
  start = (written.image_start,)
  return Sample(tokens, targets, nothing, written.positions, start, (batch_lib.WRITE,), record.images)


def _caption_turns(record: Record, template: str, caption_prompt: str) -> tuple[Turn, ...]:
  """Returns the turns of a caption record: the papers' request, and the caption as its answer."""
  between = "" if template == "plain" else "\n"
  request = IMAGE_MARK * len(record.images) + between + caption_prompt
  return Turn("user", request), Turn("assistant", record.text)


def _check_turns(turns: Sequence[Turn], image_count: int, mark: str) -> None:
  for index, turn in enumerate(turns):
    if turn.role != ("user", "assistant")[index % 2]:
      raise RecordError("bad_turns", "the turns must alternate between user and assistant, the user first")
    if turn.role == "assistant":
      if not turn.text.strip():
        raise RecordError("no_answer", "an answer is empty")
      if mark and mark in turn.text:
        raise RecordError("image_marks", f"{mark} is in an answer, and only a question can have an image")
  if mark:
    _check_marks(sum(turn.text.count(mark) for turn in turns), image_count, mark)


def _check_marks(marks: int, image_count: int, mark: str) -> None:
  if marks != image_count:
    raise RecordError("image_marks", f"it has {marks} {mark} marks and {image_count} images; use one mark per image")


def _document(sequence: _Sequence, text: str, mark: str) -> None:
  """Adds a document, all of it with loss; its image marks, if any, become images."""
  pieces = text.strip().split(mark) if mark else [text.strip()]
  for number, piece in enumerate(pieces):
    if number:
      sequence.image()
    sequence.text(piece, learned=True)
  sequence.add([sequence.tokenizer.eos], learned=True)


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


def _conversation(sequence: _Sequence, turns: Sequence[Turn], mark: str) -> None:
  """Adds turns, with loss on each answer and its EOS. A last question is left open for its answer.

  `mark` is empty where no mark stands for an image.

  A question and its answer are tokenized separately, so that training and inference split the ids at the same place.
  """
  chat, asked = sequence.template != "plain", False
  for turn in turns:
    text = turn.text.strip()
    if turn.role == "system":
      sequence.text(text + "\n\n")
      continue
    if turn.role == "assistant":
      if chat and not asked:
        sequence.text(ASSISTANT, ":")
      if text:
        sequence.text(" " + text, learned=True)
      sequence.add([sequence.tokenizer.eos], learned=True)
      asked = False
      continue
    pieces = text.split(mark) if mark else [text]
    for number, piece in enumerate(pieces):
      if number:
        sequence.image()
      if not chat:
        sequence.text(piece.strip())
        continue
      opening = () if number else (USER, ": ")
      closing = ("\n\n", ASSISTANT, ":") if number + 1 == len(pieces) else ()
      sequence.text(*opening, piece, *closing)
    asked = True


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
