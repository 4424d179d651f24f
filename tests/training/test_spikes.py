"""The guard against loss spikes: bad steps change nothing, and a restart inside a spike decides the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jflow.training import optim, spikes
from jflow.training.checkpoint import Checkpointer
from jflow.training.spikes import Recent
from jflow.training.state import TrainState
from jflow.training.step import make_step

WINDOW, SIGMAS, BAD = 16, 6.0, range(41, 46)


def _stream() -> np.ndarray:
  """f32[80, 2]: losses and norms of a falling curve with noise, five bad batches among them."""
  rng = np.random.default_rng(0)
  out = np.stack([3.0 - 0.01 * np.arange(80), np.full(80, 1.0)], axis=1) + 0.05 * rng.standard_normal((80, 2))
  out[BAD, 0] += 2.0
  return out.astype(np.float32)


def _decide(recent: Recent, rows: np.ndarray) -> tuple[Recent, list[bool]]:
  decisions = []
  for loss, norm in rows:
    spike = spikes.is_spike(recent, loss, norm, SIGMAS)
    recent = spikes.remember(recent, loss, norm, jnp.logical_not(spike))
    decisions.append(bool(spike))
  return recent, decisions


def _expected(rows: np.ndarray) -> list[bool]:
  """The same rule, written down with a list."""
  kept, decisions = [], []
  for row in rows.astype(np.float64):
    last = np.array(kept[-WINDOW:])
    spike = len(kept) >= WINDOW and bool((row > last.mean(axis=0) + SIGMAS * last.std(axis=0)).any())
    decisions.append(spike)
    if not spike:
      kept.append(row)
  return decisions


def test_five_bad_batches_are_skipped_and_nothing_else():
  decisions = _decide(Recent.empty(WINDOW), _stream())[1]
  assert [i for i, spike in enumerate(decisions) if spike] == list(BAD)
  assert decisions == _expected(_stream())


@pytest.mark.parametrize("column", [0, 1])
def test_loss_and_gradient_norm_are_both_watched(column):
  rows = _stream()
  rows[BAD, 0] -= 2.0
  rows[50, column] += 3.0
  assert [i for i, spike in enumerate(_decide(Recent.empty(WINDOW), rows)[1]) if spike] == [50]


def test_the_first_steps_are_never_spikes():
  rows = np.full((WINDOW, 2), 1.0, np.float32)
  rows[3] = 1000.0
  assert not any(_decide(Recent.empty(WINDOW), rows)[1])


def test_a_restart_inside_the_spike_decides_as_a_run_without_one(tmp_path):
  rows = _stream()
  whole = _decide(Recent.empty(WINDOW), rows)[1]
  state = TrainState.create({"w": jnp.zeros(3)}, {}, optax.identity(), spike_window=WINDOW)
  middle = BAD[2]
  recent, before = _decide(state.recent, rows[:middle])
  checkpointer = Checkpointer(tmp_path, 1, {})
  checkpointer.save(state.replace(recent=recent, step=jnp.asarray(middle, jnp.int32)))
  checkpointer.wait()
  shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  restored = Checkpointer(tmp_path, 1, {}).restore(jax.tree.map(shaped, state))
  assert before + _decide(restored.recent, rows[middle:])[1] == whole


def test_a_spike_changes_no_weight_no_moment_and_no_average():
  """The real step, of texts alone. A window of tiny losses makes any batch a spike; an unfilled one, none."""
  config = tiny.configuration(
    train=dict(spike_sigmas=6.0, spike_window=WINDOW),
    objective=dict(weights=dict(text=1.0)),
    optimizer=dict(trained=("language_model",), frozen=("understanding_.*", "generation_.*", "alignment_head", "vae")),
  )
  optimizer = optim.make_optimizer(config.optimizer)
  patterns = config.optimizer.trained, config.optimizer.frozen
  state = TrainState.create(*optim.partition(tiny.params(), *patterns), optimizer, spike_window=WINDOW)
  step = jax.jit(make_step(tiny.model(), optimizer, config))
  after, metrics = step(state, tiny.mixed())
  assert metrics["skipped"] == 0 and after.recent.count == 1
  np.testing.assert_array_equal(after.recent.values[:, 0], [metrics["loss"], metrics["grad_norm"]])
  full = after.replace(recent=Recent(jnp.full((2, WINDOW), 1e-3, jnp.float32), jnp.asarray(WINDOW, jnp.int32)))
  skipped, metrics = step(full, tiny.mixed())
  assert metrics["skipped"] == metrics["skipped_in_a_row"] == 1
  counters = dict(step=full.step, skipped=full.skipped, skipped_in_a_row=full.skipped_in_a_row)
  same = jax.tree.map(
    lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), skipped.replace(**counters), full
  )
  assert jax.tree.all(same) and skipped.step == full.step + 1
