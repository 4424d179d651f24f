"""The model section of a run that starts from a checkpoint: the sizes of its weights override the config file."""

import pathlib
import sys
from collections.abc import Collection, Mapping
from typing import Any

from jflow.config import RunConfig, TrainConfig
from jflow.errors import UserError
from jflow.interop import checkpoints, own_layout
from jflow.sections import refusal

# Section of the model -> the parts of the parameters whose sizes it holds: a model has one of them.
PARTS = {
  "language_model": ("language_model",),
  "understanding_encoder": ("understanding_encoder",),
  "autoencoder": ("vae", "vq"),
  "generation": ("generation_encoder", "generation_head"),
}
# No weight depends on it, so the run's own value stays.
_FREE = "language_model.max_length"


def model_of(config: RunConfig, given: Collection[str], workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the section `model` with the sections of `train.init_from`, or of the checkpoints of `train.init_parts`.

  A run that has begun keeps its own, even if the checkpoint has changed or gone. Kept from the config: fields that the
  command line sets, the context, the reader and the objectives, and generation and autoencoder where the checkpoint
  writes images in another way. A line on stderr names the fields that changed.

  Args:
    config: of the run; its model may still be plain values.
    given: dotted names of the fields that the command line sets.
    workdir: of the run.

  Raises:
    UserError: a checkpoint, or its config.json, cannot be read; the model is no sections of fields.
  """
  model, changed = dict(config.model), []
  for section in PARTS:
    without = section == "autoencoder" and section in model and model[section] is None
    if not (without or isinstance(model.get(section), Mapping)):
      raise refusal(f"model.{section}", model.get(section), "must be a section")
  theirs = {section: _plain(path) for section, path in _origins(config.train, workdir).items()}
  written = model["generation"].get("kind")
  for section in PARTS:
    if theirs[section][section] is None or model[section] is None:  # an autoencoder that a way to write does without
      continue
    taken = dict(theirs[section][section])
    explicit = {
      name: value
      for name, value in model[section].items()
      if _is_given(f"model.{section}.{name}", given) or f"{section}.{name}" == _FREE
    }
    another_kind = explicit.get("kind", taken.get("kind")) != taken.get("kind")
    absent = taken.get("kind") == "absent"  # missing parameters are refused later, by their names
    other_way = written not in (None, theirs[section]["generation"].get("kind"))
    if another_kind or absent or other_way and section in ("generation", "autoencoder"):
      continue
    made = taken | explicit
    changed += _changes(section, model[section], made)
    model[section] = made
  if not isinstance(model.get("objectives"), Mapping) or not all(
    isinstance(own, Mapping) for own in model["objectives"].values()
  ):
    raise refusal("model.objectives", model.get("objectives"), "must be a section of sections")
  model["objectives"] = dict(model["objectives"])
  for name, head in theirs["language_model"]["objectives"].items():
    if own := model["objectives"].get(name):  # the layer is the run's choice, the sizes are the checkpoint's
      section = f"objectives.{name}"
      explicit = {
        field: x for field, x in own.items() if field == "layer" or _is_given(f"model.{section}.{field}", given)
      }
      changed += _changes(section, own, head | explicit)
      model["objectives"][name] = head | explicit
  if changed and config.distributed.process_id == 0:
    print(f"jflow: the model is that of {config.train.init_from}: {', '.join(changed)}", file=sys.stderr)
  return model


def _is_given(field: str, given: Collection[str]) -> bool:
  """Whether the command line sets a field, or a section that holds it."""
  return any(field == name or field.startswith(f"{name}.") for name in given)


def _origins(train: TrainConfig, workdir: pathlib.Path) -> dict[str, str]:
  """Returns section of the model -> the checkpoint that it comes from."""
  try:
    own_layout.read_settings(workdir)
    return dict.fromkeys(PARTS, str(workdir))
  except UserError:  # no run yet, or its config.json is lost: this start is compared with a manifest's later
    return {section: origin(train, section) for section in PARTS}


def origin(train: TrainConfig, section: str) -> str:
  """The checkpoint that the weights of a section of the model come from."""
  parts = dict(train.init_parts)
  named = [parts[part] for part in PARTS.get(section, ("language_model",)) if part in parts]
  return named[0] if named else train.init_from


def _plain(path: str) -> dict[str, Any]:
  return checkpoints.read_config(path).to_dict()


def _changes(section: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  prefix = f"{section}." if section else ""
  same = lambda name: _listed(before.get(name)) == _listed(now[name])
  return [f"{prefix}{name}={now[name]} (not {before.get(name)})" for name in now if not same(name)]


def _listed(value: Any) -> Any:
  return list(value) if isinstance(value, tuple) else value
