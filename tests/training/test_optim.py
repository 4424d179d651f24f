"""Laws of the optimizer: how clipping, AdamW and Muon are put together, warm-up, EMA, the partition by pattern."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax.traverse_util import flatten_dict

from configs import stage0, stage1, stage2, stage3
from jflow.config import OptimizerConfig
from jflow.errors import UserError
from jflow.models.config import ModelConfig
from jflow.training import optim

RNG = np.random.default_rng(0)
CONFIG = OptimizerConfig(
  learning_rate=3e-2,
  warmup_steps=3,
  beta1=0.9,
  beta2=0.95,
  epsilon=1e-8,
  weight_decay=0.0,
  clip_norm=1.0,
  cooldown_start=0,
  cooldown_steps=0,
  cooldown_shape="linear",
  muon=(),
  rates=(),
  trained=(),
  frozen=(),
)
TREE = {"a": {"x": 1, "xy": 2}, "ab": {"x": 3}, "b": 4}


def test_steps_are_those_of_adamw_after_clipping():
  """Eight steps; the gradients' norms lie on both sides of the clip. Two leaves share one global norm."""
  config = CONFIG.replace(weight_decay=0.1)
  start = RNG.standard_normal(10).astype(np.float32)
  gradients = (RNG.standard_normal((8, 10)) * np.geomspace(0.02, 20, 8)[:, None]).astype(np.float32)
  norms = np.linalg.norm(gradients, axis=1, keepdims=True)
  assert norms.min() < config.clip_norm < norms.max()
  rate = lambda step: config.learning_rate * jnp.minimum(1.0, (step + 1) / config.warmup_steps)
  adamw = optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
  tree = lambda x: {"a": jnp.asarray(x[:4]), "b": {"c": jnp.asarray(x[4:]).reshape(2, 3)}}
  got = run(optim.make_optimizer(config), tree(start), [tree(g) for g in gradients])
  want = run(adamw, jnp.asarray(start), list(gradients / np.maximum(norms / config.clip_norm, 1.0)))
  np.testing.assert_allclose(np.concatenate([got["a"], got["b"]["c"].ravel()]), want, rtol=1e-5, atol=1e-6)


@functools.partial(jax.jit, static_argnums=0)
def run(optimizer: optax.GradientTransformation, params, gradients: list):
  """The parameters after a step for each of the gradients."""
  state = optimizer.init(params)
  for gradient in gradients:
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  return params


