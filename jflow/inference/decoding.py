"""Continuous batching: requests enter and leave the rows of one running batch.

decoder = Decoder(pipeline, slots=8, context=2048)
slot = decoder.admit(pipeline.request("What color is it?", ["circle.png"]))
while decoder.busy:
  for progress in decoder.step(8):
    ...  # progress.slot, progress.tokens, progress.finished
    if progress.finished:
      decoder.release(progress.slot)  # from here another request may take the row
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.inference import reading
from jflow.models.cache import MANY_ROWS
from jflow.programs import shapes

_SMALLEST = 32  # slots of the shortest bucket of prompts
_NEAR = 256  # fewest slots of the cache that attention covers


class Request(NamedTuple):
  """A checked prompt and how to answer it. Made by `Pipeline.request`."""

  tokens: np.ndarray  # int32[n]
  image_starts: tuple[int, ...]  # first slot of each image
  images: np.ndarray  # uint8[M, H, W, 3]
  max_tokens: int
  temperature: float
  top_p: float
  seed: int


class Progress(NamedTuple):
  """The result of a step for one row."""

  slot: int
  tokens: list[int]  # new tokens of the answer; the end of the text is not among them
  finished: str | None  # "stop": the answer ended; "length": it reached its limit; None: not finished


def bucket(length: int) -> int:
  """The slots for a prompt of `length`: four sizes per power of two, so that a new length rarely compiles."""
  step = max(_SMALLEST, 1 << max(0, (length - 1).bit_length() - 3))
  return -(-length // step) * step


def power_of_two(count: int, least: int = 1) -> int:
  """The smallest power of two that is at least `count` and `least`."""
  return max(least, 1 << (count - 1).bit_length()) if count else 0


def _covered(longest: int, rows: int) -> int:
  """The slots that attention covers where the longest row has `longest`: one program for each result.

  A power of two, or for many rows a multiple of 128 and at most eight sizes per power of two.
  """
  if rows < MANY_ROWS:
    return power_of_two(longest, _NEAR)
  step = max(128, power_of_two(longest) // 8)
  return max(_NEAR, -(-longest // step) * step)


def prompt_arrays(pipeline: Any, request: Request, most: int) -> tuple[np.ndarray, jax.Array, np.ndarray, np.ndarray]:
  """The arguments of `reading.prefill` for a request, its images encoded, padded to buckets of at most `most` slots.

  Returns:
    (int32[S] tokens, [Z, D] image slots, int32[S] indices into them, int32[] length).
  """
  config, n = pipeline.model.config, len(request.tokens)
  s, k = min(bucket(n), most), 1 + config.patches
  tokens, index = np.full(s, pipeline.tokenizer.pad, np.int32), np.full(s, -1, np.int32)
  tokens[:n] = request.tokens
  for i, start in enumerate(request.image_starts):
    index[start : start + k] = i * k + np.arange(k)
  count = len(request.images)
  if count:
    images = np.zeros((power_of_two(count), *request.images.shape[1:]), np.uint8)
    images[:count] = request.images
    seen = reading.look(pipeline.model, pipeline.params, images)
  else:
    seen = jnp.zeros((0, config.language_model.embed_dim), pipeline.model.dtype)
  return tokens, seen, index, np.int32(n)


class Decoder:
  """A running batch of rows on the device; a row's answer does not depend on the other rows.

  Prefill is compiled once per bucket of prompt lengths, decoding once per size of the longest row (see `_covered`);
  both once more where a row is not greedy.
  """

  def __init__(self, pipeline: Any, slots: int, context: int, ignore_end: bool = False):
    """
    Args:
      pipeline: the model.
      slots: rows, i.e. answers made at the same time.
      context: prompt and answer of a row have room for this many tokens; at most the model's own context.
      ignore_end: every answer has `max_tokens` tokens, for benchmarks.

    Raises:
      UserError: less than one row, or a context out of the model's range.
    """
    most = pipeline.model.config.language_model.max_length
    if slots < 1:
      raise UserError(f"slots={slots} must be at least 1")
    if not 1 < context <= most:
      raise UserError(f"context={context} must be in 2..{most}, the model's own")
    self._pipeline, self._eos = pipeline, -1 if ignore_end else pipeline.tokenizer.eos
    self._model, self._params = pipeline.model, pipeline.params
    self.context = context
    self._rows = reading.Rows.empty(self._model, slots, bucket(context))
    self._shapes = shapes(self._rows)
    self._free = list(range(slots))[::-1]
    self._lengths = np.zeros(slots, np.int64)  # slots of the cache in use
    self._going = np.zeros(slots, bool)
    self._greedy = np.ones(slots, bool)  # the temperature of the row's request is 0
    self._longest, self._draws = 0, False  # of the prepared requests: most slots needed; whether one is not greedy
    self._first: dict[int, jax.Array] = {}  # rows admitted since the last step

  @property
  def free(self) -> int:
    """The number of free rows."""
    return len(self._free)

  @property
  def busy(self) -> bool:
    """Whether a row is still being answered."""
    return bool(self._first) or bool(self._going.any())

  def prepare(self, request: Request, compile: bool = True) -> bool:
    """Compiles the programs that answer a request, or only checks that they are compiled.

    May be called from another thread than the other methods.

    Returns:
      Whether all of them are compiled.
    """
    config, n, count = self._model.config, len(request.tokens), len(request.images)
    most = self._shapes.cache.filled.shape[1]

    to = (compile, self._model, self._params)
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    seen = array(self._model.dtype, 0, config.language_model.embed_dim)
    if count:
      seen = reading.look.prepare(*to, array(jnp.uint8, power_of_two(count), *request.images.shape[1:]))
    tokens, whole = array(jnp.int32, min(bucket(n), most)), array(jnp.int32)
    done = (
      seen is not None
      and reading.admit.prepare(
        *to,
        self._shapes,
        whole,
        tokens,
        seen,
        tokens,
        whole,
        whole,
        array(jnp.float32),
        array(jnp.float32),
        array(jnp.uint32),
        eos=self._eos,
        greedy=request.temperature == 0,
      )
      is not None
    )
    longest = min(n + request.max_tokens, self.context) + reading.CHUNK
    if compile:
      self._longest, self._draws = max(self._longest, longest), self._draws or request.temperature > 0
    # The rows beside a row that draws run its program, however long they are.
    kinds = [True] + [False] * (self._draws or request.temperature > 0)
    near, rows = 0, len(self._going)
    while done and near < min(max(longest, self._longest if len(kinds) > 1 else 0), most):
      near = min(_covered(max(near + 1, n), rows), most)
      for greedy in kinds:
        done = (
          done and reading.run.prepare(*to, self._shapes, whole, eos=self._eos, slots=near, greedy=greedy) is not None
        )
    return done

  def admit(self, request: Request) -> int:
    """Prefills a free row with a prompt; the next steps decode its answer.

    Returns:
      The slot.

    Raises:
      UserError: no row is free, or the prompt leaves no room in this decoder's context.
    """
    n = len(request.tokens)
    if n >= self.context:
      raise UserError(f"the prompt has {n} tokens, and the context holds {self.context - 1}: shorten it")
    if not self._free:
      raise UserError("no slot is free: release one first")
    prompt = prompt_arrays(self._pipeline, request, self._rows.cache.filled.shape[1])
    slot = self._free.pop()
    self._rows, self._first[slot] = reading.admit(
      self._model,
      self._params,
      self._rows,
      np.int32(slot),
      *prompt,
      np.int32(min(request.max_tokens, self.context - n)),
      np.float32(request.temperature),
      np.float32(request.top_p),
      np.uint32(request.seed),
      eos=self._eos,
      greedy=request.temperature == 0,
    )
    self._lengths[slot], self._going[slot], self._greedy[slot] = n, False, request.temperature == 0
    return slot

  def step(self, n: int) -> list[Progress]:
    """Decodes up to `n` tokens for every row in one program; a newly admitted row also returns its first token.

    Args:
      n: tokens per row, 0 to `reading.CHUNK`: few for the latency of a stream, many for throughput.

    Returns:
      One entry per row that was not finished, with a reason where it now is.
    """
    if not 0 <= n <= reading.CHUNK:
      raise ValueError(f"n={n} must be in 0..{reading.CHUNK}")
    first, self._first = self._first, {}
    waiting = [slot for slot in range(len(self._going)) if self._going[slot] or slot in first]
    if not waiting:
      return []
    new = np.full((0, len(self._going)), -1, np.int32)
    if n:
      longest = int(max(self._lengths[slot] for slot in waiting)) + n
      near = min(_covered(longest, len(self._going)), self._rows.cache.filled.shape[1])
      greedy = bool(self._greedy[waiting].all())
      self._rows, new = reading.run(
        self._model, self._params, self._rows, np.int32(n), eos=self._eos, slots=near, greedy=greedy
      )
    new, active, first = jax.device_get((new, self._rows.active, first))
    out = []
    for slot in waiting:
      tokens = ([int(first[slot])] if slot in first else []) + [int(t) for t in new[:, slot] if t >= 0]
      ended = bool(tokens) and tokens[-1] == self._eos
      self._lengths[slot] += len(tokens) - (slot in first)
      self._going[slot] = bool(active[slot])
      finished = None if active[slot] else "stop" if ended else "length"
      out.append(Progress(slot, tokens[:-1] if ended else tokens, finished))
    return out

  def release(self, slot: int) -> None:
    """Frees a row, finished or not (a client may have disconnected)."""
    if slot in self._free or not 0 <= slot < len(self._going):
      raise ValueError(f"slot {slot} is not in use")
    self._first.pop(slot, None)
    if self._going[slot]:
      self._rows = self._rows.replace(active=self._rows.active.at[slot].set(False))
    self._going[slot] = False
    self._free.append(slot)


class Text:
  """An incremental detokenizer: a character is returned once all its bytes are there.

  Attributes:
    text: the answer so far, stripped.
    tokens: its tokens, up to the one that completes a stop sequence.
    stopped: whether a stop sequence, which the text does not contain, has ended the answer.
  """

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
    """`stops`: stop sequences; the first one to be complete ends the answer, and no part of it is returned."""
    self._tokenizer, self._stops = tokenizer, tuple(stops)
    self.text, self.tokens, self.stopped = "", [], False

  def add(self, tokens: Sequence[int], last: bool = False) -> str:
    """Returns the text that these tokens add.

    It is "" while a character or a possible stop sequence is incomplete.
    """
    if self.stopped:
      return ""
    before = len(self.tokens)
    self.tokens += tokens
    text = self._decoded(len(self.tokens))
    if (end := _first_stop(text, self._stops)) is not None:
      self.stopped, text = True, text[:end]
      counts = range(before + 1, len(self.tokens))
      whole = (n for n in counts if _first_stop(self._decoded(n), self._stops) is not None)
      del self.tokens[next(whole, len(self.tokens)) :]
    elif not last:
      if text.rstrip().endswith("\ufffd"):
        return ""
      text = text[: len(text) - _begun_stop(text, self._stops)]
    piece, self.text = text.rstrip()[len(self.text) :], text.rstrip()
    return piece

  def _decoded(self, count: int) -> str:
    """The text of the first tokens, without the space that the templates put before an answer."""
    return self._tokenizer.decode(self.tokens[:count]).lstrip()


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
  """Where the stop sequence that is complete first begins, however the text was cut into pieces; None without one."""
  found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
  return min(found)[1] if found else None


def _begun_stop(text: str, stops: Sequence[str]) -> int:
  """The length of the longest suffix of a text that is a proper prefix of a stop sequence."""
  ends = (n for stop in stops for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
  return max(ends, default=0)


def answer_all(
  pipeline: Any,
  requests: Sequence[Request],
  slots: int,
  stream: Callable[[int, str], None] | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> list[str]:
  """Answers requests through `slots` rows, the longest prompts first; see `Pipeline.understand_batch`."""
  context = pipeline.model.config.language_model.max_length
  need = max(len(r.tokens) + r.max_tokens for r in requests)
  decoder = Decoder(pipeline, min(slots, len(requests)), min(context, power_of_two(need, _NEAR)))
  if stream:  # what is said while a program compiles must not stand inside an answer
    for request in requests:
      decoder.prepare(request)
  texts = [Text(pipeline.tokenizer) for _ in requests]
  waiting = sorted(range(len(requests)), key=lambda i: len(requests[i].tokens))
  owner: dict[int, int] = {}
  done, n = 0, 1 if stream else 16
  while waiting or owner:
    while waiting and decoder.free:
      owner[decoder.admit(requests[waiting[-1]])] = waiting[-1]
      waiting.pop()
    for slot, tokens, finished in decoder.step(n):
      i = owner[slot]
      piece = texts[i].add(tokens, last=finished is not None)
      if stream and piece:
        stream(i, piece)
      if finished:
        decoder.release(slot)
        del owner[slot]
        done += 1
        if progress:
          progress(done, len(requests))
    n = min(2 * n, reading.CHUNK if not stream else 8)
  return [text.text for text in texts]
