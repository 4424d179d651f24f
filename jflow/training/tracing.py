"""The profiler's trace of some steps of a run."""

import pathlib

import jax

from jflow.config import ProfileConfig
from jflow.training import hosts


class Trace:
  """A trace of the steps that the section `profile` names, into a folder."""

  def __init__(self, config: ProfileConfig, folder: pathlib.Path):
    self._config, self._folder, self._running = config, folder, False

  def at(self, step: int) -> None:
    """Starts the trace before the first step of its window, and ends it after the last one."""
    start, steps = self._config.start, self._config.steps
    inside = start <= step < start + steps
    if inside and not self._running:
      jax.profiler.start_trace(self._folder)
    elif self._running and not inside:
      jax.profiler.stop_trace()
      hosts.say(f"trace of {steps} steps: {self._folder}; open it with xprof or Perfetto")
    self._running = inside

  def stop(self) -> None:
    """Ends a trace that is running, where the run ends."""
    if self._running:
      jax.profiler.stop_trace()
