"""One thread owns the model: it answers conversations side by side and paints what waits, in turns."""

import collections
import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image

from jflow.inference.decoding import Decoder, Request
from jflow.inference.pipeline import Pipeline
from jflow.serving.jobs import Job, Picture, Pictures, Tokens
from jflow.serving.metrics import Metrics
from jflow.serving.schemas import ApiError, Settings, fold_seed

log = logging.getLogger("jflow.serving")

_PAUSE = 0.05  # seconds that a chunk of tokens may take: so long does a new conversation wait, and a stream stand still
_MOST = 16  # tokens of a chunk
_MAX_FAILURES = 3  # in a row, before the engine gives up


class Engine:
  """Continuous batching of conversations, batches of paintings with equal settings, time shared between both.

  A new conversation joins the running ones at the next chunk of tokens. While both kinds have work, the kind
  that has used less of the model's time goes next; a batch of pictures, once begun, runs to its end, so a
  stream pauses for one batch at most.

  Attributes:
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
  ):
    """Makes the engine; `start` starts it.

    Args:
      slots: conversations answered side by side.
      context: tokens that one conversation may have, its answer included.
      batch: pictures painted at once, a power of two.
      queue: requests that may be open: those that run, that wait, and that are still read.
      timeout: seconds that a request may take.
    """
    self.pipeline, self.slots, self.context, self.batch = pipeline, slots, context, batch
    self.queue, self.timeout, self.metrics, self.state = queue, timeout, metrics, "warming up"
    self._changed = threading.Condition()  # guards what waits and what is open
    self._open: set[Job] = set()
    self._coming = 0  # requests that are read and checked
    self._chats: collections.deque[Job] = collections.deque()
    self._pictures: collections.deque[tuple[Job, int]] = collections.deque()  # request, index of its picture
    self._painting: list[tuple[Job, int]] = []  # the batch that the model has, or had last
    self._answering: dict[int, Job] = {}  # by slot
    self._chunk = 4  # tokens that every conversation gets before the next look at what waits
    self._spent = {"chat": 0.0, "painting": 0.0}
    self._pace = 1.0  # seconds between two requests that end, a moving mean
    self._last_end = time.monotonic()
    metrics.ready.set_function(lambda: self.state == "ready")
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

  def start(self) -> None:
    """Starts the thread, which compiles first."""
    self._thread.start()

  def drain(self) -> None:
    """Refuses new requests from now on; those that were accepted are finished."""
    with self._changed:
      if self.state != "failed":
        self.state = "draining"
      self._changed.notify()

  def stop(self) -> None:
    """Drains and waits for the end of the thread."""
    self.drain()
    self._thread.join()

  def check_room(self) -> None:
    """Raises ApiError: 429 when as many requests as may are open, 503 when none is accepted any more."""
    if self.state in ("draining", "failed"):
      raise ApiError(
        503, "the server is shutting down" if self.state == "draining" else "the model has failed"
      )
    if (count := len(self._open) + self._coming) >= self.queue:
      seconds = str(max(1, math.ceil(self._pace)))
      message = f"{count} requests are open, as many as may be: try again in {seconds} s"
      raise ApiError(429, message, headers={"Retry-After": seconds})

  @contextlib.contextmanager
  def coming(self) -> Iterator[None]:
    """Holds a place for a request while it is read and checked; its body takes memory from its first byte on.

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

  def submit(self, work: Request | Pictures) -> Job:
    """Queues work; called on the event loop that waits for it. Leave the job by `with`.

    Raises:
      ApiError: see `check_room`.
    """
    with self._changed:
      self.check_room()
      job = Job(work, self.timeout)
      self._open.add(job)
      if job.kind == "chat":
        self._chats.append(job)
      else:
        self._pictures.extend((job, i) for i in range(work.count))
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
    """Compiles what most requests need: a text, a picture read, a picture painted with the default settings."""
    started, c = time.monotonic(), self.pipeline.model.config
    self._decoder = Decoder(self.pipeline, self.slots, self.context)
    picture = np.zeros((c.image_size, c.image_size, 3), np.uint8)
    for images in ([], [picture]):
      request = self.pipeline.request("Why?", images, max_tokens=2)
      if len(request.tokens) < self.context:
        slot = self._decoder.admit(request)
        self._decoder.step(2)
        self._decoder.release(slot)
    if self.pipeline.can_paint:
      self._generate([("a circle", 0)], Settings(30, 2.0, "euler", 1.0))
    with self._changed:
      if self.state == "warming up":
        self.state = "ready"
    log.info("ready after %.1f s of compilation", time.monotonic() - started)

  def _work(self) -> None:
    """Answers and paints until nothing is left of what was accepted; raises when the model fails time after time."""
    failures = 0
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._open or self.state == "draining")
        self._drop_gone()
        if not self._open:
          if self.state == "draining":
            return
          continue
        kind = self._whose_turn()
      started = time.monotonic()
      try:
        self._answer() if kind == "chat" else self._paint()
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

  def _whose_turn(self) -> str:
    """The kind of work that goes on next."""
    chat, pictures = bool(self._chats or self._answering), bool(self._pictures)
    if not (chat and pictures):
      self._spent = {"chat": 0.0, "painting": 0.0}  # no credit for a time without work
      return "chat" if chat else "painting"
    return min(self._spent, key=self._spent.get)

  def _drop_gone(self) -> None:
    """Frees what requests hold that nobody waits for any more."""
    gone = {job for job in self._open if job.gone}
    if gone:
      self._chats = collections.deque(job for job in self._chats if job not in gone)
      self._pictures = collections.deque(x for x in self._pictures if x[0] not in gone)
      for slot in [slot for slot, job in self._answering.items() if job in gone]:
        self._decoder.release(slot)
        del self._answering[slot]
      self._open -= gone
    self._count()

  def _answer(self) -> None:
    """Admits conversations to free slots, then writes a chunk of tokens of every one."""
    while len(self._answering) < self.slots:
      with self._changed:
        if not self._chats:
          break
        job = self._chats.popleft()
      job.started = True
      try:
        self._answering[self._decoder.admit(job.work)] = job
      except Exception:
        self._end(job, ApiError(500, "the model failed at this request"))
        raise
    self._count()
    started = time.monotonic()
    progress = self._decoder.step(self._chunk)
    slow = time.monotonic() - started > _PAUSE
    self._chunk = max(1, self._chunk // 2) if slow else min(_MOST, self._chunk + 1)
    for slot, ids, finished in progress:
      job = self._answering[slot]
      self.metrics.tokens.labels("written").inc(len(ids))
      if finished:
        self._decoder.release(slot)
        del self._answering[slot]
        self._end(job, Tokens(ids, finished))
      else:
        job.emit(Tokens(ids, None))

  def _paint(self) -> None:
    """Paints what waits with the settings of the first."""
    with self._changed:
      settings = self._pictures[0][0].work.settings
      batch = [x for x in self._pictures if x[0].work.settings == settings][: self.batch]
    self._painting = batch
    for job, _ in batch:
      job.started = True
    self._count()
    images = self._generate([(job.work.prompt, fold_seed(job.work.seed + i)) for job, i in batch], settings)
    with self._changed:
      for unit in batch:
        self._pictures.remove(unit)
    for (job, i), image in zip(batch, images):
      last = i + 1 == job.work.count
      self._end(job, Picture(i, image)) if last else job.emit(Picture(i, image))

  def _generate(self, pictures: list[tuple[str, int]], settings: Settings) -> list[Image.Image]:
    """Paints (prompt, seed)s; the batch is filled up to a power of two, so that few sizes are compiled."""
    rows = 1 << (len(pictures) - 1).bit_length()
    prompts, seeds = zip(*(pictures + pictures[:1] * (rows - len(pictures))))
    images = self.pipeline.generate(
      prompts, settings.steps, settings.guidance, noise=self.pipeline.noise(seeds), solver=settings.solver,
      shift=settings.shift, batch_size=rows,
    )  # fmt: skip
    self.metrics.batch.observe(len(pictures))
    self.metrics.pictures.inc(len(pictures))
    return images[: len(pictures)]

  def _end(self, job: Job, event: Tokens | Picture | ApiError) -> None:
    """Hands over the last event of a request, whose place is free before its client can send the next."""
    with self._changed:
      self._open.discard(job)
    job.emit(event)
    now = time.monotonic()
    self._pace = 0.9 * self._pace + 0.1 * min(now - self._last_end, self.timeout)
    self._last_end = now
    self._count()

  def _fail(self, kind: str) -> None:
    """Ends what the model worked on when it failed; a batch of conversations needs a new cache."""
    error = ApiError(500, "the model failed at this request or at one that shared its batch")
    if kind == "chat":
      jobs, self._answering = list(self._answering.values()), {}
      self._decoder = None  # its memory is needed
      self._decoder = Decoder(self.pipeline, self.slots, self.context)
    else:
      jobs = list({job for job, _ in self._painting})
      with self._changed:
        self._pictures = collections.deque(x for x in self._pictures if x[0] not in jobs)
    for job in jobs:
      self._end(job, error)

  def _count(self) -> None:
    with self._changed:
      painting = sum(job.kind == "painting" and job.started for job in self._open)
      for kind, running in (("chat", len(self._answering)), ("painting", painting)):
        self.metrics.running.labels(kind).set(running)
        self.metrics.waiting.labels(kind).set(sum(job.kind == kind for job in self._open) - running)
