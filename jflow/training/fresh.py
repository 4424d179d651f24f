"""Parts of a fresh model that are fitted to data before the first step.

A fitter is a module with two functions:

  check(config, model): raises UserError where the run's config asks it for what it cannot do
  fit(config, model, open_pipeline): returns {part: its parameters as numpy arrays}, empty where nothing is to be fitted

`config` is the run's, `model` the model's; `open_pipeline` opens the data of all processes, for parts that every process
fits to the same pictures. The arrays must be the same on every process.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from jflow.data.pipeline import Pipeline
from jflow.models.config import JanusFlowConfig

FITTERS = ("jflow.world.start",)


def check(config: Mapping[str, Any], model: JanusFlowConfig) -> None:
  """Checks what the fitters are asked for, before a device is touched.

  Raises:
    UserError: naming the field, its value, and what is allowed.
  """
  for name in FITTERS:
    importlib.import_module(name).check(config, model)


def fit(
  config: Mapping[str, Any], model: JanusFlowConfig, open_pipeline: Callable[[], Pipeline]
) -> dict[str, dict[str, Any]]:
  """Returns {part: fitted parameters} of all fitters."""
  fitted: dict[str, dict[str, Any]] = {}
  for name in FITTERS:
    fitted |= importlib.import_module(name).fit(config, model, open_pipeline)
  return fitted
