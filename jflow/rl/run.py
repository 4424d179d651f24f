"""A run of reinforcement learning: a training run whose step draws pictures, scores them, and updates on the scores.

Two programs, each compiled once: `sample` (prompts to pictures) and `update` (scores to parameters). Only pictures, as
uint8, and scores pass the host. What a step draws is a function of train.seed and the step, so that a run resumes bit
for bit wherever its rewards do. Each process scores the pictures of its own devices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from jflow import compilation, registry, sharding
from jflow.config import RunConfig
from jflow.data.tokenizer import Tokenizer
from jflow.generation.base import family
from jflow.models import lora
from jflow.models.unified import UnifiedModel, normalise
from jflow.rl import dpo, grpo, pairs, prompts, rewards
from jflow.training import setup
from jflow.training.method import Method
from jflow.training.optim import merge, schedule
from jflow.training.state import TrainState
from jflow.training.step import accumulated, cut, updated


class Reinforced:
  """The method of a run with `rl.method="grpo"`; see `training.method.Method`."""

  def __init__(self, config: RunConfig):
    """Reads the prompts and opens the rewards, before anything is compiled.

    Raises:
      UserError: a field of the config, a line of the prompts or a reward does not fit.
    """
    setup.check(config)
    self._config = config
    self._read = prompts.read(config.rl.prompts, vars(config.data.shapes))
    self._rewards = rewards.opened(config.rl, [about for _, about in self._read])

  def open_data(self, tokenizer: Tokenizer, share: Sequence[int]) -> prompts.Prompts:
    """See `training.method.Method`."""
    self._tokenizer, own = tokenizer, self._config.rl
    return prompts.Prompts(self._config, self._read, tokenizer, share, own.group, own.prompts)

  def make_step(
    self, model: UnifiedModel, optimizer: optax.GradientTransformation, shardings: TrainState, options: Any
  ) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds step(state, asked) -> (state, metrics); see `training.program.make_program`."""
    config, mesh = self._config, shardings.step.mesh
    policy = make_policy(config, model, self._tokenizer)
    by_image, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    sample = jax.jit(make_sample(config, policy), out_shardings=(by_image, by_image, whole), compiler_options=options)
    update = jax.jit(
      make_update(config, policy, optimizer, [reward.name for reward in self._rewards]),
      out_shardings=(shardings, whole),
      donate_argnums=0,
      compiler_options=options,
    )
    draws = compilation.told("the drawing of pictures", sample)
    updates = compilation.told("the update", update)
    texts, about = zip(*self._read, strict=True)

    def step(state: TrainState, asked: prompts.Asked) -> tuple[TrainState, dict[str, jax.Array]]:
      drawn, images, diversity = draws(state.trained, state.frozen, state.step, asked)
      pictures, numbers = local(images), local(asked.number)
      own = rewards.scores(self._rewards, pictures, [texts[n] for n in numbers], [about[n] for n in numbers])
      scores = jax.make_array_from_process_local_data(by_image, own, (len(images), own.shape[1]))
      return updates(state, asked, drawn, scores, diversity)

    return step


