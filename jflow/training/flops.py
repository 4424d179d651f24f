"""Model FLOPs of a batch, and the model FLOPs utilisation (`mfu`) of a step. The optimizer's FLOPs do not count."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from jflow import chips
from jflow.batch import READ, WRITE, Batch
from jflow.config import RunConfig
from jflow.generation.base import family
from jflow.models import flops as model_flops
from jflow.models.config import ModelConfig


def counted(batch: Batch, xp: Any = np) -> model_flops.Work:
  """The counts of a batch that its FLOPs depend on; `xp` is numpy, or jax.numpy inside a step."""
  segments = batch.segment_ids
  real = segments > 0
  slots = xp.arange(segments.shape[1])[None]
  first = xp.concatenate([xp.ones_like(real[:, :1]), segments[:, 1:] != segments[:, :-1]], axis=1)
  starts = xp.where(first, slots, 0)
  starts = np.maximum.accumulate(starts, axis=1) if xp is np else _running_maximum(starts)
  total = lambda x: float(np.sum(x)) if xp is np else xp.sum(x, dtype=xp.float32)
  return model_flops.Work(
    tokens=total(real),
    pairs=total(xp.where(real, slots - starts + 1, 0)),
    loss_tokens=total(batch.loss_mask),
    read=total(batch.image_kind == READ),
    written=total(batch.image_kind == WRITE),
  )


def _running_maximum(x):
  return jax.lax.cummax(x, axis=1)


def model_flops_of(
  config: RunConfig, model: ModelConfig, trained: Collection[str], work: model_flops.Work
) -> dict[str, float]:
  """FLOPs of one step by part. `trained`: the parts that hold a trained parameter, see `lora.parts`;
  adapters cost nothing."""
  losses = {name for name, weight in config.objective.weights.items() if weight}
  return model_flops.step(model, set(trained), work, losses, config.data.stored)


def mfu(config: RunConfig, trained: Collection[str], row: dict[str, Any], seconds: float) -> float | None:
  """The share of the devices' dense bf16 peak that a step used; None for a device without a known peak (a CPU).

  None too for a writer whose FLOPs no formula gives, and for a step that does not say its work.

  Removes the step's work_... metrics from `row`.
  """
  if "work_tokens" not in row:
    return None
  fields = (field.name for field in dataclasses.fields(model_flops.Work))
  work = model_flops.Work(**{name: row.pop(f"work_{name}") for name in fields})
  peak = chips.peak_flops(jax.devices()[0].device_kind)
  if peak is None or family(config.model.generation).flops is None:
    return None
  flops = sum(model_flops_of(config, config.model, trained, work).values())
  return flops / seconds / (peak * jax.device_count())
