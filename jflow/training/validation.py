"""The loss of held-out records: a function of a step's parameters alone, so that it can be compared between steps.

Its rows, times and noise are the same at every step. It is computed with the averaged weights, which a run hands on,
and sums and counts are those of all rows, so that neither the mesh nor the accumulation changes it. Times and noise are
those of a batch and of a row's place in it: runs with batches of other sizes compare text alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow import compilation, sharding
from jflow.batch import Batch
from jflow.config import RunConfig
from jflow.data.validation import HeldOut
from jflow.generation.base import family
from jflow.models.unified import UnifiedModel, loss_counts
from jflow.training import hosts
from jflow.training.metrics import Rejected
from jflow.training.optim import merge
from jflow.training.state import TrainState
from jflow.training.step import cut, draw, loss_sums, wanted_losses

_STREAM = 2**31 - 1  # a step that no run reaches: its random numbers are validation's
_MOST_DRAWS = 8
Totals = dict[str, tuple[jax.Array, jax.Array]]  # loss -> (sum, count) so far


def add_batch(model: UnifiedModel, config: RunConfig) -> Callable[..., Totals]:
  """Builds add(totals, averaged, frozen, batch, number) -> totals with the losses of a batch; `number` seeds its draws.

  A batch is cut into the microbatches of a step, after its draws, which do not depend on them.
  """
  wanted, micro = wanted_losses(config.objective), config.train.accumulation

  def add(totals: Totals, averaged: Any, frozen: Any, batch: Batch, number: jax.Array) -> Totals:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.train.seed), _STREAM), number)
    draws, params = draw(model, key, batch, config.objective), merge(averaged, frozen)

    def body(sums: Any, part: Any) -> tuple[Any, None]:
      found = loss_sums(model, params, part[0], part[1], wanted)
      return {name: sums[name] + found[name] for name in wanted}, None

    zero = {name: jnp.zeros((), jnp.float32) for name in wanted}
    if micro == 1:
      sums, _ = body(zero, (batch, draws))
    else:
      sums, _ = jax.lax.scan(body, zero, cut((batch, draws), micro))
    counts = loss_counts(model.config, batch)
    none = lambda name: (counts[name] == 1) & (sums[name] == 0)  # a batch without a term counts as 1, too
    return {
      name: (total + sums[name], count + jnp.where(none(name), 0.0, counts[name]))
      for name, (total, count) in totals.items()
    }

  return add


def losses(totals: Totals, config: RunConfig) -> dict[str, jax.Array]:
  """The mean of each loss as "val_loss_NAME", nan where there is no term, and "val_loss", weighed as in training."""
  means = {name: value / jnp.where(count > 0, count, jnp.nan) for name, (value, count) in totals.items()}
  total: Any = sum(
    weight * jnp.where(totals[name][1] > 0, means[name], 0.0)
    for name, weight in config.objective.weights.items()
    if weight
  )
  return {"val_loss": total} | {f"val_loss_{name}": mean for name, mean in means.items()}


class Validation:
  """The losses of a run's held-out records."""

  def __init__(
    self,
    config: RunConfig,
    model: UnifiedModel,
    mesh: jax.sharding.Mesh,
    data: HeldOut,
    place: Callable[[Any], Any],
  ):
    """Compiles nothing.

    Args:
      config: of the run.
      model: with room for the images of `data`, see `setup.with_room`.
      mesh: of the run.
      data: the held-out records.
      place: puts this host's rows of a batch on its shards.
    """
    self._data, self._place = data, place
    self._lost: int | None = None  # held-out records that cannot be used, of all processes
    draws = family(model.config.generation).draws and any(r.task == "generation" and r.plan.rows for r in data.sources)
    self._draws = max(1, min(_MOST_DRAWS, config.data.validation_rows // data.rows)) if draws else 1
    whole = sharding.replicated(mesh)
    nothing = jnp.zeros((), jnp.float32)
    self._zero = jax.jit(
      lambda: dict.fromkeys(wanted_losses(config.objective), (nothing, nothing)), out_shardings=whole
    )
    add = jax.jit(add_batch(model, config), out_shardings=whole)
    self._add = compilation.told("the loss of held-out records", add)

    def judge(totals: Totals, best: Any, step: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
      found = losses(totals, config)
      return best.judged(found["val_loss"], step), found

    self._judge = jax.jit(judge, out_shardings=(whole, whole))

  def __call__(
    self, state: TrainState, stopped: Callable[[], bool] = lambda: False
  ) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state with its best loss brought up to date, and the losses by name, f32[] still being computed.

    Where `stopped` becomes true between two batches, on all processes alike, the state is as it was and there are none.
    """
    batches, lost = self._data.batches
    if self._lost is None:
      Rejected().name("held-out records", lost)
      self._lost = hosts.total(len(lost))
    totals = self._zero()
    for number in range(self._draws * len(batches)):
      jax.block_until_ready(totals)
      if stopped():
        return state, {}
      batch = jax.tree.map(self._place, batches[number % len(batches)])
      totals = self._add(totals, state.averaged, state.frozen, batch, np.int32(number))
    best, found = self._judge(totals, state.best, state.step)
    return state.replace(best=best), found | {"val_rejected": self._lost}
