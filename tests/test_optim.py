"""Laws of the optimizer: AdamW and clipping in numpy, warm-up, EMA, and the partition by pattern."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from configs import stage0, stage1, stage2, stage3
from jflow.errors import UserError
from jflow.models.config import JanusFlowConfig
from jflow.training import optim

RNG = np.random.default_rng(0)
CONFIG = dict(
  learning_rate=3e-2, warmup_steps=3, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.0, clip_norm=1.0,
  cooldown_start=0, cooldown_steps=0, muon=(),
)
TREE = {"a": {"x": 1, "xy": 2}, "ab": {"x": 3}, "b": 4}


def adamw(config, start, gradients):
  """AdamW of Loshchilov and Hutter over a flat vector, in f64, after clipping to a global norm."""
  p, m, v = start.astype(np.float64), 0.0, 0.0
  for step, g in enumerate(gradients.astype(np.float64)):
    g = g * min(1.0, config["clip_norm"] / np.linalg.norm(g))
    rate = config["learning_rate"] * min(1.0, (step + 1) / config["warmup_steps"])
    m = config["beta1"] * m + (1 - config["beta1"]) * g
    v = config["beta2"] * v + (1 - config["beta2"]) * g**2
    first, second = m / (1 - config["beta1"] ** (step + 1)), v / (1 - config["beta2"] ** (step + 1))
    p = p - rate * (first / (np.sqrt(second) + config["epsilon"]) + config["weight_decay"] * p)
  return p


@pytest.mark.parametrize("change", [{}, {"weight_decay": 0.1}, {"clip_norm": 1e6}], ids=str)
def test_steps_are_those_of_adamw_after_clipping(change):
  """Eight steps; the gradients' norms lie on both sides of the clip. Two leaves share one global norm."""
  config = CONFIG | change
  start = RNG.standard_normal(10).astype(np.float32)
  gradients = (RNG.standard_normal((8, 10)) * np.geomspace(0.02, 20, 8)[:, None]).astype(np.float32)
  tree = lambda x: {"a": jnp.asarray(x[:4]), "b": {"c": jnp.asarray(x[4:]).reshape(2, 3)}}
  optimizer, params = optim.make_optimizer(config), tree(start)
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  for g in gradients:
    updates, state = update(tree(g), state, params)
    params = jax.tree.map(jnp.add, params, updates)
  got = np.concatenate([params["a"], params["b"]["c"].ravel()])
  np.testing.assert_allclose(got, adamw(config, start, gradients), rtol=1e-5, atol=1e-6)


def test_muon_orthogonalises_the_matrices_that_it_is_given():
  """The first update is 0.2 sqrt(max(rows, columns)) rate times the gradient with its singular values near 1.

  Five steps of Newton-Schulz leave them within 0.3 of it, for any layer alone. NAdamW moves the rest by about the rate.
  """
  config = CONFIG | dict(warmup_steps=0, muon=("a/.*", "c"))
  params = {
    "a": {"x": {"kernel": RNG.standard_normal((3, 16, 40)), "bias": np.ones((3, 40))}},
    "b": {"kernel": RNG.standard_normal((16, 40))},
    "c": {"kernel": RNG.standard_normal((24, 16))},
  }
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  gradients = jax.tree.map(lambda x: jnp.asarray(RNG.standard_normal(x.shape), jnp.float32), params)
  optimizer = optim.make_optimizer(config)
  updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
  moved = [(gradients["a"]["x"]["kernel"][i], updates["a"]["x"]["kernel"][i]) for i in range(3)]
  for gradient, update in [*moved, (gradients["c"]["kernel"], updates["c"]["kernel"])]:
    left, _, right = np.linalg.svd(gradient, full_matrices=False)
    scale = -0.2 * max(update.shape) ** 0.5 * config["learning_rate"]
    np.testing.assert_allclose(left.T @ update @ right.T / scale, np.eye(len(right)), atol=0.32)
  for got, gradient in ((updates["a"]["x"]["bias"], gradients["a"]["x"]["bias"]), (updates["b"], gradients["b"])):
    one = jax.tree.map(lambda u, g: np.asarray(u / jnp.sign(g)), got, gradient)
    np.testing.assert_allclose(jax.tree.leaves(one)[0], -config["learning_rate"], rtol=1.0)


def test_a_pattern_of_muon_that_matches_no_matrix_is_refused():
  optim.check_muon(tiny.params(), ("language_model/layers", "generation_(encoder|decoder)/blocks_.*"))
  with pytest.raises(UserError, match="optimizer.muon pattern 'language_model/norm' matches no matrix"):
    optim.check_muon(tiny.params(), ("language_model/norm",))
  with pytest.raises(UserError, match=r"optimizer.muon pattern '\(' is not a regular expression"):
    optim.check_muon(tiny.params(), ("(",))


def test_warm_up_is_linear_then_constant_and_the_first_step_moves():
  config = CONFIG | dict(learning_rate=0.2, warmup_steps=4)
  rate = optim.schedule(config)
  np.testing.assert_allclose([rate(i) for i in range(7)], [0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.2], rtol=1e-6)
  assert optim.schedule(config | dict(warmup_steps=0))(0) == pytest.approx(0.2)


def test_the_cool_down_is_linear_to_zero_behind_its_last_step():
  config = CONFIG | dict(learning_rate=0.2, warmup_steps=2, cooldown_start=4, cooldown_steps=4)
  rate = optim.schedule(config)
  want = [0.1, 0.2, 0.2, 0.2, 0.2, 0.15, 0.1, 0.05, 0.0, 0.0]
  np.testing.assert_allclose([rate(i) for i in range(10)], want, rtol=1e-6, atol=1e-9)
  whole = optim.schedule(config | dict(cooldown_start=0, cooldown_steps=8))
  np.testing.assert_allclose([whole(i) for i in range(3)], [0.1, 0.175, 0.15], rtol=1e-6)


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


@pytest.mark.parametrize("trained, frozen, words", [
  (("a", "ab"), (), "parameter b matches neither"),
  (("a", "ab", "b"), ("a/x",), "parameter a/x matches both"),
  (("a", "ab", "b"), ("c",), "optimizer.frozen pattern 'c' matches no parameter; parts are a, ab, b"),
  ((".*", "x"), (), "optimizer.trained pattern 'x' matches no parameter"),
  ((".*", "(a"), (), "optimizer.trained pattern '(a' is not a regular expression"),
])  # fmt: skip
def test_a_bad_partition_is_one_clear_line(trained, frozen, words):
  with pytest.raises(UserError) as error:
    optim.partition(TREE, trained, frozen)
  assert words in str(error.value) and "\n" not in str(error.value)


# Part -> stages that train it (001 table 1 and figure 3); stage 0 makes the stand-ins of the built-in world.
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


@pytest.mark.parametrize("size", ["tiny", "384"])
@pytest.mark.parametrize("number", range(4))
def test_the_stages_train_what_the_paper_says(number, size):
  config = (stage0, stage1, stage2, stage3)[number].get_config(size).to_dict()
  shapes = tiny.shapes(JanusFlowConfig.from_dict(config["model"]))
  trained, frozen = optim.partition(shapes, config["optimizer"]["trained"], config["optimizer"]["frozen"])
  assert len(flatten_dict(trained)) + len(flatten_dict(frozen)) == len(flatten_dict(shapes))
  for tree, here in ((trained, True), (frozen, False)):
    for path in flatten_dict(tree):
      part = path[0] + (" head" if path[:2] == ("understanding_encoder", "head") else "")
      assert (number in TRAINED_IN[part]) == here, path
