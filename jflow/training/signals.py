"""SIGTERM and SIGINT during a run."""

import signal
import sys
from typing import Any


class StopFlag:
  """A handler that remembers SIGTERM and SIGINT until the step in progress is done; a second signal has no effect."""

  def __init__(self) -> None:
    self.signum = 0
    self._old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}

  def _note(self, signum: int, frame: Any) -> None:
    self.signum = self.signum or signum
    print("jflow: saving before exit ...", file=sys.stderr, flush=True)

  def restore(self) -> None:
    for signum, handler in self._old.items():
      signal.signal(signum, handler)
