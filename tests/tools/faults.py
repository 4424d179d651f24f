"""Trains with a fault in it, for the tests of reliability and tests/tools/soak.py:

  python tests/tools/faults.py FAULT STEP PROCESS -- --config=... --workdir=...

The fault strikes process PROCESS (0 in a run of one) when it loads the batch of step STEP. Faults:
  raise      an exception, as a loader's mistake gives one
  sleep      a stall in Python: the process lives, its heartbeats go on, its steps do not
  hold       C code that sleeps and holds Python's interpreter lock
  segfault   a crash in C code
  abort      SIGABRT, as a failed check in C++ gives it
  kill       SIGKILL, as the kernel does when memory runs out
  freeze     SIGSTOP: the whole process stands still
  full       no file can grow beyond what it is: the disk is full
"""

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any


def _raise() -> None:
  raise RuntimeError("a fault was asked for")


def _full() -> None:
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))


FAULTS = {
  "raise": _raise,
  "sleep": lambda: time.sleep(3600),
  "hold": lambda: ctypes.PyDLL(None).sleep(3600),
  "segfault": lambda: ctypes.string_at(0),
  "abort": os.abort,
  "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
  "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
  "full": _full,
}


def struck(batches: Iterator[Any], start: int, fault: str, step: int, process: int) -> Iterator[Any]:
  """Hands on the batches of the steps after `start`; the fault strikes before that of `step`."""
  import jax

  for at, batch in enumerate(batches, start=start + 1):
    if at == step and jax.process_index() == process:
      FAULTS[fault]()
    yield batch


def main(argv: list[str]) -> int:
  """Runs `train` with the fault."""
  fault, step, process = argv[0], int(argv[1]), int(argv[2])
  from jflow.__main__ import main as jflow
  from jflow.data.pipeline import Pipeline

  batches = Pipeline.batches
  Pipeline.batches = lambda self, start, stop: struck(batches(self, start, stop), start, fault, step, process)
  return jflow(["train", *argv[4:]])


if __name__ == "__main__":
  sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
  sys.exit(main(sys.argv[1:]))
