"""The work of the tests' loader processes: batches of numbers, and faults. It needs no jax, so they start fast."""

import os
import signal
from typing import NamedTuple

import numpy as np

from jflow.errors import UserError


class Numbers(NamedTuple):
  small: np.ndarray
  large: np.ndarray  # more than a pipe takes at once
  empty: np.ndarray


def numbers(count: int, fault: str, index: int, processes: int):
  """Every n-th of `count` batches; the loader of number 5 meets the fault."""
  for number in range(index, count, processes):
    if number == 5:
      FAULTS[fault]()
    yield (
      Numbers(np.full(3, number), np.full((2, 2**19), number, np.float32), np.zeros((0, 4), np.int8)),
      number,
      "rest",
    )


def _raise(error: Exception):
  raise error


FAULTS = {
  "none": lambda: None,
  "user": lambda: _raise(UserError("record 5 of DIR is bad")),
  "bug": lambda: _raise(KeyError("five")),
  "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
  "exit": lambda: os._exit(3),
  "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


class Work:
  """`numbers` with its first arguments, as a loader gets it."""

  def __init__(self, count: int, fault: str):
    self.count, self.fault = count, fault

  def __call__(self, index: int, processes: int):
    return numbers(self.count, self.fault, index, processes)
