"""Timing: seconds per call as {min, median, max}, candidates side by side in one run."""

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
  candidates: Mapping[str, Callable[[], object]],
  repeats: int,
  warmup: int = 1,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
  """Times each candidate `repeats` times in alternation (a, b, a, b, ...), so that other load affects all alike.

  Args:
    candidates: name -> call that returns once its work is done (block on device results inside).
    repeats: timed rounds, at least 1.
    warmup: untimed rounds before (compilation, caches).
    clock: seconds; `time.process_time` for CPU seconds of all threads.

  Returns:
    name -> {"min", "median", "max"} in seconds.
  """
  seconds: dict[str, list[float]] = {name: [] for name in candidates}
  for round_ in range(-warmup, repeats):
    for name, call in candidates.items():
      start = clock()
      call()
      if round_ >= 0:
        seconds[name].append(clock() - start)
  return {name: spread(values) for name, values in seconds.items()}


def spread(values: list[float]) -> dict[str, float]:
  """{"min", "median", "max"} of a list."""
  return {"min": min(values), "median": statistics.median(values), "max": max(values)}
