"""Sources of records: the built-in world, or a directory that `prepare` wrote."""

import os
from collections.abc import Mapping
from typing import Any

from jflow.data.records import Source
from jflow.errors import UserError

SHAPES = "shapes"


def open_source(spec: str, task: str, shapes: Mapping[str, Any]) -> Source:
  """Opens the source that a config names.

  Args:
    spec: "shapes", or a directory written by `prepare`.
    task: "understanding", "generation" or "text".
    shapes: options of the built-in world, see `WorldSource`: size, seed, tags, long_captions, named_colors, asked,
      in_order, large, spread.

  Raises:
    UserError: the source does not exist, or holds records of another task.
  """
  if spec == SHAPES:
    from jflow.world.source import WorldSource

    return WorldSource(task, **shapes)
  if os.path.isdir(spec):
    from jflow.data.store.prepared import PreparedSource

    return PreparedSource(spec, task)
  raise UserError(f"data source {spec!r} not found: use {SHAPES!r} or a directory that `jflow prepare` wrote")
