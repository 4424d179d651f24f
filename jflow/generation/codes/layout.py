"""The sequence of an image written by codes: BOS PROMPT BOI c*P."""

from typing import Any

import numpy as np

from jflow.generation.base import Written


class CodesLayout:
  """The begin-of-image token BOI, an ordinary token of the row, then the P codes, row by row from the top left.

  c_i is predicted one slot before its own, c_1 at BOI. The last code predicts nothing, but has its slot. A dropped
  prompt becomes pad tokens between BOS and BOI, which are attended to like words: length and positions stay.
  """

  loss_from = -1  # a code is predicted one position before its own

  def slots(self, patches: int) -> int:
    """The codes; BOI before them is a token."""
    return patches

  def sequence(self, prompt: np.ndarray, drop: bool, tokenizer: Any, patches: int) -> Written:
    """See `Layout.sequence`."""
    image = [tokenizer.image_start] + [tokenizer.image] * patches
    tokens = np.append(without(prompt, tokenizer.pad) if drop else prompt, image).astype(np.int32)
    return Written(tokens, np.arange(len(tokens), dtype=np.int32), len(prompt) + 1)


def without(prompt: np.ndarray, pad: int) -> np.ndarray:
  """The prompt int32[..., n] with pads after BOS: what the unconditional half of guidance reads."""
  return np.concatenate([prompt[..., :1], np.full_like(prompt[..., 1:], pad)], axis=-1)
