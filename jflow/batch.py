"""Every array that crosses from data to model: name, shape, dtype, meaning. Numpy only.

Legend: B rows, S tokens of a row, M images of a row, K slots that an image has in the row, P patches of an image, H x W
pixels.

A row packs whole samples; each sample is a segment of its own: attention never leaves it and positions
restart at 0. An image takes consecutive slots, at most K:

  reading:  in the slot of the begin-of-image token what the reader has there (JanusFlow: a learned vector; Janus: the
            token's own embedding), then P SigLIP features
  writing:  the layout of its family (generation/); for flow the time token (in the slot of the prompt's closing
            begin-of-generation tag), then P latent patches
"""

import dataclasses
import math
from typing import NamedTuple

import ml_dtypes  # noqa: F401  (numpy knows bfloat16 by name)
import numpy as np

from jflow import memory
from jflow.errors import UserError

# Values of `Batch.image_kind`.
NONE, READ, WRITE = 0, 1, 2

# The three types of rows.
TASKS = ("understanding", "generation", "text")


@dataclasses.dataclass(frozen=True)
class RowShape:
  """The static sizes of a packed row."""

  tokens: int  # S
  images: int  # M
  image_patches: int  # P
  image_size: int  # H = W in pixels
  writer: str  # how images are written: a name of generation/base.py
  written_slots: int = 0  # slots that an image to write takes; 0: as many as one that is read
  stored: tuple[int, ...] = (0,)  # shape of an image's precomputed encoder output; empty where the step encodes
  stored_dtype: str = "uint8"
  written_patches: int = 0  # of an image to write; 0: as many as of one that is read

  @property
  def image_slots(self) -> int:
    """K: slots that every image has, whether it fills them or not."""
    return max(self.slots_of(READ), self.slots_of(WRITE))

  def patches_of(self, task: str) -> int:
    """Patches of an image in a sample of a task."""
    return self.written_patches if task == "generation" and self.written_patches else self.image_patches

  def slots_of(self, kind: int) -> int:
    """Slots that an image of this kind (READ or WRITE) takes."""
    return self.written_slots if kind == WRITE and self.written_slots else 1 + self.image_patches


class Batch(NamedTuple):
  """A batch of packed rows. A pytree, so that it can be jitted over, sharded along axis 0 and scanned."""

  tokens: np.ndarray  # int32[B, S]; ids; at image slots the value is not read by the model
  targets: np.ndarray  # int32[B, S]; the id that the position predicts; read only where loss_mask holds
  loss_mask: np.ndarray  # bool[B, S]; positions that carry the next-token loss (eq. 6)
  positions: np.ndarray  # int32[B, S]; position inside the sample, for RoPE
  segment_ids: np.ndarray  # int32[B, S]; 1, 2, ... per sample of the row; 0 is padding
  image_index: np.ndarray  # int32[B, S]; index into the row's [M * K] image slots; -1 where a token stands
  images: np.ndarray  # uint8[B, M, H, W, 3]; RGB; zeros where image_kind is NONE
  image_start: np.ndarray  # int32[B, M]; position in the row of the image's first slot; 0 where NONE
  image_kind: np.ndarray  # int32[B, M]; NONE, READ or WRITE
  # [B, M, ...]; precomputed output of the writer's encoder for images to write (`generation.base.Stored`: for flow the
  # VAE's posterior, for codes uint16[B, M, P]); [B, M, 0] where the step runs the encoder
  stored: np.ndarray


def need_memory(rows: int, shape: RowShape, count: int) -> None:
  """Checks that this machine can hold `count` batches of so many rows, before one is made.

  Raises:
    UserError: it cannot.
  """
  stored = np.dtype(shape.stored_dtype).itemsize * math.prod(shape.stored)
  row = shape.tokens * (5 * 4 + 1) + shape.images * (3 * shape.image_size**2 + 2 * 4 + stored)
  needed, there = count * rows * row, memory.limit()
  if needed > there:
    raise UserError(
      f"{count} batches of {rows:,} rows of {shape.tokens:,} tokens and {shape.images:,} images take "
      f"{needed / 2**30:,.0f} GiB, and this machine has {there / 2**30:,.0f}: train.batch_size, data.row_tokens, "
      "data.row_images, data.workers or data.prefetch must be smaller"
    )


def empty(rows: int, shape: RowShape) -> Batch:
  """Returns a batch of `rows` rows that hold only padding."""
  b, s, m, h = rows, shape.tokens, shape.images, shape.image_size
  return Batch(
    tokens=np.zeros((b, s), np.int32),
    targets=np.zeros((b, s), np.int32),
    loss_mask=np.zeros((b, s), bool),
    positions=np.zeros((b, s), np.int32),
    segment_ids=np.zeros((b, s), np.int32),
    image_index=np.full((b, s), -1, np.int32),
    images=np.zeros((b, m, h, h, 3), np.uint8),
    image_start=np.zeros((b, m), np.int32),
    image_kind=np.zeros((b, m), np.int32),
    stored=np.zeros((b, m, *shape.stored), shape.stored_dtype),
  )
