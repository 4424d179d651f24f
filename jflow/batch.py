"""Every array that crosses from data to model: name, shape, dtype, meaning. Numpy only.

Legend: B rows, S tokens of a row, M image slots of a row, K = 1 + P slots that an image takes in the
row, P patches of an image, H x W pixels, h x w latents of C channels.

A row packs whole samples; each sample is a segment of its own: attention never leaves it and positions
restart at 0. An image takes K = 1 + P consecutive slots, whether read or written:

  reading:  the learned start vector (in the slot of the begin-of-image token), then P SigLIP features
  writing:  the time token (in the slot of the prompt's closing begin-of-generation tag), then P latent patches
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from ml_dtypes import bfloat16

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
  moments: tuple[int, ...] = (0,)  # (h, w, 2 C) where latents were made ahead of time; nothing where they were not

  @property
  def image_slots(self) -> int:
    """K: slots of the row that one image takes."""
    return 1 + self.image_patches


class Batch(NamedTuple):
  """A batch of packed rows. A pytree, so that it can be jitted over, sharded along axis 0 and scanned."""

  tokens: np.ndarray  # int32[B, S]; ids; at image slots the value is not read by the model
  targets: np.ndarray  # int32[B, S]; the id that the position should predict; read where loss_mask holds
  loss_mask: np.ndarray  # bool[B, S]; positions that carry the next-token loss (eq. 6)
  positions: np.ndarray  # int32[B, S]; position inside the sample, for RoPE
  segment_ids: np.ndarray  # int32[B, S]; 1, 2, ... per sample of the row; 0 is padding
  image_index: np.ndarray  # int32[B, S]; index into the row's [M * K] image slots; -1 where a token stands
  images: np.ndarray  # uint8[B, M, H, W, 3]; RGB; zeros where image_kind is NONE
  image_start: np.ndarray  # int32[B, M]; position in the row of the image's first slot; 0 where NONE
  image_kind: np.ndarray  # int32[B, M]; NONE, READ or WRITE
  # bfloat16[B, M, h, w, 2 C]; mean and log variance of the VAE's posterior, not scaled, of images to write;
  # bfloat16[B, M, 0] where the step runs the VAE itself
  moments: np.ndarray


def need_memory(rows: int, shape: RowShape, count: int) -> None:
  """Checks that this machine can hold `count` batches of so many rows, before one is made.

  Raises:
    UserError: it cannot.
  """
  moments = 2 * math.prod(shape.moments)
  row = shape.tokens * (5 * 4 + 1) + shape.images * (3 * shape.image_size**2 + 2 * 4 + moments)
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
    moments=np.zeros((b, m, *shape.moments), bfloat16),
  )
