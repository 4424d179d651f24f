"""The sequence of an image written by flow: BOS PROMPT T z*P."""

from typing import Any

import numpy as np

from jflow.generation.base import Written


class FlowLayout:
  """The time token T in the slot of the prompt's closing tag, then the P latent patches.

  A dropped prompt keeps BOS at position 0 and T at its position after the full prompt: the same as the release's
  unconditional row, whose prompt is masked.
  """

  loss_from = 1  # the velocity is read at the patches

  def slots(self, patches: int) -> int:
    """T and the patches."""
    return 1 + patches

  def sequence(self, prompt: np.ndarray, drop: bool, tokenizer: Any, patches: int) -> Written:
    """See `Layout.sequence`."""
    image = np.asarray([tokenizer.generation_start] + [tokenizer.image] * patches, np.int32)
    kept = prompt[:1] if drop else prompt
    positions = np.append(np.arange(len(kept)), len(prompt) + np.arange(len(image)))
    return Written(np.append(kept, image), positions.astype(np.int32), len(kept))
