"""Checks of jflow's own checkpoints: config.json against names and shapes in a step's metadata; reads nothing else."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jflow.data.templates import TEMPLATES
from jflow.errors import UserError
from jflow.generation import base as generation
from jflow.interop import budget, native
from jflow.models import lora
from jflow.models.build import parameter_shapes
from jflow.models.config import ModelConfig
from jflow.objectives.base import OBJECTIVES
from jflow.strict_json import shown

_OLD = ("contrastive_head/",)  # of a loss of older versions
# A step that is smaller on disk than its arrays by more than this is damaged.
_DENSEST, _SMALL = 1000, 2**28


class Settings(NamedTuple):
  """The settings of the model in a workdir's config.json."""

  config: ModelConfig
  template: str  # of `data.templates.TEMPLATES`
  has_vae: bool
  sampling: Mapping[str, Any]  # see `generation.base.own_settings`


def read_settings(workdir: pathlib.Path) -> Settings:
  """Reads config.json of a workdir.

  Raises:
    UserError: the file is missing or damaged, or a field is missing, mistyped or out of range.
  """
  path = workdir / "config.json"
  fields = native.read_config(workdir)
  template = fields["data"]["template"]
  if template not in TEMPLATES:
    raise UserError(f"{path}: data.template={shown(template)} must be one of {', '.join(map(repr, TEMPLATES))}")
  has_vae = fields.get("has_vae", True)
  if type(has_vae) is not bool:
    raise UserError(f"{path}: has_vae={shown(has_vae)} must be true or false")
  try:
    config = ModelConfig.from_dict(fields["model"])
    sampling = generation.own_settings(generation.family(config.generation), fields.get("sampling", {}))
    return Settings(config, template, has_vae, sampling)
  except UserError as error:
    raise UserError(f"{path}: {error}") from None


def check_names(settings: Settings, found: Mapping[str, Any], step: pathlib.Path) -> None:
  """Checks names, shapes and types against config.json.

  Args:
    settings: of the checkpoint.
    found: parameter -> something with `shape` and `dtype`.
    step: the folder of the step.

  Raises:
    UserError: the checkpoint is of another model.
  """
  wanted = parameter_shapes(settings.config)
  heads = tuple(f"{head}/" for part in OBJECTIVES.all().values() for head in part.heads)  # they serve training alone
  not_needed = heads if settings.has_vae else (*heads, "vae/")
  for name, shape in sorted(wanted.items()):
    if name not in found and not name.startswith(not_needed):
      raise UserError(f"checkpoint {step} lacks {name}, which its config.json asks for: another model?")
    if name in found and tuple(found[name].shape) != shape:
      raise UserError(
        f"checkpoint {step}: {name} has shape {tuple(found[name].shape)}, its config.json asks for {shape}: another "
        "model?"
      )
  lora.check_complete({name: tuple(x.shape) for name, x in found.items()}, step)
  for name, x in found.items():
    if name not in wanted and not name.startswith((*heads, *_OLD)) and not lora.is_adapter(name):
      raise UserError(
        f"checkpoint {step} holds {shown(name)[1:-1]}, which its config.json does not ask for: another model?"
      )
    if np.dtype(x.dtype).name not in ("float32", "bfloat16", "float16"):
      raise UserError(
        f"checkpoint {step}: {shown(name)[1:-1]} has the type {x.dtype}, weights are float32, bfloat16 or float16"
      )


def check_bytes(found: Mapping[str, Any], step: pathlib.Path) -> None:
  """Checks the size of the parameters against memory and disk. Arguments as in `check_names`.

  Raises:
    UserError: they need more bytes than there are.
  """
  total = sum(int(np.prod(x.shape, dtype=object)) * np.dtype(x.dtype).itemsize for x in found.values())
  disk = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
  if total > _SMALL + _DENSEST * disk:
    raise UserError(f"checkpoint {step} claims {total:,} bytes of weights and has {disk:,} on disk: damaged")
  budget.check(total, step)
