"""Preparation of requests for the engine: tokens, pixels and a seed.

Both the HTTP interface and the page use `Preparing`, whose threads block neither the event loop nor the model's
thread.
"""

import asyncio
import concurrent.futures
import functools
import itertools
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

import numpy as np

from jflow import checks
from jflow.data.sequences import MARKS
from jflow.errors import PromptTooLong, UserError
from jflow.inference.decoding import Request
from jflow.inference.pipeline import Pipeline, check_prompts, prepare_image
from jflow.serving.jobs import Pictures
from jflow.serving.schemas import IMAGE_MARK, SEEDS, ApiError, Chat, Images, fold_seed

_LONGEST_TOKEN = 128  # characters; a text with more of them per token of the context cannot fit
_FIRST_LOOK = 4  # characters per token of the context: only so long a prefix is tokenized first
_THREADS = 4  # for texts, and as many for images: a text never waits for an image

T = TypeVar("T")


class Preparing:
  """Parses, tokenizes and decodes within the time of a request, and stops when its client disconnects."""

  def __init__(self, pipelines: Mapping[str, Pipeline], context: int, seconds: float):
    """Args: `pipelines` by the model of a request, `context` tokens of a conversation, `seconds` that a request may take."""
    self._pipelines, self._context, self._seconds = pipelines, context, seconds
    pool = functools.partial(concurrent.futures.ThreadPoolExecutor, _THREADS)
    self._texts, self._pictures = pool("text"), pool("picture")

  async def chat(self, parse: Callable[[], Chat]) -> tuple[Chat, Request]:
    """A conversation ready for the engine. When cancelled, it stops before the next image.

    Args:
      parse: makes the conversation, on a thread.

    Returns:
      (the conversation with its seed drawn where it named none, the work).

    Raises:
      UserError: see `chat`.
      ApiError: 504 when it takes too long; whatever `parse` raises.
    """
    with Patience(self._seconds) as patience:
      wanted = await self._on(self._texts, patience, parse)
      threads = self._pictures if any(isinstance(x, bytes) for x in wanted.images) else self._texts
      pipeline = self._pipelines[wanted.model]
      return await self._on(threads, patience, lambda: chat(pipeline, wanted, self._context, patience.check))

  async def pictures(self, parse: Callable[[], Images]) -> tuple[Images, Pictures]:
    """Image generation ready for the engine; see `chat`."""

    def work() -> tuple[Images, Pictures]:
      wanted = parse()
      return wanted, pictures(self._pipelines[wanted.model], wanted)

    with Patience(self._seconds) as patience:
      return await self._on(self._texts, patience, work)

  async def run(self, work: Callable[[], T]) -> T:
    """The result of other slow work, such as encoding a PNG file."""
    with Patience(self._seconds) as patience:
      return await self._on(self._texts, patience, work)

  async def _on(self, threads: concurrent.futures.Executor, patience: "Patience", work: Callable[[], T]) -> T:
    def watched() -> T:
      patience.check()
      return work()

    running = asyncio.get_running_loop().run_in_executor(threads, watched)
    try:
      return await asyncio.wait_for(running, patience.left())
    except TimeoutError:
      raise patience.over() from None


class UnreadableImage(UserError):
  """An unreadable image of a conversation, at `index` of its images.

  `field` is the request's field that holds it, where there is one.
  """

  def __init__(self, index: int, message: str, field: str | None):
    super().__init__(message)
    self.index, self.field = index, field


class Patience:
  """The deadline of some work; a context manager that cancels the work of other threads on exit."""

  def __init__(self, seconds: float):
    self._seconds, self._end = seconds, time.monotonic() + seconds
    self._gone = threading.Event()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self._gone.set()

  def left(self) -> float:
    """Seconds that are left."""
    return max(0.0, self._end - time.monotonic())

  def check(self) -> None:
    """Raises ApiError when the work is no longer awaited."""
    if self._gone.is_set() or not self.left():
      raise self.over()

  def over(self) -> ApiError:
    """The error of a timeout."""
    return ApiError(504, f"the request took longer than {self._seconds:g} s to prepare: send less, or smaller pictures")


