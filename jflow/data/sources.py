"""Sources of records: a directory that `prepare` wrote, or a source that draws its records."""

import os

from jflow import registry
from jflow.config import DataConfig
from jflow.data.records import Source
from jflow.errors import UserError

DRAWN = {"shapes": "jflow.world.source:open_source"}  # name in `data.sources` -> (task, section `data`) -> Source


def open_source(spec: str, task: str, config: DataConfig) -> Source:
  """Opens the source that a config names.

  Args:
    spec: a name in DRAWN, or a directory written by `prepare`.
    task: "understanding", "generation" or "text".
    config: the section `data`, where a source of DRAWN has its options.

  Raises:
    UserError: the source does not exist, or holds records of another task.
  """
  if spec in DRAWN:
    return registry.load(DRAWN[spec])(task, config)
  if os.path.isdir(spec):
    from jflow.data.store.prepared import PreparedSource

    return PreparedSource(spec, task)
  raise UserError(f"data source {spec!r} not found: use {', '.join(DRAWN)} or a directory that `jflow prepare` wrote")
