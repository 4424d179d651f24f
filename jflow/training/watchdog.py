"""A watchdog that ends a process whose training hangs: a hung collective, disk or loader raises no error."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

_FIRST = 10  # factor for slow steps: the first compiles, the last waits for the checkpoint


class Watchdog:
  """Expects a step every `seconds`; otherwise prints the reason and the stacks of all threads, and exits with code 1.

  A run starts it before its first step, once the data is planned and the state is there.

  A Python thread does it and prints the reason; where C code holds the interpreter, so that the thread cannot run,
  `faulthandler` prints the stacks and exits from C a little later.
  """

  def __init__(self, seconds: float, waiting_for: Callable[[], str] = lambda: ""):
    """`seconds`: 0 turns it off. `waiting_for` returns the other process that the run is waiting for, "" for none.

    The message then names that process, in place of the stacks of this one.
    """
    self._waiting_for = waiting_for
    self._seconds, self._allowed, self._what, self._deadline = seconds, seconds, "the start", float("inf")
    self._ended = threading.Event()
    if seconds:
      threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

  def beat(self, what: str, slow: bool = False) -> None:
    """Restarts the timer. `what`: the work that has just ended; `slow`: whether the next may take long."""
    if self._seconds:
      self._allowed = self._seconds * (_FIRST if slow else 1)
      faulthandler.dump_traceback_later(1.25 * self._allowed + 1, exit=True)
      self._what, self._deadline = what, time.monotonic() + self._allowed

  def stop(self) -> None:
    self._ended.set()
    if self._seconds:
      faulthandler.cancel_dump_traceback_later()

  def _watch(self) -> None:
    while not self._ended.wait(min(1.0, self._seconds / 10)):
      if time.monotonic() > self._deadline:
        other = self._waiting_for()
        print(
          f"jflow: no step for {self._allowed:g} s (train.watchdog_seconds={self._seconds:g}) after {self._what}"
          f"{f', since {other} sends nothing' if other else ''}; this process ends here, and the same command goes on "
          f"from the last checkpoint{'' if other else '. What each thread was doing:'}",
          file=sys.stderr,
          flush=True,
        )
        if not other:
          faulthandler.dump_traceback(all_threads=True)
        os._exit(1)
