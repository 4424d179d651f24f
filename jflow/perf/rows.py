"""Packed rows of synthetic samples in the lengths of the paper's data, to measure the speed of a step."""

import numpy as np

from jflow.batch import READ, TASKS, WRITE, Batch, RowShape
from jflow.data.examples import Sample
from jflow.data.mixture import rows_per_task, spread
from jflow.data.packing import pack


def synthetic(rows: int, shape: RowShape, mixture: tuple[float, ...], vocabulary: int, seed: int = 0) -> Batch:
  """A batch of full rows, with tasks in the mixture's shares and interleaved as in training.

  An image to read has 200 tokens of question and answer around it (a loss on the answer), an image to generate a
  prompt of 73 before it, as many as the row has room for; a text fills its row.
  """
  rng = np.random.default_rng(seed)
  tasks, _ = spread(rows_per_task(mixture, rows))
  packed = [pack(_row(TASKS[task], shape, vocabulary, rng), shape) for task in tasks]
  return Batch(*map(np.stack, zip(*packed, strict=True)))


def most(batch: Batch, shards: int, accumulation: int) -> tuple[int, ...]:
  """The result of `Pipeline.most` for one batch."""
  masks = (batch.image_kind == READ, batch.image_kind == WRITE, batch.image_kind > 0)
  parts = (mask.sum(axis=1).reshape(shards, -1, accumulation).sum(axis=1) for mask in masks)
  return (*(max(1, int(part.max())) for part in parts), int(batch.segment_ids.max()))


def _row(task: str, shape: RowShape, vocabulary: int, rng: np.random.Generator) -> list[Sample]:
  text = {"understanding": 199, "generation": 73}.get(task, 0)
  text = min(text, shape.tokens - shape.image_slots)
  length = shape.image_slots + text if text else shape.tokens
  count = min(shape.tokens // length, shape.images) if text else 1
  return [_sample(task, text, length, shape, vocabulary, rng) for _ in range(max(count, 1))]


def _sample(task, text, length, shape: RowShape, vocabulary, rng) -> Sample:
  tokens = rng.integers(0, vocabulary, length).astype(np.int32)
  slots, size = np.arange(length), shape.image_size
  start = {"understanding": 1, "generation": text}.get(task)
  learned = {"text": slots >= 0, "generation": slots < 0}.get(task, slots >= min(1 + shape.image_slots, length - 1))
  images, kinds, starts = (), (), ()
  if start is not None:
    starts, kinds = (start,), (READ if task == "understanding" else WRITE,)
    images = (rng.integers(0, 256, (size, size, 3), np.uint8),)
  positions = slots.astype(np.int32)
  return Sample(tokens, np.roll(tokens, -1), learned, positions, starts, kinds, images)
