"""Sources of records: a directory that `prepare` wrote, or a source that draws its records."""

import os

from jflow import registry, stores
from jflow.config import DataConfig
from jflow.data.records import Source
from jflow.errors import UserError

DRAWN = {"shapes": "jflow.world.source:open_source"}  # name in `data.sources` -> (task, section `data`) -> Source


def open_source(spec: str, task: str, config: DataConfig) -> Source:
  """Opens the source that a config names.

  Args:
    spec: a name in DRAWN, or a directory written by `prepare`, also of a store (gs://...).
    task: "understanding", "generation" or "text".
    config: the section `data`, where a source of DRAWN has its options.

  Raises:
    UserError: the source does not exist, or holds records of another task.
  """
  if spec in DRAWN:
    return registry.load(DRAWN[spec])(task, config)
  if os.path.isdir(spec) or stores.is_address(spec):
    from jflow.data.store.cache import Cache
    from jflow.data.store.prepared import PreparedSource

    cache = Cache(config.cache, config.cache_gib * 2**30) if stores.is_address(spec) else None
    return PreparedSource(spec.rstrip("/") if cache else spec, task, cache)
  raise UserError(
    f"data source {spec!r} not found: use {', '.join(DRAWN)} or a directory or address that `jflow prepare` wrote"
  )
