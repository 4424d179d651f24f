"""Registries of the kinds that a config names: ways to write images, objectives, LLM architectures.

An entry is built in, added by `register`, or declared by an installed package as an entry point. An entry is imported
at its first use, and a name in a checkpoint's config is only looked up, never imported as a module.
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import Any

from jflow.errors import UserError
from jflow.strict_json import shown


def load(place: Any) -> Any:
  """Returns the object at "package.module:attribute", or the module; anything but text is returned unchanged."""
  if not isinstance(place, str):
    return place
  module, _, attribute = place.partition(":")
  found = importlib.import_module(module)
  return getattr(found, attribute) if attribute else found


class Registry:
  """The entries of one config field, by name."""

  def __init__(self, field: str, group: str, builtin: Mapping[str, Any]):
    """
    Args:
      field: the config field that holds a name, for messages.
      group: entry points of installed packages that add names, as "jflow.generation".
      builtin: name -> the entry, or "package.module:attribute".
    """
    self._field, self._group, self._known = field, group, dict(builtin)

  def register(self, name: str, thing: Any) -> None:
    """Adds a name for this process, or replaces one."""
    self._known[name] = thing

  def unregister(self, name: str) -> None:
    """Removes a name that `register` added."""
    del self._known[name]

  def names(self) -> tuple[str, ...]:
    """Every name, those of installed packages last."""
    return (*self._known, *(name for name in self._installed if name not in self._known))

  def get(self, name: Any) -> Any:
    """Returns the entry of a name.

    Raises:
      UserError: the name is unknown; the message lists the known ones.
    """
    if isinstance(name, str) and name in self._known:
      return load(self._known[name])
    if isinstance(name, str) and name in self._installed:
      return self._installed[name].load()
    raise UserError(f"{self._field}={shown(name)} must be one of {', '.join(self.names())}")

  @functools.cached_property
  def _installed(self) -> dict[str, Any]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=self._group)}
