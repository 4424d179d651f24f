"""Parts of a fresh model that are fitted to data before the first step.

A fitter is a module with one function:

  fit(config, open_pipeline): returns {part: its parameters as numpy arrays}, empty for a config without such parts

`config` is the run's; `open_pipeline` opens the data of all processes, for parts that every process fits to the same
images. The arrays must be the same on every process.
"""

from collections.abc import Callable
from typing import Any

from jflow import registry
from jflow.config import RunConfig
from jflow.data.pipeline import Pipeline

FITTERS = ("jflow.world.start",)


def fit(config: RunConfig, open_pipeline: Callable[[], Pipeline]) -> dict[str, dict[str, Any]]:
  """Returns {part: fitted parameters} of all fitters."""
  fitted: dict[str, dict[str, Any]] = {}
  for name in FITTERS:
    fitted |= registry.load(name).fit(config, open_pipeline)
  return fitted
