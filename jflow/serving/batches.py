"""Waiting images in batches of one model with equal settings. The engine's lock guards all of it."""

import collections
import concurrent.futures
from collections.abc import Collection
from typing import Any, NamedTuple

from jflow.serving.jobs import Job


class Batch(NamedTuple):
  """Images that are generated at once."""

  units: list[tuple[Job, int]]  # request, index of its image
  settings: Any
  compiled: concurrent.futures.Future | None = None  # of the programs that it needs

  @property
  def model(self) -> str:
    """The adapter of all of them, see `Job.model`."""
    return self.units[0][0].model

  @property
  def rows(self) -> int:
    """Images that the programs generate: a power of two, so that few sizes are compiled."""
    return 1 << (len(self.units) - 1).bit_length()


class Batches:
  """The images that wait, and the batches that are set aside until their programs are compiled."""

  def __init__(self) -> None:
    self._waiting: collections.deque[tuple[Job, int]] = collections.deque()
    self.aside: list[Batch] = []

  def __bool__(self) -> bool:
    """Whether any of them can be generated now."""
    return bool(self._waiting) or self._compiled() is not None

  def add(self, job: Job) -> None:
    """Queues the images of a request."""
    self._waiting.extend((job, i) for i in range(job.work.count))

  def next(self, most: int) -> Batch:
    """Takes a batch whose programs are compiled now, else at most `most` images of the model and settings of the
    first."""
    if batch := self._compiled():
      self.aside.remove(batch)
      return batch
    kind = lambda job: (job.model, job.work.settings)
    first = self._waiting[0][0]
    units = [unit for unit in self._waiting if kind(unit[0]) == kind(first)][:most]
    for unit in units:
      self._waiting.remove(unit)
    return Batch(units, first.work.settings)

  def split(self, batch: Batch) -> None:
    """Sets a batch aside as one batch per request, ready to be generated."""
    done: concurrent.futures.Future[None] = concurrent.futures.Future()
    done.set_result(None)
    for job in dict.fromkeys(job for job, _ in batch.units):
      self.aside.append(Batch([unit for unit in batch.units if unit[0] is job], batch.settings, done))

  def forget(self, gone: Collection[Job]) -> None:
    """Removes the images of abandoned requests, except from batches that others share, which are compiled whole."""
    self._waiting = collections.deque(unit for unit in self._waiting if unit[0] not in gone)
    for batch in [batch for batch in self.aside if all(job in gone for job, _ in batch.units)]:
      if batch.compiled:
        batch.compiled.cancel()
      self.aside.remove(batch)

  def remove(self, ended: Collection[Job]) -> None:
    """Removes all images of requests that have ended."""
    self.forget(ended)
    units = lambda batch: [unit for unit in batch.units if unit[0] not in ended]
    self.aside = [batch._replace(units=units(batch)) for batch in self.aside]

  def _compiled(self) -> Batch | None:
    return next((batch for batch in self.aside if batch.compiled and batch.compiled.done()), None)
