"""SIGTERM and SIGINT during a run.

Python runs a handler between two of its own instructions, so not while XLA compiles. What follows a signal is said by a
thread, which the interpreter's wake-up socket reaches at once.
"""

import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Generator
from typing import Any

_STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def answered(line: str) -> Generator[None]:
  """Context manager that prints `line` on stderr as soon as SIGTERM or SIGINT comes, where a handler waits for it.

  In the main thread alone; elsewhere it does nothing.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  reader, writer = socket.socketpair()
  writer.setblocking(False)

  def tell() -> None:
    while received := reader.recv(1):
      if received[0] in _STOPPING:
        print(f"jflow: {line}", file=sys.stderr, flush=True)

  before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
  thread = threading.Thread(target=tell, name="signals", daemon=True)
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    writer.close()  # which ends the thread
    thread.join()
    reader.close()


class StopFlag:
  """A handler that remembers SIGTERM and SIGINT until the step in progress is done; a second signal has no effect."""

  def __init__(self) -> None:
    self.signum = 0
    self._answered = answered("saving before exit, after the step or the compilation in progress ...")
    self._answered.__enter__()
    self._old = {s: signal.signal(s, self._note) for s in _STOPPING}

  def _note(self, signum: int, frame: Any) -> None:
    self.signum = self.signum or signum

  def restore(self) -> None:
    """Restores what there was before."""
    for signum, handler in self._old.items():
      signal.signal(signum, handler)
    self._answered.__exit__(None, None, None)
