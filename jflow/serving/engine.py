"""The engine: a thread that owns the models and alternates between batched conversations and image generation.

A second thread compiles, so that only requests that need a new program wait for it.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from jflow.errors import UserError
from jflow.inference.decoding import Decoder, Request
from jflow.inference.pipeline import Pipeline
from jflow.serving import prepare
from jflow.serving.batches import Batch, Batches
from jflow.serving.jobs import Job, Picture, Pictures, Tokens
from jflow.serving.metrics import Metrics
from jflow.serving.schemas import MAX_PICTURES, ApiError, fold_seed

log = logging.getLogger("jflow.serving")

# Seconds that a chunk of tokens may take: how long a new conversation waits, and a stream pauses.
_PAUSE = 0.05
_MOST = 16  # tokens of a chunk
_MAX_FAILURES = 3  # in a row, after which the engine stops
_USUAL = 512  # tokens of an answer for which the programs are compiled at first
_LOOK = 0.2  # seconds between two checks for abandoned requests


class Engine:
  """Continuous batching of conversations and batches of images with equal settings, with fair sharing of time.

  A new conversation joins the running ones at the next chunk of tokens. While both kinds have work, the kind
  that has used less of the model's time goes next. A batch of images always runs to its end, so a stream pauses
  for one batch at most. Work that needs a program not yet compiled is set aside until it is.

  Adapters of the model are models beside it with the same programs. Conversations of each have a batch and a cache of
  their own, made at the start; pictures share a batch with those of the same model.

  Attributes:
    pipelines: by the name of the adapter; "": the base.
    state: "warming up" (requests wait for the first compilation), "ready", "draining" or "failed".
  """

  def __init__(
    self,
    pipeline: Pipeline,
    metrics: Metrics,
    *,
    slots: int,
    context: int,
    batch: int,
    queue: int,
    timeout: float,
    adapters: Mapping[str, Pipeline] | None = None,
  ):
    """Makes the engine; `start` starts it.

    Args:
      pipeline: the model, named "" in what follows.
      adapters: name -> the model with that adapter.
      slots: conversations answered concurrently.
      context: largest number of tokens of a conversation, its answer included.
      batch: images generated at once, a power of two.
      queue: largest number of open requests: running, waiting, and still being read.
      timeout: seconds that a request may take.
    """
    self.pipeline, self.slots, self.context, self.batch = pipeline, slots, context, batch
    self.pipelines = {"": pipeline, **(adapters or {})}
    self._decoders: dict[str, Decoder] = {}
    self.queue, self.timeout, self.metrics, self.state = queue, timeout, metrics, "warming up"
    self._changed = threading.Condition()  # guards the queues and the open requests
    self._open: set[Job] = set()
    self._coming = 0  # requests being read and checked
    self._chats: collections.deque[Job] = collections.deque()
    self._images = Batches()
    self._unprepared: dict[Job, concurrent.futures.Future] = {}  # conversations, until their programs are compiled
    self._current: list[tuple[Job, int]] = []  # the current or last batch of images
    self._answering: dict[tuple[str, int], Job] = {}  # by model and slot
    self._chunk = 4  # tokens of every conversation between two checks of the queues
    self._spent = {"chat": 0.0, "painting": 0.0}
    self._pace = 1.0  # seconds between the ends of two requests, a moving mean
    self._last_end = time.monotonic()
    metrics.ready.set_function(lambda: self.state == "ready")
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    self._compiler = concurrent.futures.ThreadPoolExecutor(1, "compiler")

  @property
  def adapters(self) -> tuple[str, ...]:
    """The names of the models beside the base."""
    return tuple(name for name in self.pipelines if name)

  def start(self) -> None:
    """Starts the thread, which compiles first."""
    self._thread.start()

  def drain(self) -> None:
    """Refuses new requests; accepted ones are finished."""
    with self._changed:
      if self.state != "failed":
        self.state = "draining"
      self._changed.notify()

  def stop(self) -> None:
    """Drains and waits for the end of the thread."""
    self.drain()
    self._thread.join()
    self._compiler.shutdown(wait=False, cancel_futures=True)

  def check_room(self) -> None:
    """Raises ApiError: 429 when the queue is full, 503 when no request is accepted any more."""
    if self.state in ("draining", "failed"):
      raise ApiError(503, "the server is shutting down" if self.state == "draining" else "the model has failed")
    if (count := len(self._open) + self._coming) >= self.queue:
      seconds = str(max(1, math.ceil(self._pace)))
      message = f"{count} requests are open, as many as may be: try again in {seconds} s"
      raise ApiError(429, message, headers={"Retry-After": seconds})

  @contextlib.contextmanager
  def coming(self) -> Iterator[None]:
    """Reserves a place for a request while it is read and checked, since its body takes memory from its first byte.

    Raises:
      ApiError: see `check_room`.
    """
    with self._changed:
      self.check_room()
      self._coming += 1
    try:
      yield
    finally:
      with self._changed:
        self._coming -= 1

  def submit(self, work: Request | Pictures, model: str = "") -> Job:
    """Queues work of a model and returns its job, a context manager; call it on the event loop that awaits it.

    Raises:
      ApiError: see `check_room`.
      UserError: the work is out of range; see `prepare.check`.
    """
    prepare.check(work, self.context)
    with self._changed:
      self.check_room()
      job = Job(work, self.timeout, model)
      self._open.add(job)
      if job.kind == "chat":
        self._chats.append(job)
      else:
        self._images.add(job)
      self._changed.notify()
    return job

  # --- on the engine's thread -----------------------------------------------------------------------------

  def _run(self) -> None:
    try:
      self._warm_up()
      self._work()
    except Exception:
      log.exception("the model has failed")
      with self._changed:
        self.state = "failed"
        for job in self._open:
          job.emit(ApiError(503, "the model has failed"))

  def _warm_up(self) -> None:
    """Compiles the programs of most requests: a text, an image read, any number of images with default settings."""
    started, c = time.monotonic(), self.pipeline.model.config
    self._make_room()
    decoder = self._decoders[""]
    picture = np.zeros((c.image_size, c.image_size, 3), np.uint8)
    for images in ([], [picture]):
      if len(self.pipeline.request("Why?", images, 1).tokens) < self.context:
        request = self.pipeline.request("Why?", images, _USUAL, context=self.context)
        decoder.prepare(request)
        slot = decoder.admit(request)
        decoder.step(2)
        decoder.release(slot)
    if self.pipeline.can_generate:
      for settings in dict.fromkeys(each.settings() for each in self.pipelines.values()):
        self._images_of("", [("a circle", 0)], settings, 1)
        rows = 2
        while rows <= self.batch and rows < 2 * MAX_PICTURES:
          self.pipeline.prepare_images(["a circle"], settings, rows=rows)
          rows *= 2
    with self._changed:
      if self.state == "warming up":
        self.state = "ready"
    log.info("ready after %.1f s of compilation", time.monotonic() - started)

  def _work(self) -> None:
    """Works until all accepted requests are finished; raises when the model fails _MAX_FAILURES times in a row."""
    failures = 0
    while True:
      with self._changed:
        self._changed.wait_for(self._has_work, _LOOK)
        self._drop_gone()
        if not self._open and self.state == "draining":
          return
        if not self._has_work():
          continue
        kind = self._whose_turn()
      started = time.monotonic()
      try:
        self._answer() if kind == "chat" else self._generate()
        failures = 0
      except Exception:
        self.metrics.failures.inc()
        failures += 1
        if failures == _MAX_FAILURES:
          raise
        log.exception("the model failed at a %s", kind)
        self._fail(kind)
      seconds = time.monotonic() - started
      self._spent[kind] += seconds
      self.metrics.busy.labels(kind).inc(seconds)

  def _has_work(self) -> bool:
    """Whether any work can proceed."""
    waiting = self._chats or self._answering or self._images
    return bool(waiting) or self.state == "draining" and not self._open

  def _whose_turn(self) -> str:
    """The kind of work that is due."""
    chat, images = bool(self._chats or self._answering), bool(self._images)
    if not (chat and images):
      self._spent = {"chat": 0.0, "painting": 0.0}  # no credit for a time without work
      return "chat" if chat else "painting"
    return min(self._spent, key=self._spent.get)

  def _drop_gone(self) -> None:
    """Frees the resources of abandoned requests."""
    gone = {job for job in self._open if job.gone}
    if gone:
      self._chats = collections.deque(job for job in self._chats if job not in gone)
      self._images.forget(gone)
      for job in gone & self._unprepared.keys():
        self._unprepared.pop(job).cancel()
      for model, slot in [row for row, job in self._answering.items() if job in gone]:
        self._decoders[model].release(slot)
        del self._answering[model, slot]
      self._open -= gone
    self._count()

  def _answer(self) -> None:
    """Admits conversations to free slots, then decodes a chunk of tokens of each."""
    while len(self._answering) < self.slots:
      with self._changed:
        if not self._chats:
          break
        job = self._chats.popleft()
      try:
        if not self._prepared(job):
          continue
        job.started = True
        self._answering[job.model, self._decoders[job.model].admit(job.work)] = job
      except UserError as error:
        self._end(job, ApiError(400, str(error)))
      except Exception:
        self._end(job, ApiError(500, "the model failed at this request"))
        raise
    self._count()
    started = time.monotonic()
    progress = {
      model: self._decoders[model].step(self._chunk) for model in dict.fromkeys(model for model, _ in self._answering)
    }
    slow = time.monotonic() - started > _PAUSE
    self._chunk = max(1, self._chunk // 2) if slow else min(_MOST, self._chunk + 1)
    for model, slot, ids, finished in [(model, *row) for model, rows in progress.items() for row in rows]:
      job = self._answering[model, slot]
      self.metrics.tokens.labels("written").inc(len(ids))
      if finished:
        self._decoders[model].release(slot)
        del self._answering[model, slot]
        self._end(job, Tokens(ids, finished))
      else:
        job.emit(Tokens(ids, None))

  def _make_room(self) -> None:
    """Makes the batch of each model's conversations, with room for all slots, so that none lacks memory at a
    request."""
    self._decoders.clear()  # their memory is needed
    self._decoders |= {name: Decoder(each, self.slots, self.context) for name, each in self.pipelines.items()}

  def _prepared(self, job: Job) -> bool:
    """Whether a conversation's programs are compiled; else it is queued again when they are."""
    decoder = self._decoders[job.model]
    if job.prepared or decoder.prepare(job.work, compile=False):
      return True

    def back(_: object) -> None:
      with self._changed:
        job.prepared = True  # where compiling failed, the model fails at the request itself
        if self._unprepared.pop(job, None):
          self._chats.appendleft(job)
        self._changed.notify()

    with self._changed:
      self._unprepared[job] = self._compile(lambda: decoder.prepare(job.work))
    self._unprepared[job].add_done_callback(back)
    return False

  def _compile(self, work: Callable[[], object]) -> concurrent.futures.Future:
    log.info("compiling for a request of a new shape")
    return self._compiler.submit(work)

  def _generate(self) -> None:
    """Generates the next batch of images, or sets it aside until its programs are compiled."""
    with self._changed:
      batch = self._images.next(self.batch)
    self._current = batch.units
    try:
      if not batch.compiled and not self._ready(batch):
        return
      for job, _ in batch.units:
        job.started = True
      self._count()
      wanted = [(job.work.prompt, fold_seed(job.work.seed + i)) for job, i in batch.units]
      images = self._images_of(batch.model, wanted, batch.settings, batch.rows)
    except UserError as error:
      return self._refuse(batch, error)
    for (job, i), image in zip(batch.units, images):
      job.images += 1
      last = job.images == job.work.count
      picture = Picture(i, image, job.work)
      self._end(job, picture) if last else job.emit(picture)

  def _ready(self, batch: Batch) -> bool:
    """Whether a batch's programs are compiled; else it is set aside until they are."""
    prompts = [job.work.prompt for job, _ in batch.units]
    model = self.pipelines[batch.model]
    compiled = functools.partial(model.prepare_images, prompts, batch.settings, rows=batch.rows)
    if compiled(compile=False):
      return True
    future = self._compile(compiled)
    with self._changed:
      self._images.aside.append(batch._replace(compiled=future))
    future.add_done_callback(lambda _: self._notify())
    return False

  def _refuse(self, batch: Batch, error: UserError) -> None:
    """Fails the only request of a refused batch, or splits a batch of several into one batch per request."""
    jobs = list(dict.fromkeys(job for job, _ in batch.units))
    with self._changed:
      if len(jobs) > 1:
        return self._images.split(batch)
      self._images.remove(jobs)
    self._end(jobs[0], ApiError(400, str(error)))

  def _notify(self) -> None:
    with self._changed:
      self._changed.notify()

  def _images_of(self, model: str, wanted: list[tuple[str, int]], settings: Any, rows: int) -> list[Image.Image]:
    """Generates the images of (prompt, seed) pairs, padded to `rows`."""
    prompts, seeds = zip(*(wanted + wanted[:1] * (rows - len(wanted))))
    images = self.pipelines[model].generate(prompts, seeds=seeds, batch_size=rows, **dataclasses.asdict(settings))
    self.metrics.batch.observe(len(wanted))
    self.metrics.pictures.inc(len(wanted))
    return images[: len(wanted)]

  def _end(self, job: Job, event: Tokens | Picture | ApiError) -> None:
    """Emits the last event of a request, after freeing its place for the client's next one."""
    with self._changed:
      self._open.discard(job)
    job.emit(event)
    now = time.monotonic()
    self._pace = 0.9 * self._pace + 0.1 * min(now - self._last_end, self.timeout)
    self._last_end = now
    self._count()

  def _fail(self, kind: str) -> None:
    """Fails the requests that the model worked on; the batches of conversations then need new caches."""
    error = ApiError(500, "the model failed at this request or at one that shared its batch")
    if kind == "chat":
      jobs, self._answering = list(self._answering.values()), {}
      self._make_room()
    else:
      jobs = list({job for job, _ in self._current})
      with self._changed:
        self._images.remove(jobs)
    for job in jobs:
      self._end(job, error)

  def _count(self) -> None:
    with self._changed:
      generating = sum(job.kind == "painting" and job.started for job in self._open)
      for kind, running in (("chat", len(self._answering)), ("painting", generating)):
        self.metrics.running.labels(kind).set(running)
        self.metrics.waiting.labels(kind).set(sum(job.kind == kind for job in self._open) - running)
