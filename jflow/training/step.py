"""One training step: a pure function of (state, batch).

All randomness comes from fold_in(seed, step) and is drawn for the global batch, and losses are sums divided by counts
of the global batch: so a batch has the same loss on every mesh and with any accumulation.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jflow.batch import Batch
from jflow.config import ObjectiveConfig, RunConfig
from jflow.models.unified import UnifiedModel, loss_counts, make_writer
from jflow.training.flops import counted
from jflow.training.optim import merge, schedule, update_ema
from jflow.training.spikes import is_spike, remember
from jflow.training.state import TrainState


def draw(model: UnifiedModel, key: jax.Array, batch: Batch, objective: Any) -> Any:
  """Draws the writer's randomness for every image of a batch; see `generation.base.Writer.draw`."""
  return make_writer(model.config, model.dtype).draw(key, batch, objective)


def loss_sums(
  model: UnifiedModel, params: Any, batch: Batch, draws: Any, wanted: tuple[str, ...]
) -> dict[str, jax.Array]:
  """The loss sums of a batch under `params`, by name."""
  sums: Any = model.apply({"params": params}, batch, draws, wanted, method="losses")
  return sums


def wanted_losses(objective: ObjectiveConfig) -> tuple[str, ...]:
  """The names of the losses that a run weighs or logs."""
  return tuple(dict.fromkeys((*(name for name, weight in objective.weights.items() if weight), *objective.logged)))


def make_loss(model: UnifiedModel, objective: ObjectiveConfig) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
  """Builds loss(params, batch, key) -> (loss, {name: its part}), pure, to be differentiated by its first argument.

  `params` holds all parameters (for frozen ones see `optim.partition` and `optim.merge`); `key` seeds the draws.
  """
  weighed = _weighed(model, objective)

  def loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    return weighed(params, batch, draw(model, key, batch, objective), loss_counts(model.config, batch))

  return loss


def _weighed(model: UnifiedModel, objective: ObjectiveConfig) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
  """Builds loss(params, rows, draws, counts) -> (loss, parts); `counts` are those of the global batch."""
  weights = {name: weight for name, weight in objective.weights.items() if weight}
  wanted = wanted_losses(objective)

  def loss(params: Any, rows: Batch, draws: Any, counts: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    sums = loss_sums(model, params, rows, draws, wanted)
    parts = {name: value / counts[name] for name, value in sums.items()}
    total: Any = sum(weight * parts[name] for name, weight in weights.items())
    return total, parts

  return loss


def make_step(
  model: UnifiedModel, optimizer: optax.GradientTransformation, config: RunConfig
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """Builds train_step(state, batch) -> (state, metrics). `config` is the whole config.

  Metrics named work_... are the fields of `models.flops.Work`, from which the caller computes `mfu`.
  A step whose gradient is not finite, or a spike, changes only the counters and the step number.
  """
  weighed = _weighed(model, config.objective)
  micro = config.train.accumulation
  rate = schedule(config.optimizer)
  seed = config.train.seed

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    draws = draw(model, key, batch, config.objective)
    counts = loss_counts(model.config, batch)

    def loss_fn(trained: Any, rows: Batch, row_draws: Any) -> tuple[Any, dict[str, jax.Array]]:
      return weighed(merge(trained, state.frozen), rows, row_draws, counts)

    (loss, parts), grads = accumulated(loss_fn, state.trained, (batch, draws), micro)
    new, norm = updated(state, optimizer, config, loss, grads)
    metrics: dict[str, Any] = {"loss": loss, "grad_norm": norm, "learning_rate": rate(state.step - state.skipped)}
    metrics |= {f"loss_{name}": value for name, value in parts.items()}
    metrics |= {f"work_{name}": value for name, value in vars(counted(batch, jnp)).items()}
    metrics |= {"skipped": new.skipped, "skipped_in_a_row": new.skipped_in_a_row}
    return new, metrics

  return train_step


def cut(rows: Any, parts: int) -> Any:
  """Cuts every array [B, ...] of a tree into [parts, B / parts, ...], whose parts lie on all devices as the whole
  does."""
  one = lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
  return jax.tree.map(one, rows)


def accumulated(loss_fn: Callable[..., tuple[Any, Any]], trained: Any, rows: tuple[Any, ...], micro: int) -> Any:
  """((loss, parts), gradient) of loss_fn(trained, *rows), the sums over `micro` microbatches of the rows."""
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  if micro == 1:
    return grad_fn(trained, *rows)
  zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(grad_fn, trained, *rows))

  def body(carry: Any, some: Any) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, carry, grad_fn(trained, *some)), None

  total, _ = jax.lax.scan(body, zero, cut(rows, micro))
  return total


def updated(
  state: TrainState, optimizer: optax.GradientTransformation, config: RunConfig, loss: jax.Array, grads: Any
) -> tuple[TrainState, jax.Array]:
  """The state after a step with a gradient, and the gradient's norm; one that is not finite, or a spike, is skipped."""
  norm = optax.global_norm(grads)
  updates, opt_state = optimizer.update(grads, state.optimizer, state.trained)
  trained: Any = optax.apply_updates(state.trained, updates)
  ema = update_ema(state.ema, trained, config.train.ema) if state.ema else state.ema
  good, recent = jnp.isfinite(norm) & jnp.isfinite(loss), state.recent
  if recent is not None:
    good &= jnp.logical_not(is_spike(recent, loss, norm, config.train.spike_sigmas))
    recent = remember(recent, loss, norm, good)
  keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
  bad = jnp.logical_not(good).astype(jnp.int32)
  new = state.replace(
    step=state.step + 1,
    trained=keep(trained, state.trained),
    ema=keep(ema, state.ema),
    optimizer=keep(opt_state, state.optimizer),
    skipped=state.skipped + bad,
    skipped_in_a_row=(state.skipped_in_a_row + bad) * bad,
    recent=recent,
  )
  return new, norm
