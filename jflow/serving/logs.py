"""A rate-limited log: one line of a kind per second, and the number of lines left out."""

import collections
import logging
import sys
import time
from collections.abc import Hashable

_SECONDS = 1.0
_KINDS = 1000  # remembered; the oldest go


class OncePerSecond(logging.StreamHandler):
  """A log handler that writes one record of a kind per second, and then the number of those left out.

  The kind of a record is its place in the code together with `extra={"kind": ...}`.
  """

  def __init__(self, stream: object = None):
    super().__init__(stream or sys.stderr)
    self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    self._seen: collections.OrderedDict[Hashable, list] = collections.OrderedDict()  # [when, left out, record]

  def emit(self, record: logging.LogRecord) -> None:
    kind = _kind(record)
    seen = self._seen.get(kind)
    if seen and time.monotonic() - seen[0] < _SECONDS:
      seen[1] += 1
      return
    self.tell()
    self._seen[kind] = [time.monotonic(), 0, record]
    self._seen.move_to_end(kind)
    if len(self._seen) > _KINDS:
      self._seen.popitem(last=False)
    super().emit(record)

  def tell(self) -> None:
    """Writes how many records were left out, for each kind whose second is over."""
    with self.lock:
      for when, left_out, record in list(self._seen.values()):
        if left_out and time.monotonic() - when >= _SECONDS:
          self._seen[_kind(record)][1] = 0
          text = f"left out, {left_out:,} times: {record.getMessage()[:200]}"
          super().emit(logging.makeLogRecord({"msg": " ".join(text.split()), "levelno": record.levelno}))


def to_stderr() -> None:
  """Sends the log of the process to stderr, through `OncePerSecond`."""
  logging.basicConfig(handlers=[OncePerSecond()], level=logging.WARNING)
  logging.getLogger("jflow.serving").setLevel(logging.INFO)


def tell() -> None:
  """Writes how many records were left out so far; called about once per second."""
  for handler in logging.getLogger().handlers:
    if isinstance(handler, OncePerSecond):
      handler.tell()


def _kind(record: logging.LogRecord) -> Hashable:
  return record.name, record.pathname, record.lineno, getattr(record, "kind", None)