def chat(
  pipeline: Pipeline, wanted: Chat, context: int, check: Callable[[], None] = lambda: None
) -> tuple[Chat, Request]:
  """Tokenizes a conversation and decodes its images; checks their number before decoding any.

  Args:
    wanted: its images are files as bytes, or pixels as `Request.images` holds them.
    context: tokens of a conversation.
    check: called before each picture; ends the work by raising.

  Returns:
    (the conversation with its seed drawn where it named none, the work).

  Raises:
    UserError: the conversation has no question, or its text holds the image mark.
    UnreadableImage: an image cannot be read.
    PromptTooLong: `context` tokens leave no room for an answer.
  """
  for mark in MARKS:
    if any(mark in turn["content"] for turn in wanted.turns if turn["role"] == "user"):
      raise UserError(f"the text must not hold {mark}: leave it out, and send the picture itself")
  fitting = (context - 1) // (2 + pipeline.model.config.patches)
  if len(wanted.images) > fitting:
    raise PromptTooLong(
      f"the conversation must show at most {fitting} pictures, for which {context:,} tokens have room, "
      f"got {len(wanted.images):,}"
    )
  _check_length(pipeline, [turn["content"] for turn in wanted.turns], context)

  index = itertools.count()

  def read(image: Any, size: int) -> np.ndarray:
    check()
    if not isinstance(image, (bytes, np.ndarray)):  # a name would be opened
      raise UserError(f"a picture must be the bytes of a file, got {type(image).__name__}")
    i = next(index)
    try:
      return prepare_image(image, size)
    except UserError as error:
      field = wanted.image_fields[i] if wanted.image_fields else None
      raise UnreadableImage(i, str(error), field) from None

  wanted = wanted._replace(seed=secrets.randbelow(SEEDS) if wanted.seed is None else wanted.seed)
  request = pipeline.request(
    wanted.turns,
    wanted.images,
    wanted.max_tokens,
    temperature=wanted.temperature,
    top_p=wanted.top_p,
    seed=fold_seed(wanted.seed),
    mark=IMAGE_MARK,
    context=context,
    read=read,
  )
  return wanted, request


def pictures(pipeline: Pipeline, wanted: Images) -> Pictures:
  """Checks a prompt and its settings; draws the seed where none is given.

  Raises:
    UserError: the prompt is too long, a value is out of range, or the checkpoint cannot generate images.
  """
  _check_length(pipeline, [wanted.prompt], pipeline.model.config.language_model.max_length)
  seed = secrets.randbelow(SEEDS - wanted.count) if wanted.seed is None else wanted.seed
  work = Pictures(wanted.prompt, wanted.count, seed, wanted.settings)
  check(work, 0)
  pipeline.generation_prompt(wanted.prompt)
  return work


def check(work: Request | Pictures, context: int) -> None:
  """Checks work as far as possible without the model, so that a bad request does not count as the model's failure.

  Raises:
    UserError: a value is out of range, or a prompt does not fit into `context` tokens.
  """
  if isinstance(work, Pictures):
    checks.whole("seed", work.seed, -SEEDS * SEEDS)  # the engine folds it
    check_prompts([work.prompt], seed=0, num_images=work.count, batch_size=1)
  else:
    checks.answer(work.max_tokens, work.temperature, work.top_p, work.seed)
    if len(work.tokens) >= context:
      raise UserError(f"the prompt has {len(work.tokens):,} tokens, and the context holds {context - 1:,}: shorten it")


def _check_length(pipeline: Pipeline, texts: list[str], context: int) -> None:
  """Raises UserError for texts that cannot fit, after tokenizing about as much as could.

  A tokenizer blocks all other threads of the process while it works.
  """
  if len(texts) > context:
    raise PromptTooLong(f"the conversation must have at most {context:,} turns, got {len(texts):,}")
  whole = "\n".join(texts)
  size = _FIRST_LOOK * context
  while size < len(whole):
    # Twice the context: the cut may change the tokens next to it, but no others.
    if size >= _LONGEST_TOKEN * context or len(pipeline.tokenizer.encode(whole[:size])) > 2 * context:
      raise PromptTooLong(
        f"the prompt has {len(whole):,} characters, more than {context:,} tokens can hold: shorten it"
      )
    size *= 2
