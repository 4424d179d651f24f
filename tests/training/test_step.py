"""Laws of a training step: losses, update, what stays frozen, accumulation, gradients that are not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from jflow.batch import WRITE, empty
from jflow.config import OptimizerConfig
from jflow.models.unified import loss_counts
from jflow.training import optim, setup
from jflow.training.state import TrainState
from jflow.training.step import draw, make_step

WEIGHTS = dict(text=0.5, flow=2.0, alignment=0.25)


def configuration(accumulation: int = 1, **compute):
  return tiny.configuration(objective=dict(weights=WEIGHTS), train=dict(accumulation=accumulation), compute=compute)


@functools.cache
def program(accumulation: int = 1):
  config = configuration(accumulation)
  return jax.jit(make_step(tiny.model(), optim.make_optimizer(config.optimizer), config))


def state(config: OptimizerConfig) -> TrainState:
  trained, frozen = optim.partition(tiny.params(), config.trained, config.frozen)
  return TrainState.create(trained, frozen, optim.make_optimizer(config))


@functools.cache
def start() -> TrainState:
  return state(configuration().optimizer)


@functools.cache
def first_step():
  return program()(start(), tiny.mixed())


def identical(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def size(tree) -> int:
  return sum(x.size for x in jax.tree.leaves(tree))


def test_losses_are_sums_over_counts_of_the_whole_batch():
  """Under the draws of (seed, step); `loss` weighs them by the objective's weights."""
  batch, (_, metrics) = tiny.mixed(), first_step()
  draws = draw(tiny.model(), jax.random.fold_in(jax.random.key(3), 0), batch, tiny.configuration().objective)
  sums = tiny.loss_sums(tiny.model(), tiny.params(), batch, draws)
  tokens, images = np.sum(batch.loss_mask), np.sum(batch.image_kind == WRITE)
  assert (tokens, images) == (4 + 13 + 3 + 4 + 41 + 13, 3)
  want = {"text": sums["text"] / tokens, "flow": sums["flow"] / images, "alignment": sums["alignment"] / images}
  for name, value in want.items():
    assert float(metrics[f"loss_{name}"]) == pytest.approx(float(value), rel=2e-5)
  total = sum(WEIGHTS[name] * float(value) for name, value in want.items())
  assert float(metrics["loss"]) == pytest.approx(total, rel=2e-5)
  assert float(metrics["learning_rate"]) == pytest.approx(1e-2 / 2)


def test_a_loss_without_a_weight_is_logged_where_asked_for_and_teaches_nothing():
  """Beside texts that are learned: pictures that one has a look at."""
  config = tiny.configuration(
    objective=dict(weights=dict(text=0.5, flow=0.0, alignment=0.0)),
    optimizer=dict(trained=("language_model", "alignment_head"), frozen=("understanding_.*", "generation_.*", "vae")),
  )
  logs = config.replace(objective=dict(logged=("alignment", "text")))
  start = state(config.optimizer)
  run = lambda c: jax.jit(make_step(tiny.model(), optim.make_optimizer(c.optimizer), c))(start, tiny.mixed())
  (silent, want), (new, metrics) = run(config), run(logs)
  assert set(metrics) - set(want) == {"loss_alignment"}
  assert float(metrics["loss_alignment"]) == pytest.approx(float(first_step()[1]["loss_alignment"]), rel=2e-5)
  for name in ("loss", "loss_text", "grad_norm"):
    assert float(metrics[name]) == pytest.approx(float(want[name]), rel=2e-5), name
  identical(new.trained["alignment_head"], start.trained["alignment_head"])
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
  jax.tree.map(close, tiny.adam(new).mu, tiny.adam(silent).mu)


def test_frozen_parameters_keep_their_bits_and_have_no_optimizer_state():
  state, (new, _) = start(), first_step()
  identical(new.frozen, state.frozen)
  assert {path[0] for path in flatten_dict(state.frozen)} == {"understanding_encoder", "vae"}
  scalars = sum(x.ndim == 0 for x in jax.tree.leaves(state.optimizer))
  assert size(state.optimizer) == 2 * size(state.trained) + scalars
  assert size(state.ema) == size(state.trained)
  assert size(state.trained) + size(state.frozen) == size(tiny.params())


