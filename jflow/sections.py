"""Sections of a config: frozen dataclasses whose fields carry their constraints, from and to plain values."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, dataclass_transform

from jflow import registry
from jflow.errors import UserError
from jflow.strict_json import shown
from jflow.values import Check

_REQUIRED = object()


def field(check: Check, before: Any = _REQUIRED) -> Any:
  """Declares a field of a section, without a default; on a mapping, `check` applies to each value.

  The values of a `dict` become floats, those of a `Mapping` stay what they are.

  Args:
    check: value -> what it must be, or "" where it fits.
    before: the value for a config.json of a version without the field.
  """
  return dataclasses.field(metadata={"check": check, "before": before})


def section(place: str) -> Any:
  """Declares a section that another module knows: `place` is "package.module:Class", imported when a config is read."""
  return dataclasses.field(metadata={"section": place})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, section))
class Section:
  """A frozen dataclass of fields and other sections; a field of type Any is opaque."""

  def __init_subclass__(cls) -> None:
    dataclasses.dataclass(frozen=True, kw_only=True)(cls)

  def to_dict(self) -> dict[str, Any]:
    """Returns nested plain values, as config.json holds them; the inverse of `built`."""
    return _plain(self)

  def replace(self, **changes: Any) -> Self:
    """Returns a copy with other values, each checked by itself: `config.replace(train=dict(steps=3))`."""
    return _replaced(self, changes, "")


def refusal(field: str, value: Any, what: str) -> UserError:
  """Returns the error for a field whose value violates its constraint."""
  return UserError(f"config.{field} {what}, got {shown(value)}")


def flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
  """Yields (dotted name, value) of each field of nested sections."""
  for name, value in values.items():
    if isinstance(value, Mapping):
      yield from flat(value, f"{before}{name}.")
    else:
      yield before + str(name), value


def kinds(section: type, before: str = "") -> Iterator[tuple[str, Any]]:
  """Yields (dotted name, type) of each field of the config but the model's."""
  for declared in dataclasses.fields(section):
    if inner := _section(declared):
      yield from kinds(inner, f"{before}{declared.name}.")
    elif declared.type is not Any:
      yield before + declared.name, declared.type


def completed(values: Mapping[str, Any], section: type) -> dict[str, Any]:
  """Returns the plain values of an earlier version's config.json, its missing fields filled with `before`."""
  done = dict(values)
  for declared in dataclasses.fields(section):
    before = declared.metadata.get("before", _REQUIRED)
    if kind := _section(declared):
      inner = done.get(declared.name, {})
      done[declared.name] = completed(inner, kind) if isinstance(inner, Mapping) else inner
    elif before is not _REQUIRED:
      done.setdefault(declared.name, before)
  return done


def built(section: type, values: Any, opaque: Callable[[Any], Any], path: str = "") -> Any:
  """Builds a section from nested plain values, each field checked by itself.

  Args:
    section: the class.
    values: a value for each field.
    opaque: builds the value of a field of type Any.
    path: of the section in the config, "" or with a dot at its end.

  Raises:
    UserError: a field is missing, unknown or out of its constraint; the message names the first.
  """
  fields = {f.name: f for f in dataclasses.fields(section)}
  if not isinstance(values, Mapping):
    raise refusal(path[:-1], values, f"must be a section with {', '.join(fields)}")
  for name in fields:
    if name not in values:
      what = "section" if _section(fields[name]) else "field"
      raise UserError(f"the config has no {what} {path}{name}: start from what configs/base.py returns")
  for name in values:
    if name not in fields:
      raise UserError(f"unknown field {path}{shown(name)[1:-1]}; {path[:-1] or 'the config'} has {', '.join(fields)}")
  made = {}
  for name, declared in fields.items():
    if kind := _section(declared):
      made[name] = built(kind, values[name], opaque, f"{path}{name}.")
    else:
      made[name] = opaque(values[name]) if declared.type is Any else _checked(declared, values[name], path)
  return section(**made)


def _section(declared: dataclasses.Field) -> Any:
  """The class of a field that is a section; None for any other."""
  if place := declared.metadata.get("section"):
    return registry.load(place)
  return declared.type if dataclasses.is_dataclass(declared.type) else None


def _checked(declared: dataclasses.Field, value: Any, path: str) -> Any:
  """Converts a value to its field's type: lists to tuples, a whole number to a float; raises UserError."""
  name, needed = path + declared.name, declared.metadata["check"]
  value = _tuples(value)
  if declared.type in (dict, dict | None, Mapping):
    if value is None and declared.type == dict | None:
      return None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
      raise refusal(name, value, "must be a mapping of names")
    for key, one in value.items():
      if what := needed(one):
        raise refusal(f"{name}.{key}", one, what)
    return dict(value) if declared.type is Mapping else {key: float(one) for key, one in value.items()}
  if what := needed(value):
    raise refusal(name, value, what)
  return float(value) if declared.type is float else value


def _tuples(value: Any) -> Any:
  return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _replaced(section: Any, changes: Mapping[str, Any], path: str) -> Any:
  new, fields = {}, {f.name: f for f in dataclasses.fields(section)}
  for name, value in changes.items():
    if name not in fields:
      raise UserError(f"unknown field {path}{name}; {path[:-1] or 'the section'} has {', '.join(fields)}")
    now = getattr(section, name)
    if dataclasses.is_dataclass(now) and isinstance(value, Mapping):
      value = _replaced(now, value, f"{path}{name}.")
    elif "check" in fields[name].metadata:
      value = _checked(fields[name], value, path)
    new[name] = value
  return dataclasses.replace(section, **new)


def _plain(value: Any) -> Any:
  if dataclasses.is_dataclass(value):
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {name: one.to_dict() if hasattr(one, "to_dict") else _plain(one) for name, one in fields.items()}
  return dict(value) if isinstance(value, Mapping) else value
