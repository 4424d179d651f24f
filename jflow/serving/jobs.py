"""Jobs of the engine and their events."""

import asyncio
import dataclasses
import io
import time
from typing import Any, NamedTuple

from PIL import Image

from jflow import png
from jflow.inference.decoding import Request
from jflow.serving.schemas import ApiError


class Tokens(NamedTuple):
  """The next tokens of an answer."""

  ids: list[int]
  finished: str | None  # "stop", "length", or None while more come


class Picture(NamedTuple):
  """One generated image of a request."""

  index: int
  image: Image.Image
  work: "Pictures"

  def png(self) -> bytes:
    """The picture as a PNG file that says how it was made."""
    out = io.BytesIO()
    told = {"seed": self.work.seed + self.index, **dataclasses.asdict(self.work.settings)}
    png.save(self.image, out, self.work.prompt, told)
    return out.getvalue()


class Pictures(NamedTuple):
  """The work of generating `count` images of a prompt; image j starts from the noise of seed + j."""

  prompt: str
  count: int
  seed: int
  settings: Any  # typed, of the model's way to write images


class Job:
  """A request in the engine; a context manager that releases the request's resources on exit.

  Created on the event loop that awaits it; only `emit` is called from the engine's thread.
  """

  def __init__(self, work: Request | Pictures, seconds: float, model: str = ""):
    """Args: `work` of the request, `seconds` that it may take, name of its adapter ("": the base alone)."""
    self.model = model
    self.work, self.kind = work, "painting" if isinstance(work, Pictures) else "chat"
    self.gone = False  # abandoned by its client
    self.started = False
    self.prepared = False  # its programs were compiled
    self.images = 0  # emitted
    self._seconds, self._deadline = seconds, time.monotonic() + seconds
    self._loop = asyncio.get_running_loop()
    self._events: asyncio.Queue[Any] = asyncio.Queue()

  def __enter__(self) -> "Job":
    return self

  def __exit__(self, *_: object) -> None:
    self.gone = True

  def emit(self, event: Tokens | Picture | ApiError) -> None:
    """Delivers an event to the waiting coroutine."""
    try:
      self._loop.call_soon_threadsafe(self._events.put_nowait, event)
    except RuntimeError:  # the loop has ended
      self.gone = True

  async def next(self) -> Tokens | Picture:
    """The next event.

    Raises:
      ApiError: 504 when the request has timed out, 500 when the model failed.
    """
    try:
      event = await asyncio.wait_for(self._events.get(), max(0.0, self._deadline - time.monotonic()))
    except TimeoutError:
      where = "and was not done" if self.started else "all of that in the queue"
      raise ApiError(504, f"the request took longer than {self._seconds:g} s, {where}") from None
    if isinstance(event, ApiError):
      raise event
    return event