def test_every_trained_parameter_moves_by_the_rate_of_the_first_step():
  """Adam's first step is the rate times the gradient's sign wherever the gradient is far above epsilon."""
  state, (new, metrics) = start(), first_step()
  rate = float(metrics["learning_rate"])
  old, now, gradient = (flatten_dict(x) for x in (state.trained, new.trained, tiny.adam(new).mu))
  for path, g in gradient.items():
    g = np.asarray(g, np.float64) / (1 - 0.9)
    moved = np.asarray(now[path], np.float64) - np.asarray(old[path])
    np.testing.assert_allclose(moved, -rate * g / (np.abs(g) + 1e-8), rtol=1e-3, atol=1e-6, err_msg=str(path))
    assert np.abs(moved).max() > 0.9 * rate, path


def test_the_gradient_is_clipped_to_its_norm():
  _, metrics = first_step()
  assert float(metrics["grad_norm"]) > 1
  squares = sum(np.sum(np.square(np.asarray(m) / (1 - 0.9))) for m in jax.tree.leaves(tiny.adam(first_step()[0]).mu))
  assert squares == pytest.approx(1.0, rel=1e-4)


def test_the_gradient_is_that_of_the_loss():
  """Against the loss at two points along it (the loss of the metrics is taken before the update)."""
  gradient = jax.tree.map(
    lambda m: np.asarray(m) / np.float32(1 - 0.9), tiny.adam(first_step()[0]).mu
  )  # clipped to norm 1
  step = 0.02
  losses = []
  for sign in (1, -1):
    moved = jax.tree.map(lambda p, g: np.asarray(p) + np.float32(sign * step) * g, start().trained, gradient)
    losses.append(float(program()(start().replace(trained=moved), tiny.mixed())[1]["loss"]))
  slope = (losses[0] - losses[1]) / (2 * step)
  assert slope == pytest.approx(float(first_step()[1]["grad_norm"]), rel=0.02)


def test_the_average_follows_the_new_parameters():
  state, (new, _) = start(), first_step()
  average = lambda old, p: 0.9 * np.asarray(old, np.float64) + 0.1 * np.asarray(p)
  want = jax.tree.map(average, state.ema, new.trained)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new.ema, want)


def test_accumulation_changes_neither_loss_nor_gradient():
  """Row by row, and their counts differ: 17, 7, 0, 54 tokens with loss and 1, 0, 2, 0 pictures to write."""
  (whole, want), (cut, got) = first_step(), program(4)(start(), tiny.mixed())
  for name in want:
    assert float(got[name]) == pytest.approx(float(want[name]), rel=2e-5), name
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max()))
  jax.tree.map(close, tiny.adam(cut).mu, tiny.adam(whole).mu)


def test_a_step_is_a_function_of_state_and_batch():
  again = program()(start(), tiny.mixed())
  identical(again, first_step())
  later = program()(start().replace(step=jnp.int32(1)), tiny.mixed())[1]
  assert float(later["loss_flow"]) != float(again[1]["loss_flow"])
  assert float(later["loss_text"]) == pytest.approx(float(again[1]["loss_text"]), rel=1e-6)


def with_codec_bias(state, value):
  """The state with latents of this mean, which no gradient changes."""
  frozen = jax.tree.map(lambda x: x, state.frozen)
  frozen["vae"]["encoder"]["bias"] = jnp.full(4, value, jnp.float32)
  return state.replace(frozen=frozen)


