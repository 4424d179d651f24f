"""The tasks of an evaluation, one per sample: a question to answer, an image to generate, a loss to compute."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jflow import outputs
from jflow.data.records import Record


class Question(NamedTuple):
  """A question about images."""

  key: str
  text: str  # the user's turn, with one mark where all images stand
  images: Callable[[], Sequence[Any]]  # reads them; called when the question is asked
  system: str = ""
  max_tokens: int = 512


class Generation(NamedTuple):
  """An image to generate."""

  key: str
  prompt: str
  seed: int  # of its noise
  file: str  # path of the PNG inside the output directory


class RoundTrip(NamedTuple):
  """An image to encode and decode as the model does to write images: an upper bound for generated ones."""

  key: str
  picture: Callable[[int], np.ndarray]  # side in pixels -> uint8[side, side, 3]
  file: str


class Loss(NamedTuple):
  """A record whose loss is computed as in training: of the answers or the text, or of the image to write."""

  key: str
  record: Callable[[], Record]
  task: str  # of batch.TASKS
  seed: int  # of the times and the noise


Task = Question | Generation | RoundTrip | Loss


def save(image: Image.Image, path: pathlib.Path) -> None:
  """Writes a PNG atomically.

  Raises:
    Stopped: the file cannot be written.
  """
  with outputs.new_file(path) as new:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(new, "PNG")
