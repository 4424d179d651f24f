"""The packed rows of one source: a row's records, and their samples with decoded images."""

import collections
import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jflow import batch as batch_lib
from jflow.batch import TASKS, Batch, RowShape
from jflow.config import DataConfig
from jflow.data import examples, held_out, images, order, packing, sources
from jflow.data.examples import Sample
from jflow.data.mixture import seed_of_part
from jflow.data.records import RecordError, Source
from jflow.data.store import groups, plans
from jflow.data.store.stored import StoredImages
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.generation.base import FAMILIES


def open_rows(
  config: DataConfig, task: str, tokenizer: Tokenizer, shape: RowShape, seed: int, side: str = held_out.TRAINING
) -> list["Rows"]:
  """Opens the sources of a task and plans their rows; see `Rows`. `seed`: of all random choices of a run."""
  task_seed = seed_of_part(seed, TASKS.index(task))
  opened = []
  for i, (spec, _) in enumerate(getattr(config.sources, task)):
    source = sources.open_source(spec, task, config)
    opened.append(Rows(source, task, config, tokenizer, shape, seed_of_part(task_seed, i), spec, side))
  return opened


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
    side: str = held_out.TRAINING,
  ):
    """Plans the rows of one side of held_out.py.

    Raises:
      UserError: no record of the source fits a row; one without a held-out record has no rows for validation.
    """
    self.name, self.task, self._side = name, task, side
    self.fingerprint = getattr(source, "fingerprint", "")
    self._source, self._tokenizer, self._shape = source, tokenizer, shape
    family = FAMILIES.get(shape.writer)
    self._layout = family.layout  # loader processes know no names that a script has registered
    self._template, self._crop, self._scaled = config.template, config.crop, config.decode == "scaled"
    self._caption_prompt = config.caption_prompt
    self._first_sentence, self._prompt_drop = config.first_sentence, config.prompt_drop
    self._seed = seed
    blocks = config.order == "blocks" and side == held_out.TRAINING
    self.planned = plans.planned(
      source,
      task,
      tokenizer,
      self._template,
      shape,
      config.plan_cache,
      config.caption_prompt,
      config.validation,
      side,
      config.block_records if blocks else 0,
    )
    self.plan, self.rejected = self.planned.plan, self.planned.rejected
    shuffled = order.Global if self.planned.groups is None else order.Scattered
    self._order: order.Order = shuffled(self.plan.rows, seed, TASKS.index(task))
    ahead = task == "generation" and config.stored
    self.stored = StoredImages(family.stored, source, shape.image_size, shape.stored) if ahead else None
    self._divided = config.validation > 0
    self.rule = held_out.VERSION if self._divided else 0  # by which records are held out; 0: none are
    self.grouping = 0 if self.planned.groups is None else groups.VERSION  # by which rows are planned; 0: all at once
    if not self.plan.rows and side == held_out.TRAINING:
      raise UserError(
        f"{name}: none of the {len(source):,} {task} records fits a row of {shape.tokens:,} tokens "
        f"and {shape.images} images; rejected: {dict(self.rejected)}"
      )

  def read_in_blocks(self, window: int, lanes: int, lane_of: Callable[[np.ndarray], np.ndarray]) -> None:
    """Takes the order of `order.Blocks` with these arguments; the rows must be planned by `data.block_records`."""
    begins = self.planned.groups
    if begins is None:
      raise TypeError("the rows are not planned by groups")
    self._order = order.Blocks(begins, self.plan.rows, self._seed, TASKS.index(self.task), window, lanes, lane_of)

  @property
  def cached_group_bytes(self) -> float:
    """The mean size of the shards of a group, where they lie in a cache of the host; 0 elsewhere."""
    if not getattr(self._source, "cache", None) or self.planned.groups is None:
      return 0.0
    return sum(self._source.shard_bytes) / max(len(self.planned.groups), 1)

  @functools.cached_property
  def most_images(self) -> int:
    """The most images that a row holds, by its plan."""
    if self.task == "text":
      return 0
    if self.task == "generation":  # one image for each sample
      return min(self.plan.most_pieces(), self._shape.images)
    return min(self._shape.tokens // self._shape.slots_of(batch_lib.READ), self._shape.images)

  def report(self) -> str:
    """Returns one line: records, planned rows, fill, records left out."""
    rejected = collections.Counter(self.rejected)
    too_long = rejected.pop("too_long", 0)
    reasons = f" ({', '.join(f'{r} {n:,}' for r, n in sorted(rejected.items()))})" if rejected else ""
    made = f"; {self.stored.kind.name} made ahead" if self.stored else ""
    records = _counted(self.planned.records, "record")
    if self._divided:
      records = f"{sum(int((self.plan.starts[s] == 0).sum()) for s in self.plan.slices()):,} of {records}"
    held = " held out" if self._side == held_out.VALIDATION else ""
    return (
      f"{self.task:13} {self.name}: {records}{held} in {_counted(self.plan.rows, 'row')}, "
      f"{self.planned.fill(self._shape.tokens):.1%} full; {too_long:,} too long, "
      f"{rejected.total():,} rejected{reasons}{made}"
    )

  def captions(self, count: int) -> list[str]:
    """Returns up to `count` different captions of the first records of the plan."""
    found: dict[str, None] = {}
    for index in self.plan.record_ids[: 8 * count].tolist():
      with contextlib.suppress(RecordError):
        if len(found) < count and (caption := self._source[index].text.strip()):
          found[caption] = None
    return list(found)

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
    index = self._order(epoch, index)
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
      self._shape.patches_of(self.task),
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
      pixels = tuple(images.for_understanding(image, size, scaled=self._scaled) for image in sample.images)
    return sample._replace(images=pixels)


def _counted(number: int, what: str) -> str:
  return f"{number:,} {what}{'s' * (number != 1)}"
