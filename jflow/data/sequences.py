"""Token sequences of conversations and documents, as training and inference lay them out alike.

Legend: n tokens of a sample, P patches of an image.

  reading an image    BOI image*P EOI          the model takes BOI's slot for its start vector
  understanding       BOS <image>QUESTION ANSWER EOS
    plain caption     BOS <image>Generate the caption of this picture. CAPTION EOS
    chat, pro         BOS User: <image>...\n\nAssistant: ANSWER EOS User: ...
    interleaved       BOS TEXT <image> TEXT <image> ... EOS
  generation          BOS PROMPT IMAGE           the image's tokens are its family's (generation/): flow T z*P, codes BOI c*P
    chat, pro         BOS User: PROMPT\n\nAssistant: IMAGE
  text                BOS DOCUMENT EOS
"""

from collections.abc import Iterable

from jflow.data import templates
from jflow.data.records import RecordError, Turn
from jflow.data.templates import ASSISTANT, USER, Speaker
from jflow.data.tokenizer import SPECIAL_TOKENS, Tokenizer

IMAGE_MARK = "<image>"
MARKS = (IMAGE_MARK, SPECIAL_TOKENS["image"])  # the second is the published code's


class Sequence:
  """A builder of a sequence: its tokens, their loss mask, and the slots of images."""

  def __init__(self, tokenizer: Tokenizer, image_patches: int, template: str):
    self.tokenizer, self.template = tokenizer, template
    self.image_patches = image_patches
    self.tokens = [tokenizer.bos]
    self.learned = [False]
    self.image_starts: list[int] = []

  def add(self, ids: Iterable[int], learned: bool = False) -> None:
    self.tokens.extend(ids)
    self.learned.extend([learned] * (len(self.tokens) - len(self.learned)))

  def text(self, *pieces: str | Speaker, learned: bool = False) -> None:
    self.add(templates.encode(self.template, self.tokenizer, *pieces), learned)

  def image(self) -> None:
    self.image_starts.append(len(self.tokens))
    self.add([self.tokenizer.image_start] + [self.tokenizer.image] * self.image_patches)
    self.add([self.tokenizer.image_end])


def document(sequence: Sequence, text: str, mark: str) -> None:
  """Adds a document, all of it with loss; its image marks, if any, become images."""
  pieces = text.strip().split(mark) if mark else [text.strip()]
  for number, piece in enumerate(pieces):
    if number:
      sequence.image()
    sequence.text(piece, learned=True)
  sequence.add([sequence.tokenizer.eos], learned=True)


def conversation(sequence: Sequence, turns: Iterable[Turn], mark: str) -> None:
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


def check_marks(marks: int, image_count: int, mark: str) -> None:
  """Raises RecordError unless there is one mark for each image."""
  if marks != image_count:
    raise RecordError("image_marks", f"it has {marks} {mark} marks and {image_count} images; use one mark per image")
