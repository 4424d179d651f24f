"""The section `data` of a config for tests of the data alone."""

import dataclasses

from configs import base
from jflow.config import DataConfig, RunConfig, SourcesConfig

_DATA = RunConfig.from_dict(base.base("tiny").to_dict() | {"model": {}}, model=dict).data
_QUICK = dict(first_sentence=0.0, prompt_drop=0.0, threads=1, prefetch=1, plan_cache="")


def data_config(sources: dict | None = None, **changes) -> DataConfig:
  """The values of configs/base.py but for `changes`, which no check sees: a test may name sources that it makes up.

  Without them nothing is dropped or cut, one thread loads, and no plan is kept.
  """
  tasks = {field.name: () for field in dataclasses.fields(SourcesConfig)}
  return dataclasses.replace(_DATA, sources=SourcesConfig(**tasks | (sources or {})), **_QUICK | changes)
