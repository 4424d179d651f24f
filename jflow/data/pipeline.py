"""The data pipeline: the batch of a step, a pure function of the step.

A step determines rows (mixture.py), a row its records (packing.py), and a record with its rng a sample (examples.py);
the images of a row are decoded last. There is no iterator state: a resumed run starts at its step. The result does not
depend on the number of hosts, workers and threads.
"""

import collections
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jflow import batch as batch_lib
from jflow.batch import TASKS, Batch, RowShape
from jflow.config import DataConfig
from jflow.data import mixture, processes
from jflow.data.rows import Piece, Rows, open_rows
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError

# The share of rejected records is computed over at least this many samples.
MIN_JUDGED = 1000


class Pipeline:
  """Packed batches of the three tasks."""

  def __init__(
    self,
    config: DataConfig,
    tokenizer: Tokenizer,
    row_shape: RowShape,
    batch_size: int,
    seed: int,
    share: Sequence[int] | None = None,
  ):
    """Opens the sources and plans their rows.

    Args:
      config: the section `data`.
      tokenizer: see `Tokenizer`.
      row_shape: sizes of a row.
      batch_size: rows of a batch over all hosts.
      seed: of all random choices.
      share: places of the batch that this host loads (`sharding.local_rows`); None: all of them.

    Raises:
      UserError: a field does not fit.
    """
    self._config = config
    self._shape = row_shape
    self._batch_size, self._share = batch_size, share
    if row_shape.tokens <= row_shape.image_slots:
      raise UserError(f"data.row_tokens is {row_shape.tokens}, too few for an image of {row_shape.image_slots} slots")
    rows = batch_size if share is None else len(share)
    ahead = max(1, config.workers) * (config.prefetch + 2)  # one is being made, and one in use
    batch_lib.need_memory(rows, row_shape, ahead)
    self._loaders: processes.Loaders | None = None
    if config.mixture:
      mixture.StepPlan(config.mixture, batch_size, 1)  # checks it
    self.notes, schedule = mixture.without_empty(config.mixture, config.sources)
    used = zip(TASKS, mixture.drawn(schedule), strict=True)
    self._weights = [[w for _, w in getattr(config.sources, task)] if drawn else [] for task, drawn in used]
    self._interleaves = [
      mixture.Interleave(weights, mixture.seed_of_part(seed, i)) if weights else None
      for i, weights in enumerate(self._weights)
    ]
    self._mixture = schedule or ((0, (1.0,) * len(TASKS)),)
    self._rows = [
      open_rows(config, task, tokenizer, row_shape, seed) if weights else []
      for task, weights in zip(TASKS, self._weights, strict=True)
    ]
    if not schedule:
      self._mixture = ((0, tuple(float(sum(one.plan.rows for one in listed)) for listed in self._rows)),)
      self.notes += [f"data.mixture: as many rows of each type as there are, {mixture.told(self._mixture)}"]
    if config.order == "blocks":
      self._read_in_blocks()

  def _read_in_blocks(self) -> None:
    """Orders the rows of all sources by `order.Blocks`."""
    window, lanes = self._config.block_window, self._config.block_lanes
    places = range(self._batch_size) if self._share is None else self._share
    own = len({place * lanes // self._batch_size for place in places})
    held = own * (window + 1) * sum(rows.cached_group_bytes for rows in self.sources()) / 2**30
    if held > self._config.cache_gib:
      self.notes.append(
        f"data.cache_gib={self._config.cache_gib:g} should be {held:.0f} or more: a host reads {own} of "
        f"data.block_lanes={lanes}, and shards that do not fit come again for every record"
      )
    step_plan = mixture.StepPlan(self._mixture, self._batch_size, 1, ())
    for task, (listed, interleave) in enumerate(zip(self._rows, self._interleaves, strict=True)):
      for source, rows in enumerate(listed):
        lane_of = mixture.Lanes(step_plan, interleave, self._batch_size, lanes, task, source)
        rows.read_in_blocks(window, lanes, lane_of)

  @property
  def tokens(self) -> int:
    """Tokens of a batch over all hosts."""
    return self._batch_size * self._shape.tokens

  def report(self) -> list[str]:
    """Returns one line per source (records, planned rows, fill, records left out), and the mixture's own lines."""
    return [rows.report() for rows in self.sources()] + self.notes

  def sources(self) -> list[Rows]:
    """Returns the rows of each source, in the order of the tasks."""
    return [rows for sources_of_task in self._rows for rows in sources_of_task]

  def identity(self) -> dict[str, list[dict[str, Any]]]:
    """Returns the identity of each source's content by task; together they determine the batches of a run."""
    return {
      task: [
        {
          "source": rows.name,
          "weight": float(weight),
          "records": rows.planned.records,
          "fingerprint": rows.fingerprint,
          "latents": rows.stored.fingerprint if rows.stored else "",  # of codes too: the name is as old as the files
        }
        | ({"rule": rows.rule} if rows.rule else {})
        | ({"groups": rows.grouping} if rows.grouping else {})
        for rows, weight in zip(listed, weights, strict=True)
      ]
      for task, listed, weights in zip(TASKS, self._rows, self._weights, strict=True)
      if listed
    }

  def steps_of(self, epochs: float) -> int:
    """Returns the steps after which every row has been drawn so many times, or more."""
    weights, counts = self._mixture[-1][1], [0.0] * len(TASKS)
    for task, (listed, shares) in enumerate(zip(self._rows, self._weights, strict=True)):
      for rows, share in zip(listed, shares, strict=True):
        counts[task] = max(counts[task], rows.plan.rows * sum(shares) / share)
    passes = [count * sum(weights) / weight for count, weight in zip(counts, weights, strict=True) if weight]
    return max(1, math.ceil(epochs * max(passes) / self._batch_size))

  def captions(self, count: int) -> list[str]:
    """Returns up to `count` different captions of images to write, of the first source's first records."""
    return [caption for rows in self._rows[TASKS.index("generation")][:1] for caption in rows.captions(count)]

  def encoders(self) -> dict[str, str]:
    """Returns the folders of encoded images that are in use, each with the fingerprint of its encoder."""
    found = [rows.stored for rows in self.sources() if rows.stored]
    return {made.directory: made.encoder for made in found}

  def counts(self, step: int) -> dict[str, int]:
    """Returns the rows per task of the global batch at a step."""
    return self._step_plan(step + 1).counts(step)

  def most(self, shards: int, accumulation: int) -> tuple[int, ...]:
    """Returns the most images to read, to write, and of both that one device's rows of a microbatch hold in any step.

    And, last, the most samples of a row. `shards`: the parts that the mesh cuts a batch into.
    """
    rows = {task: max((one.most_images for one in listed), default=0) for task, listed in zip(TASKS, self._rows)}
    held = np.array([[rows["understanding"], 0], [0, rows["generation"]], [0, 0]])
    held = np.concatenate([held, held.sum(axis=1, keepdims=True)], axis=1)
    images = mixture.most_at_once(self._mixture, self._batch_size, shards, accumulation, held)
    samples = max(rows.plan.most_pieces() for rows in self.sources())
    return (*(max(1, int(n)) for n in images), samples)

  def batch(self, step: int) -> Batch:
    """Returns this host's share of the batch of a step; see `Batch`."""
    return self._load(self._step_plan(step + 1)[step])[0]

  def pieces(self, step: int) -> list[tuple[str, str, list[Piece]]]:
    """Returns (task, source, pieces) of each row of this host's share of a step; decodes nothing."""
    out = []
    for task, number in self._step_plan(step + 1)[step]:
      source, row = self._interleaves[task][number]
      rows = self._rows[task][source]
      out.append((rows.task, rows.name, rows.pieces(row)))
    return out

  def batches(self, start_step: int, stop_step: int) -> Iterator[tuple[Batch, dict[str, Any]]]:
    """Yields the batches of the steps [start_step, stop_step), loaded ahead by threads or processes.

    Yields:
      The batch, and `{"packs": rows per task of the global batch, "fill": share of this host's slots that are
      not padding, "rejected": {reason: samples of this host's share}, "messages": one per rejected sample}`.

    Raises:
      UserError: more than data.max_rejected_share of the samples of this run had to be rejected.
    """
    step_plan = self._step_plan(stop_step)
    seen, rejected = 0, collections.Counter()
    for offset, (batch, samples, lost) in enumerate(self._loaded(step_plan, start_step)):
      counter = collections.Counter(reason for reason, _ in lost)
      seen += samples
      rejected.update(counter)
      if rejected.total() > self._config.max_rejected_share * max(seen, MIN_JUDGED):
        raise UserError(
          f"{rejected.total():,} of {seen:,} samples had to be rejected ({dict(rejected)}), more than "
          f"data.max_rejected_share = {self._config.max_rejected_share}; the last was {lost[-1][1]}; run "
          "`jflow prepare` on the source again"
        )
      fill = float((batch.segment_ids > 0).mean())
      yield (
        batch,
        {
          "packs": step_plan.counts(start_step + offset),
          "fill": fill,
          "rejected": dict(counter),
          "messages": [message for _, message in lost],
        },
      )

  def waiting_for(self) -> str:
    """Returns the loader process that the run is waiting for, or ""."""
    return self._loaders.waiting_for() if self._loaders else ""

  def _loaded(self, step_plan: mixture.StepPlan, start_step: int) -> Iterator[Any]:
    """Yields the results of `_load` for the steps from `start_step` on, loaded ahead."""
    read = functools.partial(_read, self._load, step_plan, start_step, self._config)
    count = min(self._config.workers, len(step_plan) - start_step)
    if count < 1:
      yield from read()
      return
    loaders = processes.Loaders(read, count)
    self._loaders = loaders
    try:
      yield from loaders
    finally:
      self._loaders = None
      loaders.close()

  def _step_plan(self, steps: int) -> mixture.StepPlan:
    return mixture.StepPlan(self._mixture, self._batch_size, steps, self._share)

  def _load(self, rows: Sequence[tuple[int, int]]) -> tuple[Batch, int, list[tuple[str, str]]]:
    """Returns the batch of rows, its number of samples, and (reason, message) of each rejected one."""
    batch, samples, rejected = batch_lib.empty(len(rows), self._shape), 0, []
    for place, (task, number) in enumerate(rows):
      source, row_number = self._interleaves[task][number]
      row = Batch(*(array[place] for array in batch))
      count, lost = self._rows[task][source].fill(row, row_number)
      samples += count
      rejected += lost
    return batch, samples, rejected


def _read(
  load: Any, step_plan: mixture.StepPlan, start_step: int, config: DataConfig, index: int = 0, count: int = 1
) -> Iterator[Any]:
  """Yields load(step_plan[step]) of every `count`-th step from `start_step + index` on, by threads through Grain."""
  import grain

  if start_step + index >= len(step_plan):
    return
  dataset = grain.MapDataset.source(step_plan)[start_step + index :: count].map(load)
  threads, prefetch = max(1, config.threads), max(1, config.prefetch)
  iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)))
  try:
    yield from iterator
  finally:
    if hasattr(iterator, "close"):
      iterator.close()
