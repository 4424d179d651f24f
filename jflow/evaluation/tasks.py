"""What an evaluation asks of a model, one sample at a time: a question to answer or a picture to paint."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jflow import outputs


class Question(NamedTuple):
  """A question about images."""

  key: str
  text: str  # the user's turn, with one mark where all images stand
  images: Callable[[], Sequence[Any]]  # reads them; called when the question is asked
  system: str = ""
  max_tokens: int = 512


class Painting(NamedTuple):
  """A picture to paint."""

  key: str
  prompt: str
  seed: int  # of its noise
  file: str  # path of the PNG inside the output directory


class RoundTrip(NamedTuple):
  """A picture to send through the VAE and back: no picture that the model paints can be better."""

  key: str
  picture: Callable[[int], np.ndarray]  # side in pixels -> uint8[side, side, 3]
  file: str


Task = Question | Painting | RoundTrip


def save(image: Image.Image, path: pathlib.Path) -> None:
  """Writes a PNG so that the path never holds half of one.

  Raises:
    Stopped: it cannot be written.
  """
  with outputs.new_file(path) as new:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(new, "PNG")
