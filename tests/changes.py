"""Changes of nested values, as of a config.json, for tables of refusals."""

from collections.abc import Callable
from typing import Any


def put(value: Any, *path: str) -> Callable[[dict], None]:
  """Sets the field at a path."""

  def change(values: dict) -> None:
    for key in path[:-1]:
      values = values[key]
    values[path[-1]] = value

  return change


def remove(*path: str) -> Callable[[dict], None]:
  """Removes the field at a path."""

  def change(values: dict) -> None:
    for key in path[:-1]:
      values = values[key]
    del values[path[-1]]

  return change
