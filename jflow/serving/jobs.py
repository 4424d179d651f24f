"""Requests on their way through the engine, and what comes back."""

import asyncio
import time
from typing import Any, NamedTuple

from PIL import Image

from jflow.inference.decoding import Request
from jflow.serving.schemas import ApiError, Settings


class Tokens(NamedTuple):
  """The next tokens of an answer."""

  ids: list[int]
  finished: str | None  # "stop", "length", or None while more come


class Picture(NamedTuple):
  """One painted picture of a request."""

  index: int
  image: Image.Image


class Pictures(NamedTuple):
  """Work: `count` pictures of a prompt; picture j starts from the noise of seed + j."""

  prompt: str
  count: int
  seed: int
  settings: Settings


class Job:
  """A request. A context manager: leaving it frees what the request holds.

  Made on the event loop that waits for it; `emit` alone is called from the engine's thread.
  """

  def __init__(self, work: Request | Pictures, seconds: float):
    """`seconds`: how long the request may take."""
    self.work, self.kind = work, "painting" if isinstance(work, Pictures) else "chat"
    self.gone = False  # nobody waits for it any more
    self.started = False
    self.prepared = False  # its programs were compiled
    self.painted = 0  # pictures that were handed over
    self._seconds, self._deadline = seconds, time.monotonic() + seconds
    self._loop = asyncio.get_running_loop()
    self._events: asyncio.Queue[Any] = asyncio.Queue()

  def __enter__(self) -> "Job":
    return self

  def __exit__(self, *_: object) -> None:
    self.gone = True

  def emit(self, event: Tokens | Picture | ApiError) -> None:
    """Hands an event to the one who waits."""
    try:
      self._loop.call_soon_threadsafe(self._events.put_nowait, event)
    except RuntimeError:  # the loop has ended
      self.gone = True

  async def next(self) -> Tokens | Picture:
    """The next event.

    Raises:
      ApiError: 504 when the time of the request is over, 500 when the model failed.
    """
    try:
      event = await asyncio.wait_for(self._events.get(), max(0.0, self._deadline - time.monotonic()))
    except TimeoutError:
      where = "and was not done" if self.started else "all of that in the queue"
      raise ApiError(504, f"the request took longer than {self._seconds:g} s, {where}") from None
    if isinstance(event, ApiError):
      raise event
    return event
