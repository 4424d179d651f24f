"""Parts of a fresh model that are fitted to data, or follow from others, before the first step.

A fitter is a module with one function:

  fit(config, open_pipeline): returns {part: its parameters as numpy arrays}, empty for a config without such parts

`config` is the run's; `open_pipeline` opens the data of all processes, for parts that every process fits to the same
images. The arrays must be the same on every process.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from jflow import registry
from jflow.config import RunConfig
from jflow.data.pipeline import Pipeline
from jflow.generation.base import family
from jflow.models.config import ModelConfig

FITTERS = ("jflow.world.start",)


def fit(config: RunConfig, open_pipeline: Callable[[], Pipeline]) -> dict[str, dict[str, Any]]:
  """Returns {part: fitted parameters} of all fitters."""
  fitted: dict[str, dict[str, Any]] = {}
  for name in FITTERS:
    fitted |= registry.load(name).fit(config, open_pipeline)
  return fitted


def derived(model: ModelConfig, params: Mapping[str, Any], new: Collection[str]) -> dict[str, Any]:
  """Returns {path: value} of those of the `new` parameters that start as a function of others, see `Family.derived`."""
  rule = registry.load(family(model.generation).derived)
  made = rule(model, params) if rule else {}
  return {
    path: jax.device_put(x.astype(params[path].dtype), params[path].sharding) for path, x in made.items() if path in new
  }