def tree_of_matrices(seed: int) -> dict:
  """Layers of a scan, a matrix that no pattern names, one that is named alone, and a bias."""
  rng = np.random.default_rng(seed)
  shapes = {"a": {"x": {"kernel": (3, 16, 40), "bias": (3, 40)}}, "b": {"kernel": (16, 40)}, "c": {"kernel": (24, 16)}}
  draw = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def test_muon_moves_every_matrix_as_if_it_were_alone_and_nadamw_the_rest():
  """The layers of a scan are matrices of their own; both share the rate, its warm-up and the decay."""
  config = CONFIG.replace(warmup_steps=2, muon=("a/.*", "c"), weight_decay=0.1, clip_norm=1e9)
  params, gradients = tree_of_matrices(0), [tree_of_matrices(1), tree_of_matrices(2)]
  rate = lambda step: config.learning_rate * jnp.minimum(1.0, (step + 1) / 2)
  muon = optax.contrib.muon(rate, eps=1e-8, weight_decay=0.1, consistent_rms=0.2)
  nadamw = optax.nadamw(rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
  got = run(optim.make_optimizer(config), params, gradients)
  layers = [(muon, lambda tree, i=i: tree["a"]["x"]["kernel"][i]) for i in range(3)]
  matrix = (muon, lambda tree: tree["c"]["kernel"])
  rest = [(nadamw, lambda tree: tree["a"]["x"]["bias"]), (nadamw, lambda tree: tree["b"]["kernel"])]
  for alone, part in [*layers, matrix, *rest]:
    np.testing.assert_allclose(part(got), run(alone, part(params), [part(g) for g in gradients]), rtol=1e-4, atol=1e-6)
    assert not np.allclose(part(got), part(params), atol=1e-4)


def test_muon_leaves_what_is_frozen_out():
  """Stage 1 names the LLM's matrices, as all stages do, and trains none of them."""
  optimizer = optim.make_optimizer(CONFIG.replace(muon=("c",)))
  params = {"b": tree_of_matrices(0)["b"]}
  updates = jax.eval_shape(lambda: optimizer.update(params, optimizer.init(params), params)[0])
  assert list(updates) == ["b"]


@pytest.mark.parametrize("pattern", ["language_model/norm", "language_model/embed", "("])
def test_a_pattern_of_muon_that_matches_no_matrix_is_refused(pattern):
  optim.check_muon(tiny.params(), tiny.MUON)
  with pytest.raises(UserError) as error:
    optim.check_muon(tiny.params(), (pattern,))
  assert f"optimizer.muon pattern {pattern!r}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("muon", [(), ("a/.*", "c")])
def test_a_factor_of_a_part_multiplies_its_updates_with_the_decay(muon):
  """The trees that no pattern names, and those with factor 1, move by the same bits; the state is the same, too."""
  config = CONFIG.replace(weight_decay=0.1, muon=muon)
  plain, half = optim.make_optimizer(config), optim.make_optimizer(config.replace(rates=(("a", 0.5), ("c", 1.0))))
  params, gradients = tree_of_matrices(0), tree_of_matrices(1)
  first = lambda optimizer: jax.jit(lambda: optimizer.update(gradients, optimizer.init(params), params))()
  (want, want_state), (got, state) = first(plain), first(half)
  jax.tree.map(np.testing.assert_array_equal, got["a"], jax.tree.map(lambda x: x / 2, want["a"]))
  jax.tree.map(np.testing.assert_array_equal, (got["b"], got["c"], state), (want["b"], want["c"], want_state))


@pytest.mark.parametrize(
  "rates, words",
  [
    ((("b", 0.5), ("d", 0.5)), "pattern 'd' matches no trained parameter"),
    ((("a", 0.5), ("ab?/x", 0.5)), "pattern 'ab?/x' matches a/x, which"),
  ],
)
def test_rates_that_fit_no_part_are_refused(rates, words):
  with pytest.raises(UserError) as error:
    optim.rate_factors(flatten_dict(TREE, sep="/"), rates)
  assert f"optimizer.rates {words}" in str(error.value) and "\n" not in str(error.value)


def test_warm_up_is_linear_then_constant_and_the_first_step_moves():
  config = CONFIG.replace(learning_rate=0.2, warmup_steps=4)
  rate = optim.schedule(config)
  np.testing.assert_allclose([rate(i) for i in range(7)], [0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.2], rtol=1e-6)
  assert optim.schedule(config.replace(warmup_steps=0))(0) == pytest.approx(0.2)


def test_the_cool_down_is_linear_to_zero_behind_its_last_step():
  config = CONFIG.replace(learning_rate=0.2, warmup_steps=2, cooldown_start=4, cooldown_steps=4)
  rate = optim.schedule(config)
  want = [0.1, 0.2, 0.2, 0.2, 0.2, 0.15, 0.1, 0.05, 0.0, 0.0]
  np.testing.assert_allclose([rate(i) for i in range(10)], want, rtol=1e-6, atol=1e-9)
  whole = optim.schedule(config.replace(cooldown_start=0, cooldown_steps=8))
  np.testing.assert_allclose([whole(i) for i in range(3)], [0.1, 0.175, 0.15], rtol=1e-6)


def test_a_cosine_falls_by_half_a_period_and_reaches_zero_behind_its_last_step():
  config = CONFIG.replace(
    learning_rate=0.2, warmup_steps=2, cooldown_start=2, cooldown_steps=6, cooldown_shape="cosine"
  )
  rate = optim.schedule(config)
  want = [0.1, 0.2, *(0.1 * (1 + np.cos(np.pi * np.arange(7) / 6))), 0.0]
  np.testing.assert_allclose([rate(i) for i in range(10)], want, rtol=1e-5, atol=1e-8)


def test_ema_is_the_weighted_sum_of_the_past():
  """After n steps: decay^n of the start, and (1 - decay) decay^(n - i) of the parameters after step i."""
  decay, past = 0.9, RNG.standard_normal((6, 5)).astype(np.float32)
  ema = {"w": jnp.asarray(past[0])}
  for p in past[1:]:
    ema = optim.update_ema(ema, {"w": jnp.asarray(p)}, decay)
  want = decay**5 * past[0] + sum((1 - decay) * decay ** (5 - i) * past[i] for i in range(1, 6))
  np.testing.assert_allclose(ema["w"], want, rtol=1e-5, atol=1e-6)
  assert ema["w"].dtype == jnp.float32


@pytest.mark.smoke
def test_partition_cuts_and_merge_mends():
  trained, frozen = optim.partition(TREE, ("a", "b"), ("ab",))
  assert trained == {"a": {"x": 1, "xy": 2}, "b": 4} and frozen == {"ab": {"x": 3}}
  assert optim.merge(trained, frozen) == TREE
  trained, frozen = optim.partition(TREE, ("a/x", "ab?/x", "b"), ("a/xy",))
  assert trained == {"a": {"x": 1}, "ab": {"x": 3}, "b": 4} and frozen == {"a": {"xy": 2}}


@pytest.mark.parametrize(
  "trained, frozen, words",
  [
    (("a", "ab"), (), "parameter b "),
    (("a", "ab", "b"), ("a/x",), "parameter a/x "),
    (("a", "ab", "b"), ("c",), "optimizer.frozen pattern 'c' "),
    ((".*", "x"), (), "optimizer.trained pattern 'x' "),
    ((".*", "(a"), (), "optimizer.trained pattern '(a' "),
  ],
)
def test_a_bad_partition_is_one_clear_line(trained, frozen, words):
  with pytest.raises(UserError) as error:
    optim.partition(TREE, trained, frozen)
  assert words in str(error.value) and "\n" not in str(error.value)


# Part -> stages that train it (paper table 1 and figure 3); stage 0 makes the stand-ins of the built-in world.
TRAINED_IN = {
  "language_model": {0, 2, 3},
  "understanding_encoder": {3},
  "understanding_encoder head": set(),
  "understanding_projector": {0, 1, 2, 3},
  "understanding_start": {0, 1, 2, 3},
  "generation_encoder": {1, 2, 3},
  "generation_projector": {1, 2, 3},
  "generation_output_norm": {1, 2, 3},
  "generation_output_projector": {1, 2, 3},
  "generation_decoder": {1, 2, 3},
  "alignment_head": {1, 2, 3},
  "vae": set(),
}


@pytest.mark.parametrize("size", ["tiny", "384", "quick", "world"])
@pytest.mark.parametrize("number", range(4))
def test_the_stages_train_what_the_paper_says(number, size):
  config = (stage0, stage1, stage2, stage3)[number].get_config(size)
  shapes = tiny.shapes(ModelConfig.from_dict(config.model.to_dict()))
  trained, frozen = optim.partition(shapes, config.optimizer.trained, config.optimizer.frozen)
  optim.rate_factors(flatten_dict(trained, sep="/"), config.optimizer.rates)
  assert len(flatten_dict(trained)) + len(flatten_dict(frozen)) == len(flatten_dict(shapes))
  for tree, here in ((trained, True), (frozen, False)):
    for path in flatten_dict(tree):
      part = path[0] + (" head" if path[:2] == ("understanding_encoder", "head") else "")
      assert (number in TRAINED_IN[part]) == here, path
