"""Token sequences of records, for training, by the layouts of sequences.py.

The loss covers the answers, captions and documents with their EOS, not the user's turns and no image. Not in the paper:
of an interleaved document it covers all the text.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jflow import batch as batch_lib
from jflow.data import sequences
from jflow.data.prompts import generation_prompt
from jflow.data.records import Record, RecordError, Turn
from jflow.data.sequences import IMAGE_MARK
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.generation.base import Layout, Written

CAPTION_PROMPT = "Generate the caption of this picture."

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
    sequence = sequences.Sequence(tokenizer, image_patches, template)
    if not record.turns and (task == "text" or IMAGE_MARK in record.text):
      sequences.document(sequence, record.text, mark)
    else:
      sequences.conversation(sequence, record.turns or _caption_turns(record, template, caption_prompt), mark)
    return _read(sequence, record.images)
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
    sequences.check_marks(record.text.count(IMAGE_MARK), len(record.images), IMAGE_MARK)


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


def _read(sequence: sequences.Sequence, images: tuple[Any, ...]) -> Sample:
  """The sample of a finished sequence, of a record without an image to write."""
  tokens = np.asarray(sequence.tokens, np.int32)
  positions = np.arange(len(tokens), dtype=np.int32)
  targets = np.append(tokens[1:], np.int32(sequence.tokenizer.pad))
  loss_mask = np.append(np.asarray(sequence.learned[1:], bool), False)
  kinds = (batch_lib.READ,) * len(sequence.image_starts)
  return Sample(tokens, targets, loss_mask, positions, tuple(sequence.image_starts), kinds, images)


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
    sequences.check_marks(sum(turn.text.count(mark) for turn in turns), image_count, mark)