class Preferred:
  """The method of a run with `rl.method="dpo"`; see `training.method.Method`."""

  def __init__(self, config: RunConfig):
    """Reads the list of pairs.

    Raises:
      UserError: a field of the config or a line of the pairs does not fit.
    """
    setup.check(config)
    self._config, self._read = config, pairs.read(config.rl.pairs, vars(config.data.shapes))

  def open_data(self, tokenizer: Tokenizer, share: Sequence[int]) -> pairs.Pairs:
    """See `training.method.Method`."""
    self._tokenizer = tokenizer
    return pairs.Pairs(self._config, self._read, tokenizer, share)

  def make_step(
    self, model: UnifiedModel, optimizer: optax.GradientTransformation, shardings: TrainState, options: Any
  ) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds step(state, pairs) -> (state, metrics); see `training.program.make_program`."""
    policy = make_policy(self._config, model, self._tokenizer)
    update = jax.jit(
      make_preference(self._config, policy, optimizer),
      out_shardings=(shardings, sharding.replicated(shardings.step.mesh)),
      donate_argnums=0,
      compiler_options=options,
    )
    return compilation.told("the update", update)


_METHODS = {"grpo": Reinforced, "dpo": Preferred}


def method(config: RunConfig) -> Method | None:
  """The method of a config, for `training.loop.train`; None without `rl.method`."""
  return _METHODS[config.rl.method](config) if config.rl.method else None


def make_policy(config: RunConfig, model: UnifiedModel, tokenizer: Any) -> Any:
  """The policy of a run, see `generation.base.Policy`."""
  writes = family(model.config.generation)
  exploration = writes.explores(**config.rl.explore)
  return registry.load(writes.policy)(model, exploration, tokenizer)


def make_sample(config: RunConfig, policy: Any) -> Callable[..., tuple[Any, jax.Array, jax.Array]]:
  """Builds sample(trained, frozen, step, asked) -> (what was drawn, uint8[I, H, W, 3], diversity), pure."""
  group, seed = config.rl.group, config.train.seed

  def sample(trained: Any, frozen: Any, step: jax.Array, asked: prompts.Asked) -> tuple[Any, jax.Array, jax.Array]:
    params, key = merge(trained, frozen), jax.random.fold_in(jax.random.key(seed), step)
    latents, drawn = policy.sample(params, asked.tokens, asked.lengths, key, group)
    pixels = jnp.clip(policy.decode(params, latents), -1.0, 1.0)
    images = ((pixels + 1.0) * 127.5).astype(jnp.uint8)  # as `inference.pipeline.to_image`
    return drawn, images, grpo.diversity(pixels, group)

  return sample


def make_update(
  config: RunConfig, policy: Any, optimizer: optax.GradientTransformation, names: Sequence[str]
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Builds update(state, asked, drawn, scores f32[I, R], diversity) -> (state, metrics), pure.

  `names`: of the rewards. `rl.updates` cuts the pictures into parts, each with an optimizer step; the parts of a group
  go to several.
  """
  own, micro, rate = config.rl, config.train.accumulation, schedule(config.optimizer)
  weights = np.asarray([weight for _, weight in own.rewards], np.float32)

  def update(
    state: TrainState, asked: prompts.Asked, drawn: Any, scores: jax.Array, diversity: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    rewards_I = scores @ weights
    advantages = grpo.advantages(rewards_I, own.group, own.advantage)
    count = len(rewards_I) // own.updates
    reference = reference_of(state) if own.refers else None

    def loss_fn(trained: Any, asked: prompts.Asked, drawn: Any, advantages: jax.Array) -> tuple[Any, grpo.Objective]:
      params = merge(trained, state.frozen)
      compared = policy.compare(params, reference, asked.tokens, asked.lengths, drawn)
      found = grpo.objective(compared, advantages, own.clip, own.kl, count)
      return found.loss, found

    def one(now: TrainState, rows: Any) -> tuple[TrainState, Any]:
      (_, found), grads = accumulated(loss_fn, now.trained, rows, micro)
      new, norm = updated(now, optimizer, config, found.loss, grads)
      return new, (found, norm)

    new, (found, norms) = jax.lax.scan(one, state, cut((asked, drawn, advantages), own.updates))
    done = own.updates * (state.step + 1) - new.skipped
    mean: Any = jax.tree.map(jnp.mean, found)
    metrics: dict[str, Any] = {"loss": mean.loss, "grad_norm": jnp.mean(norms), "learning_rate": rate(done - 1)}
    metrics |= {"reward": jnp.mean(rewards_I), "reward_spread": grpo.spread(rewards_I, own.group)}
    for column, name in enumerate(names):
      metrics[f"reward_{name}"] = jnp.mean(scores[:, column])
      metrics[f"reward_spread_{name}"] = grpo.spread(scores[:, column], own.group)
    metrics |= {"kl": mean.divergence} if own.refers else {}  # else there is nothing to compare with
    metrics |= {"ratio": mean.ratio, "clipped": mean.clipped, "diversity": diversity}
    metrics |= {"skipped": new.skipped, "skipped_in_a_row": new.skipped_in_a_row}
    return new.replace(step=state.step + 1), metrics

  return update


def make_preference(
  config: RunConfig, policy: Any, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Builds update(state, pairs) -> (state, metrics), pure. Both pictures of a pair have the same draws."""
  own, train, rate = config.rl, config.train, schedule(config.optimizer)

  def update(state: TrainState, compared: pairs.Compared) -> tuple[TrainState, dict[str, jax.Array]]:
    key, count = jax.random.fold_in(jax.random.key(train.seed), state.step), len(compared.better)
    reference, draws = reference_of(state), policy.draw(key, count)

    def loss_fn(trained: Any, some: pairs.Compared, draws: Any) -> tuple[Any, dpo.Objective]:
      params = merge(trained, state.frozen)

      def gained(pixels: jax.Array) -> jax.Array:
        given = (some.asked.tokens, some.asked.lengths, normalise(pixels), draws)
        return policy.likelihood(params, *given) - jax.lax.stop_gradient(policy.likelihood(reference, *given))

      found = dpo.objective(gained(some.better), gained(some.worse), own.beta, count)
      return found.loss, found

    (_, found), grads = accumulated(loss_fn, state.trained, (compared, draws), train.accumulation)
    new, norm = updated(state, optimizer, config, found.loss, grads)
    metrics = {"loss": found.loss, "grad_norm": norm, "learning_rate": rate(state.step - state.skipped)}
    metrics |= {"margin": found.margin, "preferred": found.preferred}
    metrics |= {"skipped": new.skipped, "skipped_in_a_row": new.skipped_in_a_row}
    return new, metrics

  return update


def reference_of(state: TrainState) -> Any:
  """The parameters that a run began with: the base without its adapters, or the copy in the state."""
  if state.reference is not None:
    return jax.lax.stop_gradient(merge(state.reference, state.frozen))
  flat = flatten_dict(merge(state.trained, state.frozen), sep="/")
  return jax.lax.stop_gradient(unflatten_dict({p: x for p, x in flat.items() if not lora.is_adapter(p)}, sep="/"))


def local(x: jax.Array) -> np.ndarray:
  """The rows of an array, cut along axis 0, that this process's devices hold, each once and in order."""
  parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
  return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