def test_a_huge_gradient_is_clipped_and_the_step_taken():
  new, metrics = program()(with_codec_bias(start(), 1e7), tiny.mixed())
  assert 1e6 * float(first_step()[1]["grad_norm"]) < float(metrics["grad_norm"]) < np.inf
  assert int(metrics["skipped"]) == 0
  moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), new.trained, start().trained)
  assert 0 < max(jax.tree.leaves(moved)) <= 1.001 * float(metrics["learning_rate"])
  squares = sum(np.sum(np.square(np.asarray(m) / (1 - 0.9))) for m in jax.tree.leaves(tiny.adam(new).mu))
  assert squares == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("poison", [np.nan, np.inf], ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counters(poison):
  """The step after it is as if it had not been."""
  state = first_step()[0]
  bad = with_codec_bias(state, poison)
  new, metrics = program()(bad, tiny.mixed())
  assert not np.isfinite(float(metrics["grad_norm"]))
  counters = dict(step=bad.step + 1, skipped=jnp.int32(1), skipped_in_a_row=jnp.int32(1))
  identical(new, bad.replace(**counters))
  new, metrics = program()(new, tiny.mixed())
  assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == 2
  after, metrics = program()(new.replace(frozen=state.frozen), tiny.mixed())
  assert int(metrics["skipped"]) == 2 and int(metrics["skipped_in_a_row"]) == 0
  clean, _ = program()(state.replace(step=new.step), tiny.mixed())
  identical(after, clean.replace(skipped=jnp.int32(2)))


def test_the_rate_that_is_logged_is_the_one_applied_after_a_skipped_step():
  """The warm-up counts accepted steps, and this is the first of two."""
  late = start().replace(step=jnp.int32(1), skipped=jnp.int32(1))
  _, metrics = program()(late, tiny.mixed())
  assert float(metrics["learning_rate"]) == pytest.approx(1e-2 / 2)


def test_a_batch_of_padding_teaches_nothing():
  """Counts are at least 1, and slots without a picture give no NaN."""
  batch = jax.tree.map(jnp.asarray, empty(4, tiny.SHAPE))
  assert [float(x) for x in loss_counts(tiny.CONFIG, batch).values()] == [1.0] * 3
  new, metrics = program()(start(), batch)
  assert float(metrics["loss"]) == 0 and float(metrics["grad_norm"]) == 0 and int(metrics["skipped"]) == 0
  identical(new.trained, start().trained)


def test_steps_on_one_batch_lower_its_losses():
  state, losses = start(), []
  for _ in range(40):
    state, metrics = program()(state, tiny.mixed())
    losses.append([float(metrics[f"loss_{name}"]) for name in tiny.LOSSES])
  first, last = np.mean(losses[:5], axis=0), np.mean(losses[-5:], axis=0)
  assert last[0] < 0.2 * first[0]
  assert last[1] < 0.7 * first[1]
  assert last[2] < first[2] - 0.3


def test_draws_have_the_stated_distributions():
  batch = jax.tree.map(jnp.asarray, empty(400, tiny.SHAPE))
  draws = draw(
    tiny.model(),
    jax.random.key(0),
    batch,
    tiny.configuration(objective=dict(draws=dict(time_mean=-0.5, time_std=2.0))).objective,
  )
  logit = np.log(draws.time) - np.log1p(-draws.time)
  assert logit.shape == (400, 3) and draws.noise.shape == draws.posterior.shape == (400, 3, 8, 8, 4)
  assert np.mean(logit) == pytest.approx(-0.5, abs=0.2) and np.std(logit) == pytest.approx(2.0, abs=0.15)
  for x in (draws.noise, draws.posterior):
    assert abs(float(jnp.mean(x))) < 0.01 and abs(float(jnp.std(x)) - 1) < 0.01
  assert abs(np.corrcoef(np.ravel(draws.noise), np.ravel(draws.posterior))[0, 1]) < 0.01


def test_masters_stay_f32_where_the_compute_is_bf16():
  config = configuration(2, dtype="bfloat16", remat="full")
  step = make_step(setup.build(config, jax.devices()[0]), optim.make_optimizer(config.optimizer), config)
  new, metrics = jax.eval_shape(step, start(), tiny.mixed())
  spec = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert spec(new) == spec(start())
  assert metrics["loss"].dtype == jnp.float32
