"""Registries of the kinds that a config names: ways to write images, objectives, LLM architectures.

An entry is built in, added by `register`, or declared by an installed package as an entry point. An entry is imported
at its first use, and a name in a checkpoint's config is only looked up, never imported as a module.
"""

import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jflow.errors import UserError, one_line
from jflow.strict_json import shown


def load(place: Any) -> Any:
  """Returns the object at "package.module:attribute", or the module; anything but text is returned unchanged."""
  if not isinstance(place, str):
    return place
  module, _, attribute = place.partition(":")
  found = importlib.import_module(module)
  return getattr(found, attribute) if attribute else found


def imported(field: str, name: str, what: str) -> Any:
  """Returns the function at an import path "package.module:function" that a user has named.

  Args:
    field: the config field or flag that named it, for messages.
    name: the import path.
    what: the function it must be, for messages.

  Raises:
    UserError: it cannot be imported, or is no function.
  """
  module, _, attribute = name.partition(":")
  try:
    function = getattr(importlib.import_module(module), attribute)
  except Exception as error:  # of the module: whatever it raises
    hint = "; its folder must be on PYTHONPATH" if isinstance(error, ModuleNotFoundError) else ""
    raise UserError(f"{field}: {name} cannot be imported: {type(error).__name__}: {one_line(error)}{hint}") from error
  if not callable(function):
    raise UserError(f"{field}: {name} must be {what}")
  return function


class Registry:
  """The entries of one config field, by name."""

  def __init__(self, field: str, group: str, builtin: Mapping[str, Any], needs: Sequence[str] = ()):
    """
    Args:
      field: the config field that holds a name, for messages.
      group: entry points of installed packages that add names, as "jflow.generation".
      builtin: name -> the entry, or "package.module:attribute".
      needs: attributes that an entry of a package must have.
    """
    self._field, self._group, self._known, self._needs = field, group, dict(builtin), needs
    self._left_out: set[str] = set()

  def register(self, name: str, thing: Any) -> None:
    """Adds a name for this process, or replaces one."""
    self._known[name] = thing

  def unregister(self, name: str) -> None:
    """Removes a name that `register` added."""
    del self._known[name]

  def names(self) -> tuple[str, ...]:
    """Every name, those of installed packages last."""
    return (*self._known, *(name for name in self._installed if name not in self._known))

  def all(self) -> dict[str, Any]:
    """Returns name -> entry of all; a line on stderr says which installed package fails, and that is left out."""
    found = {name: load(place) for name, place in self._known.items()}
    for name in self.names()[len(found) :]:
      try:
        found[name] = self._load_installed(name)
      except UserError as error:
        if name not in self._left_out:
          print(f"jflow: left out: {error}", file=sys.stderr)
        self._left_out.add(name)
    return found

  def get(self, name: Any) -> Any:
    """Returns the entry of a name.

    Raises:
      UserError: the name is unknown, and the message lists the known ones; or the package that declares it fails.
    """
    if isinstance(name, str) and name in self._known:
      return load(self._known[name])
    if isinstance(name, str) and name in self._installed:
      return self._load_installed(name)
    raise UserError(f"{self._field}={shown(name)} must be one of {', '.join(self.names())}")

  def _load_installed(self, name: str) -> Any:
    entries = self._installed[name]
    if len(entries) > 1:
      places = " and ".join(sorted(entry.value for entry in entries))
      raise UserError(f"{self._field}={name!r} is declared by several installed packages: {places}")
    try:
      found = entries[0].load()
      if lacks := [name for name in self._needs if not hasattr(found, name)]:
        raise TypeError(f"it has no {lacks[0]}")
      return found
    except Exception as error:  # of the package: whatever it raises
      said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
      raise UserError(
        f"{self._field}={name!r} is {entries[0].value} of an installed package, which fails: {said}"
      ) from error

  @functools.cached_property
  def _installed(self) -> dict[str, list[importlib.metadata.EntryPoint]]:
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for entry in importlib.metadata.entry_points(group=self._group):
      found.setdefault(entry.name, []).append(entry)
    return found
