"""The held-out records of a run in packed rows: the same batches for every loss that is computed over them."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from jflow import batch as batch_lib
from jflow.batch import TASKS, Batch, RowShape
from jflow.config import DataConfig
from jflow.data import held_out, mixture
from jflow.data.rows import open_rows
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError


class HeldOut:
  """The batches of the held-out records, of each type that the mixture draws.

  Captions are whole and no prompt is dropped, whatever training does. All other choices, such as a random square, are
  those of the first epoch.
  """

  def __init__(
    self,
    config: DataConfig,
    tokenizer: Tokenizer,
    row_shape: RowShape,
    batch_size: int,
    seed: int,
    share: Sequence[int] | None = None,
  ):
    """Plans the rows; arguments as for `pipeline.Pipeline`.

    Raises:
      UserError: no record is held out.
    """
    self._shape, self._share = row_shape, list(range(batch_size) if share is None else share)
    _, schedule = mixture.without_empty(config.mixture, config.sources)
    plain = dataclasses.replace(config, first_sentence=0.0, prompt_drop=0.0)
    self.sources = [
      rows
      for task, drawn in zip(TASKS, mixture.drawn(schedule), strict=True)
      if drawn
      for rows in open_rows(plain, task, tokenizer, row_shape, seed, held_out.VALIDATION)
    ]
    # Row i of n of a source stands at (i + 1/2) / n of all rows, so that every batch holds the types by their shares.
    placed = [((i + 0.5) / rows.plan.rows, k, i) for k, rows in enumerate(self.sources) for i in range(rows.plan.rows)]
    if not placed:
      raise UserError(
        f"data.validation={config.validation} must be larger: it holds out none of "
        f"{sum(rows.planned.records for rows in self.sources):,} records"
      )
    chosen = sorted(placed)
    if len(chosen) > config.validation_rows:
      spread = np.linspace(0, len(chosen) - 1, config.validation_rows)
      chosen = [chosen[i] for i in spread.round().astype(int).tolist()]
    self.rows = len(chosen)
    self._batches = [
      [(k, i) for _, k, i in chosen[first : first + batch_size]] for first in range(0, self.rows, batch_size)
    ]
    self._batch_size = batch_size

  def report(self) -> list[str]:
    """Returns one line per source."""
    return [rows.report() for rows in self.sources]

  def most(self, shards: int, accumulation: int) -> tuple[int, ...]:
    """Returns what `pipeline.Pipeline.most` does, for these batches."""
    images = np.zeros(3, np.int64)
    for places in self._batches:
      held = np.zeros((self._batch_size, 3), np.int64)
      for place, (k, _) in enumerate(places):
        rows = self.sources[k]
        held[place, TASKS.index(rows.task)] = rows.most_images
      held[:, 2] = held[:, 0] + held[:, 1]  # of text there is none
      parts = held.reshape(shards, -1, accumulation, 3).sum(axis=1)
      images = np.maximum(images, parts.max(axis=(0, 1)))
    samples = max(1, *(rows.plan.most_pieces() for rows in self.sources))
    return (*(max(1, int(n)) for n in images), samples)

  @functools.cached_property
  def batches(self) -> tuple[list[Batch], list[str]]:
    """This host's shares of the batches, and what was left out of them. They are decoded once and stay in memory."""
    made, lost = [], []
    for places in self._batches:
      batch = batch_lib.empty(len(self._share), self._shape)
      for row, place in enumerate(self._share):
        if place < len(places):
          k, number = places[place]
          _, rejected = self.sources[k].fill(Batch(*(array[row] for array in batch)), number)
          lost += [message for _, message in rejected]
      made.append(batch)
    return made, lost

  def captions(self, count: int) -> list[str]:
    """Returns up to `count` different captions of held-out images to write."""
    return [caption for rows in self.sources if rows.task == "generation" for caption in rows.captions(count)][:count]
