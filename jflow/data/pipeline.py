"""The data pipeline: the batch of a step, a pure function of the step.

A step determines rows (mixture.py), a row its records (packing.py), and a record with its rng a sample (examples.py);
the images of a row are decoded last. There is no iterator state: a resumed run starts at its step. The result does not
depend on the number of hosts, workers and threads.
"""

import collections
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jflow import batch as batch_lib
from jflow.batch import TASKS, Batch, RowShape
from jflow.config import DataConfig
from jflow.data import examples, images, mixture, packing, processes, sources
from jflow.data.examples import Sample
from jflow.data.records import RecordError, Source
from jflow.data.store import plans
from jflow.data.store.stored import StoredImages
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.generation.base import FAMILIES

# The share of rejected records is computed over at least this many samples.
MIN_JUDGED = 1000


class Piece(NamedTuple):
  """The slots [start, stop) of a record's sequence in a row: all of it, unless it is a document that was cut."""

  epoch: int
  record: int
  start: int
  stop: int


class Rows:
  """The packed rows of one source, by row number. The order changes every epoch. Picklable."""

  def __init__(
    self,
    source: Source,
    task: str,
    config: DataConfig,
    tokenizer: Tokenizer,
    shape: RowShape,
    seed: int,
    name: str,
  ):
    """Plans the rows.

    Raises:
      UserError: no record of the source fits a row.
    """
    self.name, self.task = name, task
    self.fingerprint = getattr(source, "fingerprint", "")
    self._source, self._tokenizer, self._shape = source, tokenizer, shape
    family = FAMILIES.get(shape.writer)
    self._layout = family.layout  # loader processes know no names that a script has registered
    self._template, self._crop = config.template, config.crop
    self._caption_prompt = config.caption_prompt
    self._first_sentence, self._prompt_drop = config.first_sentence, config.prompt_drop
    self._seed = seed
    self._orders: dict[int, np.ndarray] = {}
    self.planned = plans.planned(
      source, task, tokenizer, self._template, shape, config.plan_cache, config.caption_prompt
    )
    self.plan, self.rejected = self.planned.plan, self.planned.rejected
    ahead = task == "generation" and config.stored
    self.stored = StoredImages(family.stored, source, shape.image_size, shape.stored) if ahead else None
    if not self.plan.rows:
      raise UserError(
        f"{name}: none of the {len(source):,} {task} records fits a row of {shape.tokens:,} tokens "
        f"and {shape.images} images; rejected: {dict(self.rejected)}"
      )

  @functools.cached_property
  def most_images(self) -> int:
    """The most images that a row holds, by its plan."""
    if self.task == "text":
      return 0
    if self.task == "generation":  # one image for each sample
      return min(int(np.diff(self.plan.row_offsets).max()), self._shape.images)
    return min(self._shape.tokens // self._shape.slots_of(batch_lib.READ), self._shape.images)

  def report(self) -> str:
    """Returns one line: records, planned rows, fill, records left out."""
    rejected = collections.Counter(self.rejected)
    too_long = rejected.pop("too_long", 0)
    reasons = f" ({', '.join(f'{r} {n:,}' for r, n in sorted(rejected.items()))})" if rejected else ""
    made = f"; {self.stored.kind.name} made ahead" if self.stored else ""
    return (
      f"{self.task:13} {self.name}: {_counted(self.planned.records, 'record')} in {_counted(self.plan.rows, 'row')}, "
      f"{self.planned.fill(self._shape.tokens):.1%} full; {too_long:,} too long, "
      f"{rejected.total():,} rejected{reasons}{made}"
    )

  def fill(self, row: Batch, number: int) -> tuple[int, list[tuple[str, str]]]:
    """Packs a row into `row`, which holds only padding.

    A rejected sample leaves its slots empty: a replacement would occur twice in the epoch.

    Returns:
      The number of samples of the row, and (reason, message) of each rejected one.
    """
    pieces = self.pieces(number)
    samples, rejected = [], []
    for piece in pieces:
      try:
        samples.append(self._sample(piece))
      except RecordError as error:
        rejected.append((error.reason, f"{self.name}, {self.task} record {piece.record}: {error}"))
    packing.pack_into(row, samples, self._shape)
    held = sum(len(sample.images) for sample in samples)
    if held > self.most_images:  # the step has no room for it
      raise UserError(
        f"{self.name}: row {number} holds {held} images, a row of its plan at most {self.most_images}: remove the plan"
      )
    return len(pieces), rejected

  def pieces(self, number: int) -> list[Piece]:
    """Returns the pieces of a row, in order."""
    epoch, index = divmod(number, self.plan.rows)
    index = self._shuffled(epoch)[index]
    span = slice(*self.plan.row_offsets[index : index + 2])
    columns = (self.plan.record_ids[span], self.plan.starts[span], self.plan.stops[span])
    return [Piece(epoch, *piece) for piece in zip(*(column.tolist() for column in columns))]

  def _sample(self, piece: Piece) -> Sample:
    _, index, start, stop = piece
    rng = np.random.default_rng([self._seed, piece.epoch, TASKS.index(self.task), index])
    sample = examples.build(
      self._source[index],
      self.task,
      self._tokenizer,
      self._template,
      self._shape.image_patches,
      rng,
      self._first_sentence,
      self._prompt_drop,
      self._layout,
      self._caption_prompt,
    )
    if self.task == "text":
      return packing.cut(sample, start, stop)
    size = self._shape.image_size
    if self.stored is not None:
      box, stored = self.stored[index]
      pixels = images.square(sample.images[0], size, box)
      return sample._replace(images=(pixels,), stored=(stored,))
    if self.task == "generation":
      pixels = tuple(images.for_generation(image, size, rng, self._crop) for image in sample.images)
    else:
      pixels = tuple(images.for_understanding(image, size) for image in sample.images)
    return sample._replace(images=pixels)

  def _shuffled(self, epoch: int) -> np.ndarray:
    order = self._orders.get(epoch)
    if order is None:
      rng = np.random.default_rng([self._seed, epoch, TASKS.index(self.task)])
      order = rng.permutation(self.plan.rows)
      # Threads may be in two epochs at once: a new dict, so that none is changed while another thread reads it.
      self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1} | {epoch: order}
    return order


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
    self._mixture = tuple((int(step), tuple(weights)) for step, weights in config.mixture)
    self._step_plan(1)
    used = [any(weights[i] > 0 for _, weights in self._mixture) for i in range(len(TASKS))]
    self._loaders: processes.Loaders | None = None
    self._interleaves: list[mixture.Interleave | None] = []
    self._rows: list[list[Rows]] = []
    self._weights: list[list[float]] = []
    for number, task in enumerate(TASKS):
      listed = getattr(config.sources, task) if used[number] else ()
      if used[number] and not listed:
        raise UserError(f"data.mixture gives {task} a share, and data.sources.{task} is empty")
      task_seed = _mix(seed, number)
      self._weights.append([weight for _, weight in listed])
      self._interleaves.append(mixture.Interleave([w for _, w in listed], task_seed) if listed else None)
      self._rows.append(
        [
          Rows(
            sources.open_source(spec, task, config),
            task,
            config,
            tokenizer,
            row_shape,
            _mix(task_seed, i),
            spec,
          )
          for i, (spec, _) in enumerate(listed)
        ]
      )

  def report(self) -> list[str]:
    """Returns one line per source: records, planned rows, fill, records left out."""
    return [rows.report() for rows in self.sources()]

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
        for rows, weight in zip(listed, weights, strict=True)
      ]
      for task, listed, weights in zip(TASKS, self._rows, self._weights, strict=True)
      if listed
    }

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
    samples = max(int(np.diff(rows.plan.row_offsets).max()) for rows in self.sources())
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


def _counted(number: int, what: str) -> str:
  return f"{number:,} {what}{'s' * (number != 1)}"


def _mix(seed: int, number: int) -> int:
  """Derives the seed of part `number` from `seed`."""
  return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
