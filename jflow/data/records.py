"""The records of a data source, with their images still encoded."""

import hashlib
from typing import Any, NamedTuple, Protocol

import numpy as np

DIGITS = 16  # of an image's SHA-256 in hex, as `digest` returns it


class Turn(NamedTuple):
  """One turn of a conversation."""

  role: str  # "user" or "assistant"
  text: str  # a user's turn may hold "<image>" marks, one per image, in the order of `Record.images`


class Record(NamedTuple):
  """One record of a source.

  task            images   text               turns
  understanding   1..n     "" or the caption  questions and answers, or () where the caption is the answer
                  1..n     TEXT <image> TEXT  (): an interleaved document, one mark per image
  generation      1        the caption        ()
  text            none     the document       ()
  """

  id: str
  images: tuple[Any, ...]  # encoded bytes, uint8[H, W, 3], or an object with render(size) -> uint8[size, size, 3]
  text: str
  turns: tuple[Turn, ...]


def digest(image: Any) -> str:
  """The beginning of an image's SHA-256, of its bytes where it is encoded: it knows the image wherever it lies."""
  if isinstance(image, np.ndarray):
    image = str((image.dtype, image.shape)).encode() + image.tobytes()
  return hashlib.sha256(image if isinstance(image, bytes) else repr(image).encode()).hexdigest()[:DIGITS]


class Source(Protocol):
  """A source with random access to records. Picklable, since loader workers get a copy."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...


class RecordError(Exception):
  """A record that cannot be used: only it is left out, and counted under `reason`, one short word."""

  def __init__(self, reason: str, message: str):
    super().__init__(reason, message)
    self.reason = reason
    self.message = message

  def __str__(self) -> str:
    return self.message


class Unwanted(RecordError):
  """A sound record of another kind than the import takes, counted with those that filters drop.

  `reason` names the kind: "text_only", "with_images", "with_video", ...
  """
