"""Laws of reinforcement learning: the first update is REINFORCE, no advantage moves nothing, rewards are gone after."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict
from refusals import refused

from jflow import sharding
from jflow.generation.base import Compared
from jflow.generation.flow import equations, sampler, sde
from jflow.models.unified import for_inference
from jflow.rl import grpo, run
from jflow.rl.prompts import Asked, Prompts
from jflow.training import optim, setup
from jflow.training.state import TrainState

GROUP, IMAGES = 4, 8
EXPLORE = dict(steps=3, noise=0.8, window=0, guidance=1.0, normalised=0)
TRAINED = ("language_model", "generation_.*")
FROZEN = ("understanding_.*", "vae", "alignment_head")


def configuration(explore=None, **rl):
  fields = dict(
    method="grpo", prompts="shapes", group=GROUP, rewards=(("true", 1.0),), kl=0.01, explore=EXPLORE | (explore or {})
  )
  return tiny.configuration(
    train=dict(batch_size=IMAGES, ema=0.0),
    optimizer=dict(trained=TRAINED, frozen=FROZEN, learning_rate=1e-2, warmup_steps=1),
    rl=fields | rl,
  )


def asked(width=8):
  rng = np.random.default_rng(0)
  tokens = np.repeat(rng.integers(10, tiny.VOCABULARY, (IMAGES // GROUP, width)), GROUP, axis=0).astype(np.int32)
  lengths = np.repeat(np.array([width - 2, width], np.int32), GROUP)
  return Asked(tokens, lengths, np.repeat(np.arange(2, dtype=np.int32), GROUP))


class Trained:
  """The programs of a config and the state of step 0."""

  def __init__(self, config, params=None):
    self.config, model = config, tiny.model(config.model)
    self.policy = run.make_policy(config, model, None)
    optimizer = optim.make_optimizer(config.optimizer)
    self.sample = jax.jit(run.make_sample(config, self.policy))
    self.update = jax.jit(run.make_update(config, self.policy, optimizer, ["true"]))
    parts = optim.partition(
      tiny.params() if params is None else params, config.optimizer.trained, config.optimizer.frozen
    )
    referred = bool(config.rl.kl) and not config.lora.rank
    self.start = TrainState.create(*parts, optimizer, referred=referred)

  def drawn(self, state, step=0):
    return self.sample(state.trained, state.frozen, jnp.int32(step), asked())

  def step(self, state, reward):
    drawn, images, diversity = self.drawn(state, state.step)
    return self.update(state, asked(), drawn, reward(np.asarray(images))[:, None], diversity)


@functools.cache
def plain():
  return Trained(configuration())


def redness(images):
  images = images.astype(np.float32) / 255
  return (images[..., 0] - images[..., 1:].mean(-1)).mean((1, 2))


def moved(before, after):
  return [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]


def test_the_first_update_is_reinforce_with_a_ratio_of_one():
  """The training program has the log-probabilities of the sampling program, and no divergence from itself; its gradient
  is that of -advantage log N(after; mean), with the mean from the sampler of inference."""
  own = plain()
  drawn, _, _ = own.drawn(own.start)
  advantages = jnp.asarray(np.random.default_rng(1).standard_normal(IMAGES), jnp.float32)
  grid, some = equations.time_grid(EXPLORE["steps"]), asked()
  kept = sde.kept(grid, EXPLORE["noise"])

  def ours(trained):
    params = optim.merge(trained, own.start.frozen)
    reference = run.reference_of(own.start)
    compared = own.policy.compare(params, reference, some.tokens, some.lengths, drawn)
    found = grpo.objective(compared, advantages, 1e-3, 0.0, IMAGES)
    return found.loss, (found, compared)

  def reinforce(trained):
    model, params = for_inference(tiny.model(), optim.merge(trained, own.start.frozen), gpu=False)
    prefix = sampler.read_prompts.function(model, params, some.tokens, some.lengths, guided=False)
    velocity = sampler.velocity(model, params, prefix, some.lengths, IMAGES, np.float32(1), np.array([0, 1.0]))
    total = 0.0
    for a in range(EXPLORE["steps"] - 1):
      z, t, u = drawn.before[:, a], grid[a], grid[a + 1]
      mean, deviation = sde.mean(z, velocity(z, t), t, u, kept[a]), sde.deviation(u, kept[a])
      density = jax.scipy.stats.norm.logpdf(drawn.after[:, a], mean, deviation).mean((1, 2, 3))
      total -= jnp.mean(advantages * density) / (EXPLORE["steps"] - 1)
    return total

  got, (found, compared) = jax.jit(jax.grad(ours, has_aux=True))(own.start.trained)
  assert compared.log_ratio.shape == (IMAGES, EXPLORE["steps"] - 1)
  np.testing.assert_allclose(compared.log_ratio, 0, atol=1e-5)
  np.testing.assert_allclose(compared.divergence, 0, atol=1e-9)
  want = jax.jit(jax.grad(reinforce))(own.start.trained)
  assert float(found.ratio) == pytest.approx(1, abs=1e-5) and float(found.clipped) == 0
  size = float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(want))))
  assert size > 1e-4
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4 * size), got, want)


def test_no_advantage_moves_nothing_and_the_divergence_begins_at_zero():
  own = plain()
  new, metrics = own.step(own.start, lambda images: np.ones(len(images), np.float32))
  assert not any(moved(own.start.trained, new.trained))
  assert float(metrics["kl"]) == pytest.approx(0, abs=1e-9) and float(metrics["reward_spread"]) == 0
  assert int(new.step) == 1 and float(metrics["grad_norm"]) < 1e-6


def test_the_policy_goes_where_the_reward_is_and_away_from_its_reference():
  own, state, rows = plain(), plain().start, []
  for _ in range(12):
    state, metrics = own.step(state, redness)
    rows.append(metrics)
  reward = [float(row["reward"]) for row in rows]
  assert np.mean(reward[-3:]) > np.mean(reward[:3]) + 2 * float(np.mean([row["reward_spread"] for row in rows[:3]]))
  assert float(rows[-1]["kl"]) > 1e-5
  jax.tree.map(np.testing.assert_array_equal, state.frozen, own.start.frozen)
  jax.tree.map(np.testing.assert_array_equal, state.reference, own.start.trained)


def test_what_a_step_draws_is_a_function_of_the_step_alone():
  own = plain()
  first, again, later = (own.drawn(own.start, step)[1] for step in (3, 3, 4))
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, later)
  each = np.asarray(first).reshape(-1, GROUP, *first.shape[1:])
  assert (each[:, :1] != each[:, 1:]).any((2, 3, 4)).all()  # the pictures of a group differ


def test_without_its_adapters_a_model_is_its_own_reference():
  """Fresh adapters change nothing; learned ones diverge from the base, of which the state holds no copy."""
  config = configuration().replace(
    optimizer=dict(trained=(), frozen=(".*",)), lora=dict(rank=2, patterns=("language_model/layers",))
  )
  flat = flatten_dict(tiny.params(), sep="/")
  shapes = jax.eval_shape(lambda: sharding.unbox(setup.initial_params(config, tiny.model())))
  leaf = lambda path, x: jnp.full(x.shape, 0.0 if path.endswith("lora_b") else 0.3, x.dtype)
  params = {path: flat[path] if path in flat else leaf(path, x) for path, x in flatten_dict(shapes, sep="/").items()}
  own = Trained(config, unflatten_dict(params, sep="/"))
  assert own.start.reference is None
  drawn, _, _ = own.drawn(own.start)
  compare = jax.jit(
    lambda state: own.policy.compare(
      optim.merge(state.trained, state.frozen), run.reference_of(state), asked().tokens, asked().lengths, drawn
    )
  )
  np.testing.assert_allclose(compare(own.start).log_ratio, 0, atol=1e-5)
  np.testing.assert_allclose(compare(own.start).divergence, 0, atol=1e-9)
  moved = own.start.replace(trained=jax.tree.map(lambda x: x + 0.3, own.start.trained))
  assert float(jnp.min(compare(moved).divergence)) > 1e-6


def test_outside_its_window_a_trajectory_follows_the_guided_ode():
  own = Trained(configuration(dict(window=1, guidance=2.0, normalised=1), kl=0.0))
  drawn, images, _ = own.drawn(own.start)
  (first,) = set(np.asarray(drawn.step).ravel().tolist())
  model, params = for_inference(tiny.model(), tiny.params(), gpu=False)
  some, grid = asked(), equations.time_grid(EXPLORE["steps"])
  prefix = sampler.read_prompts.function(model, params, some.tokens, some.lengths, guided=True)
  velocity = sampler.velocity(model, params, prefix, some.lengths, IMAGES, np.float32(2), np.array([0, 1.0]))
  latents = jax.jit(lambda z: equations.integrate(velocity, z, grid, "euler", first + 1))(drawn.after[:, 0])
  pixels = np.clip(model.bind({"params": params}).writer.decode(latents), -1, 1)
  np.testing.assert_allclose(images, (pixels + 1) * 127.5, atol=1.01)


@pytest.mark.parametrize("kind", ["group", "batch", "mean"])
def test_an_advantage_is_within_its_group(kind):
  rewards = np.array([1.0, 0, 0, 1, 5, 5, 5, 5, 0, 10, 0, 0], np.float32)
  got = np.asarray(grpo.advantages(jnp.asarray(rewards), 4, kind)).reshape(3, 4)
  less = rewards.reshape(3, 4) - rewards.reshape(3, 4).mean(1, keepdims=True)
  scale = {"group": less.std(1, keepdims=True), "batch": np.sqrt((less**2).mean()), "mean": 1.0}[kind]
  np.testing.assert_allclose(got, np.divide(less, scale, where=less != 0, out=np.zeros_like(less)), atol=1e-4)


def test_a_ratio_beyond_the_clip_range_has_no_gradient_where_it_has_gone_far_enough():
  log_ratio = jnp.log(jnp.array([[1.5], [0.5], [1.5], [0.5]]))
  advantage = jnp.array([1.0, 1.0, -1.0, -1.0])
  loss = lambda x: grpo.objective(Compared(x, jnp.zeros_like(x)), advantage, 0.2, 0.0, 4)
  gradient = jax.grad(lambda x: loss(x).loss)(log_ratio)[:, 0]
  np.testing.assert_allclose(gradient, [0, -0.5 / 4, 1.5 / 4, 0], atol=1e-6)
  assert float(loss(log_ratio).clipped) == 0.5


@pytest.mark.parametrize(
  "rl, named",
  [
    (dict(group=1), "rl.group"),
    (dict(group=3), "rl.group"),
    (dict(rewards=()), "rl.rewards"),
    (dict(rewards=(("strict", 0.0),)), "rl.rewards"),
    (dict(prompts=""), "rl.prompts"),
    (dict(updates=3), "rl.updates"),
    (dict(pairs="shapes"), "rl.pairs"),
    (dict(beta=2.0), "rl.beta"),
    (dict(explore=dict(steps=4)), "rl.explore"),
    (dict(explore=EXPLORE | dict(steps=1)), "rl.explore.steps"),
    (dict(explore=EXPLORE | dict(steps=2.5)), "rl.explore.steps"),
    (dict(explore=EXPLORE | dict(window=3)), "rl.explore.window"),
    (dict(explore=EXPLORE | dict(noise=0.0)), "rl.explore.noise"),
    (dict(explore=EXPLORE | dict(guidance=0.5)), "rl.explore.guidance"),
    (dict(explore=EXPLORE | dict(normalised=2)), "rl.explore.normalised"),
  ],
)
def test_a_config_that_cannot_learn_is_refused(rl, named):
  with refused(named):
    setup.check(configuration().replace(rl=rl))


def test_the_prompts_of_a_step_are_a_function_of_the_step_and_all_come_up():
  from jflow.data.tokenizer import Tokenizer

  config = configuration()
  texts = [(f"a picture of {n} stars", {}) for n in range(5)]
  made = lambda share: Prompts(config, texts, Tokenizer.load(config.data.tokenizer), share, GROUP, "mine")
  data = made(range(IMAGES))
  order = np.concatenate([data.numbers(step) for step in range(5)])
  assert sorted(order) == sorted([*range(5)] * 2) and sorted(order[:5]) == [*range(5)]
  (whole, info), *_ = data.batches(3, 4)
  np.testing.assert_array_equal(whole.number, np.repeat(data.numbers(3), GROUP))
  half = made(range(4, IMAGES)).batch(3)
  np.testing.assert_array_equal(half.tokens, whole.tokens[4:])
  assert info["packs"]["generation"] == IMAGES
