"""One training step: a pure function of (state, batch).

All randomness comes from fold_in(seed, step) and is drawn for the global batch, and losses are sums over
counts of the global batch: so the same batch gives the same loss on every mesh and with any accumulation.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jflow.batch import WRITE, Batch
from jflow.config import RunConfig
from jflow.generation.flow import equations as flow
from jflow.models.unified import Draws, JanusFlow, Sums
from jflow.training.flops import counted
from jflow.training.optim import merge, schedule, update_ema
from jflow.training.spikes import is_spike, remember
from jflow.training.state import TrainState


def draw(model: JanusFlow, key: jax.Array, batch: Batch, time_mean: float, time_std: float) -> Draws:
  """Time, noise and posterior noise for every image slot of a batch."""
  c = model.config
  b, m = batch.image_kind.shape
  shape = (b, m, c.latent_size, c.latent_size, c.autoencoder.latent_channels)
  time, noise, posterior = jax.random.split(key, 3)
  return Draws(
    time=flow.logit_normal(time, (b, m), time_mean, time_std),
    noise=jax.random.normal(noise, shape),
    posterior=jax.random.normal(posterior, shape),
  )


def counts(batch: Batch) -> Sums:
  """What each loss sum is divided by: tokens that carry loss, and images written; at least 1."""
  tokens = jnp.maximum(jnp.sum(batch.loss_mask), 1).astype(jnp.float32)
  images = jnp.maximum(jnp.sum(batch.image_kind == WRITE), 1).astype(jnp.float32)
  return Sums(text=tokens, flow=images, alignment=images)


def loss_sums(model: JanusFlow, params: Any, batch: Batch, draws: Draws, wanted: tuple[str, ...]) -> Sums:
  """The loss sums of a batch under `params`."""
  return model.apply({"params": params}, batch, draws, wanted, method="losses")


def make_step(
  model: JanusFlow, optimizer: optax.GradientTransformation, config: RunConfig
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """Builds train_step(state, batch) -> (state, metrics). `config` is the whole config.

  Metrics named work_... are the fields of `model_flops.Work`, from which the caller makes `mfu`.
  A step whose gradient is not finite, or a spike, changes nothing but the counters and the step number.
  """
  weights = {name: weight for name, weight in config.objective.weights.items() if weight}
  wanted = tuple(weights)
  micro = config.train.accumulation
  rate = schedule(config.optimizer)
  seed = config.train.seed

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    draws = draw(model, key, batch, config.objective.time_mean, config.objective.time_std)
    total_counts = counts(batch)

    def loss_fn(trained: Any, rows: Batch, row_draws: Draws) -> tuple[jax.Array, Sums]:
      sums = loss_sums(model, merge(trained, state.frozen), rows, row_draws, wanted)
      parts = jax.tree.map(jnp.divide, sums, total_counts)
      return sum(weight * getattr(parts, name) for name, weight in weights.items()), parts

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if micro == 1:
      (loss, parts), grads = grad_fn(state.trained, batch, draws)
    else:
      cut = lambda x: x.reshape(x.shape[0] // micro, micro, *x.shape[1:]).swapaxes(0, 1)
      zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(grad_fn, state.trained, batch, draws))

      def body(carry: Any, rows: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, grad_fn(state.trained, *rows)), None

      ((loss, parts), grads), _ = jax.lax.scan(body, zero, jax.tree.map(cut, (batch, draws)))

    norm = optax.global_norm(grads)
    updates, opt_state = optimizer.update(grads, state.optimizer, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    ema = update_ema(state.ema, trained, config.train.ema)
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
    metrics = {"loss": loss, "grad_norm": norm, "learning_rate": rate(state.step - state.skipped)}
    metrics |= {f"loss_{name}": value for name, value in parts._asdict().items()}
    metrics |= {f"work_{name}": value for name, value in vars(counted(batch, jnp)).items()}
    metrics |= {"skipped": new.skipped, "skipped_in_a_row": new.skipped_in_a_row}
    return new, metrics

  return train_step
