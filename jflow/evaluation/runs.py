"""The data of the run that made a checkpoint, from its config.json; others have the defaults."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

from jflow.config import ObjectiveConfig
from jflow.data.examples import CAPTION_PROMPT
from jflow.errors import UserError
from jflow.generation.base import Family
from jflow.interop import native

# Of `objective.draws`, whatever the run had: the losses of two checkpoints are to be comparable.
_USUAL = {"time_mean": 0.0, "time_std": 1.0}


class Run(NamedTuple):
  """A run, as far as the loss of a record depends on it."""

  caption_prompt: str  # asks for the caption of a picture without a question
  validation: float  # share of the records that were held out; 0: none, or not known
  crop: str  # of pictures to write, as of `images.for_generation`, "center" in place of "random"
  objective: ObjectiveConfig  # how the writer draws


def run_of(path: pathlib.Path, family: Family) -> Run:
  """Returns what is known of a checkpoint's run.

  Args:
    path: a local workdir, its `checkpoints` folder or one step; any other has no run.
    family: its way to write images.
  """
  fields: dict[str, Any] = {}
  for folder in (path, path.parent, path.parent.parent):
    if (folder / "checkpoints").is_dir() and (folder / "config.json").is_file():
      try:
        fields = native.read_config(folder)
      except UserError:  # described when the checkpoint is opened
        break
      break
  data, draws = fields.get("data", {}), fields.get("objective", {}).get("draws") or {}
  names = [field.name for field in dataclasses.fields(family.draws)] if family.draws else []
  drawing = {name: _USUAL[name] if name in _USUAL else draws.get(name) for name in names}
  objective = ObjectiveConfig(weights={}, logged=(), draws=drawing)
  crop = {"random": "center"}.get(data.get("crop", ""), data.get("crop") or "center")
  return Run(data.get("caption_prompt") or CAPTION_PROMPT, float(data.get("validation", 0.0)), crop, objective)
