"""The sections of a run that its start from a checkpoint decides: its sizes, and how it is sampled."""

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
# No weight depends on it, so the run's own value stays, unless its rows are to be as long as it.
_FREE = "language_model.max_length"


def sections_of(config: RunConfig, given: Collection[str], workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the sections of a config that its start decides: `model` and `sampling`.

  A setting of `sampling` that the config does not name is the one of the checkpoint, if that writes images in the same
  way; where the command line sets the whole section, it counts alone. Arguments and errors as of `model_of`.
  """
  model = model_of(config, given, workdir)
  if "sampling" in given:
    return {"model": model}
  origin = _origins(config.train, workdir)["generation"]
  same = model["generation"].get("kind") == _plain(origin)["generation"].get("kind")
  theirs = checkpoints.sampling_of(origin) if same else {}
  return {"model": model, "sampling": {**theirs, **config.sampling}}


def model_of(config: RunConfig, given: Collection[str], workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the section `model` with the sections of `train.init_from`, or of the checkpoints of `train.init_parts`.

  A run that has begun keeps its own, even if the checkpoint has changed or gone. Kept from the config: fields that the
  command line sets, the context, the reader and the objectives, and generation and autoencoder where the checkpoint
  writes images in another way. A line on stderr says that the sizes are the checkpoint's, and names the fields in which
  the command line departs from it.

  Args:
    config: of the run; its model may still be plain values.
    given: dotted names of the fields that the command line sets.
    workdir: of the run.

  Raises:
    UserError: a checkpoint, or its config.json, cannot be read; the model is no sections of fields; the checkpoint
      writes images in another way, and the config names none of the parts that are then dropped, fresh, or from
      elsewhere.
  """
  model, taken_over, departs = dict(config.model), False, []
  for section in PARTS:
    without = section == "autoencoder" and section in model and model[section] is None
    if not (without or isinstance(model.get(section), Mapping)):
      raise refusal(f"model.{section}", model.get(section), "must be a section")
  free = _FREE if config.data.row_tokens else ""  # rows as long as the checkpoint's own context
  theirs = {section: _plain(path) for section, path in _origins(config.train, workdir).items()}
  written = model["generation"].get("kind")
  _check_way(config.train, written, theirs["generation"]["generation"].get("kind"))
  for section in PARTS:
    if theirs[section][section] is None or model[section] is None:  # an autoencoder that a way to write does without
      continue
    taken = dict(theirs[section][section])
    explicit = {
      name: value
      for name, value in model[section].items()
      if _is_given(f"model.{section}.{name}", given) or f"{section}.{name}" == free
    }
    another_kind = explicit.get("kind", taken.get("kind")) != taken.get("kind")
    absent = taken.get("kind") == "absent"  # missing parameters are refused later, by their names
    other_way = written not in (None, theirs[section]["generation"].get("kind"))
    if another_kind or absent or other_way and section in ("generation", "autoencoder"):
      continue
    made = taken | explicit
    taken_over |= _differ(model[section], made)
    departs += _departures(section, made, taken, given)
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
      taken_over |= _differ(own, head | explicit)
      departs += _departures(section, head | explicit, head, given)
      model["objectives"][name] = head | explicit
  if (taken_over or departs) and config.distributed.process_id == 0:
    but = f", but for {', '.join(departs)}" if departs else ""
    print(f"jflow: the model is that of {config.train.init_from} ({_size(model)}){but}", file=sys.stderr)
  return model


def _check_way(train: TrainConfig, written: str | None, theirs: str) -> None:
  """Raises UserError where the checkpoint writes images in another way and the config says nothing of those parts."""
  others = PARTS["generation"] + PARTS["autoencoder"]
  named = {*train.init_fresh, *train.init_dropped, *dict(train.init_parts)}
  if written in (None, theirs) or named & set(others):
    return
  what = (
    f"must be {theirs!r}, as {train.init_from} writes images: take a config of that way (codes: configs/janus/, as janus/tune; "
    f"flow: configs/, as tune), or name the parts that change in train.init_dropped and train.init_fresh"
  )
  raise refusal("model.generation.kind", written, what)


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


def _differ(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
  """Whether a field of `now` has another value in `before`."""
  return any(_listed(before.get(name)) != _listed(now[name]) for name in now)


def _departures(section: str, made: Mapping[str, Any], theirs: Mapping[str, Any], given: Collection[str]) -> list[str]:
  """The fields of a section that the command line sets and that differ from the checkpoint's, as text.

  An empty value of a field that the checkpoint's kind does not have is no difference.
  """
  return [
    f"{section}.{name}={made[name]} (there {theirs.get(name)})"
    for name in made
    if _is_given(f"model.{section}.{name}", given)
    and (name in theirs or made[name])
    and _listed(made[name]) != _listed(theirs.get(name))
  ]


def _size(model: Mapping[str, Any]) -> str:
  """The size of a model in a few words."""
  llm, encoder = model["language_model"], model["understanding_encoder"]
  return f"{llm.get('num_layers')} layers of {llm.get('embed_dim')}, images of {encoder.get('image_size')} pixels"


def _listed(value: Any) -> Any:
  return list(value) if isinstance(value, tuple) else value
