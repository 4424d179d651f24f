"""The body of a request: read within bounds of memory, and parsed as strict JSON."""

import asyncio
import collections
import contextlib
import json
import math
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

from starlette.requests import Request

from jflow.serving.schemas import ApiError

_DEEPEST = 64  # nested lists and objects; code that walks them by recursion needs a bound
_TOO_DEEP = f"it is nested deeper than {_DEEPEST} levels"
# Characters "[", "{" and ",": each can begin a value, which takes far more memory than the character.
_MOST_MARKS = 2**18
_LONGEST_NUMBER = 64  # characters
_DRAINED = 16  # times the limit that is still read of a body that is too long, so that the client gets the answer
_KEPT = 16  # bodies of the largest size kept at the same time


class Bodies:
  """The request bodies in memory, bounded in total: beyond the limit the slowest one is dropped."""

  def __init__(self, largest: int, seconds: float, kept: int = _KEPT):
    """Args: `largest` body in bytes, `seconds` for one to arrive, number of that size that may be `kept`."""
    self._largest, self._most, self._seconds = largest, kept * largest, seconds
    self._kept = 0  # bytes
    self._arriving: set[_Arriving] = set()

  @contextlib.asynccontextmanager
  async def read(self, request: Request) -> AsyncIterator[bytes]:
    """The body of a request, counted as kept until the context ends.

    Raises:
      ApiError: 413 when it is too long, 408 when it arrives too slowly, 503 when dropped to make room for others.
    """
    self._check_announced(request)
    body = _Arriving()
    self._arriving.add(body)
    try:
      try:
        async with asyncio.timeout(self._seconds) as body.patience:
          async for chunk in request.stream():
            self._take(body, chunk)
            if body.seen > _DRAINED * self._largest:
              break
      except TimeoutError:
        if not body.dropped:
          raise ApiError(408, f"the body did not arrive within {self._seconds:g} s") from None
      finally:
        self._arriving.discard(body)
      if body.dropped:
        raise ApiError(
          503,
          "the body came slower than others, which needed its memory: try again",
          headers={"Retry-After": "1"},
        )
      if body.seen > self._largest:
        raise self._too_long()
      yield body.joined()
    finally:
      self._kept -= body.size

  def _check_announced(self, request: Request) -> None:
    """Refuses a body by its Content-Length, before a client that waits for 100 Continue sends it."""
    length = request.headers.get("content-length", "")
    waits = request.headers.get("expect", "").lower() == "100-continue"
    if waits and length.isdecimal() and int(length) > self._largest:
      raise self._too_long()

  def _too_long(self) -> ApiError:
    return ApiError(413, f"the body has more than {self._largest:,} bytes, the most that this server takes")

  def _take(self, body: "_Arriving", chunk: bytes) -> None:
    """Keeps a chunk of a body, unless the body is too long."""
    body.seen += len(chunk)
    if body.dropped:
      return
    if body.seen > self._largest:
      self._free(body)
      return
    body.chunks.append(chunk)
    body.size += len(chunk)
    self._kept += len(chunk)
    while self._kept > self._most and (holding := [other for other in self._arriving if other.size]):
      slowest = min(holding, key=lambda other: other.rate())
      self._free(slowest)
      slowest.drop()

  def _free(self, body: "_Arriving") -> None:
    self._kept -= body.size
    body.size = 0
    body.chunks.clear()


class _Arriving:
  """A body that is being received."""

  def __init__(self) -> None:
    self.chunks: list[bytes] = []
    self.size, self.seen, self.dropped = 0, 0, False  # bytes kept, bytes that came
    self.patience: asyncio.Timeout | None = None
    self._began = asyncio.get_running_loop().time()

  def rate(self) -> float:
    """Bytes per second."""
    return self.seen / (asyncio.get_running_loop().time() - self._began + 0.1)

  def drop(self) -> None:
    """Ends the reading."""
    self.dropped = True
    if self.patience is not None:
      self.patience.reschedule(0)

  def joined(self) -> bytes:
    """The whole body; frees its chunks."""
    whole = b"".join(self.chunks)
    self.chunks.clear()
    return whole


def _constant(name: str) -> NoReturn:
  raise ValueError(f"{name} is not a number of JSON")


def parse_json(body: bytes, constant: Callable[[str], Any] = _constant) -> dict[str, Any]:
  """Parses a body as a JSON object: UTF-8, unique names, finite numbers, whole characters, bounded depth.

  `constant` converts NaN, Infinity and -Infinity, which are not JSON; by default it refuses them.

  Raises:
    ApiError: 400 for anything else.
  """
  if sum(map(body.count, (b"[", b"{", b","))) > _MOST_MARKS:
    raise ApiError(400, f"the body must have at most {_MOST_MARKS:,} values")
  try:
    value = json.loads(
      body.decode("utf-8-sig"),
      object_pairs_hook=_object,
      parse_constant=constant,
      parse_int=_integer,
      parse_float=_number,
    )
    _check(value)
  except (ValueError, RecursionError) as error:
    reason = _TOO_DEEP if isinstance(error, RecursionError) else str(error)
    raise ApiError(400, f"the body is not JSON that can be read: {reason}"[:300]) from None
  if not isinstance(value, dict):
    raise ApiError(400, "the body must be a JSON object")
  return value


def _check(value: Any) -> None:
  """Raises ValueError for a value nested too deeply or with half a surrogate pair; does not recurse."""
  level, depth = [value], 0
  while level:
    if depth > _DEEPEST:
      raise ValueError(_TOO_DEEP)
    depth += 1
    below: list[Any] = []
    for x in level:
      if isinstance(x, str):
        _whole(x)
      elif isinstance(x, list):
        below += x
      elif isinstance(x, dict):
        for name in x:
          _whole(name)
        below += x.values()
    level = below


def _whole(text: str) -> None:
  if not text.isascii():
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise ValueError(f"half a surrogate pair stands alone in a text, at character {error.start}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  made = dict(pairs)
  if len(made) < len(pairs):
    twice = next(name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1)
    raise ValueError(f"the name {twice[:80]!r} stands twice in an object")
  return made


def _integer(digits: str) -> int:
  if len(digits) > _LONGEST_NUMBER:
    raise ValueError(f"a number has {len(digits):,} digits")
  return int(digits)


def _number(digits: str) -> float:
  if len(digits) > _LONGEST_NUMBER or not math.isfinite(value := float(digits)):
    raise ValueError(f"the number {digits[:40]} is too long or too large")
  return value
