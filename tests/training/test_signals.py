"""Signals of a run: what is said while the main thread cannot run Python."""

import ctypes
import io
import os
import signal
import threading
import time

from jflow.training.signals import StopFlag

MINUTE = 60.0  # seconds after which a test that waits has failed


def test_a_signal_is_answered_while_the_main_thread_is_in_a_library(monkeypatch):
  """As in XLA's compiler: a lock of C holds the main thread, so that no handler of Python can run."""
  library, lock, told = ctypes.CDLL(None), ctypes.create_string_buffer(256), threading.Event()
  noted: list[int] = []

  class Stderr(io.StringIO):
    def write(self, text: str) -> int:
      noted.append(flag.signum)
      told.set()
      return super().write(text)

  before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
  monkeypatch.setattr("sys.stderr", Stderr())
  flag = StopFlag()
  try:

    def send() -> None:
      while ctypes.c_int.from_buffer(lock).value != 2:  # glibc: locked, and waited for
        time.sleep(0.001)
      os.kill(os.getpid(), signal.SIGTERM)
      told.wait(MINUTE)
      library.pthread_mutex_unlock(lock)

    library.pthread_mutex_lock(lock)
    threading.Thread(target=send).start()
    library.pthread_mutex_lock(lock)
  finally:
    flag.restore()
  assert noted and noted[0] == 0 and flag.signum == signal.SIGTERM
  assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)] == before
