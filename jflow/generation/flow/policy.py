"""Rectified flow as a policy: a picture is drawn by the steps of an SDE, and the steps that draw are its actions.

Legend: I images, S prompt slots, N solver steps, A steps that draw (N - 1, or those of the window), h w C latents.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow.generation import slices
from jflow.generation.base import Compared, Trajectory
from jflow.generation.flow import equations, sampler, sde
from jflow.generation.flow.config import FlowExploration
from jflow.models.unified import UnifiedModel, with_separate_layers
from jflow.sharding import constrain

_WHOLE = np.asarray((0.0, 1.0), np.float32)  # guidance acts at all times


class Drawn(NamedTuple):
  """The steps of trajectories that draw."""

  step: jax.Array  # int32[I, A], its number
  before: jax.Array  # f32[I, A, h, w, C]
  after: jax.Array  # f32[I, A, h, w, C]
  mean: jax.Array  # f32[I, A, h, w, C], of `after` under the policy that drew it


class FlowPolicy:
  """The policy of rectified flow, see `generation.base.Policy`.

  The images of a prompt start from the same noise: they differ by their actions alone.
  """

  def __init__(self, model: UnifiedModel, exploration: FlowExploration, tokenizer: Any = None):
    """The time token is no token of `tokenizer`."""
    c, self._model, self._explore = model.config, model, exploration
    self._shape = (c.latent_size, c.latent_size, c.autoencoder.latent_channels)
    self._grid = equations.time_grid(exploration.steps)
    self._kept = sde.kept(self._grid, exploration.noise)
    self._actions = exploration.window or exploration.steps - 1

  def sample(self, params: Any, tokens_IS: jax.Array, lengths_I: jax.Array, key: jax.Array, group: int) -> Trajectory:
    """See `generation.base.Policy.sample`."""
    count, steps = len(tokens_IS), self._explore.steps
    noise_key, draw_key, place_key = jax.random.split(key, 3)
    first = jax.random.randint(place_key, (), 0, steps - self._actions)
    velocity = self._velocity(params, tokens_IS, lengths_I)
    z = jnp.repeat(jax.random.normal(noise_key, (count // group, *self._shape)), group, axis=0)

    def step(z: jax.Array, k: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
      z = constrain(z, "batch", None, None, None)
      draws = (k >= first) & (k < first + self._actions)
      mean, deviation = self._step(velocity, z, k, draws)
      after = mean + deviation * jax.random.normal(jax.random.fold_in(draw_key, k), z.shape)
      return after, (z, after, mean)

    latents, states = jax.lax.scan(step, z, jnp.arange(steps))
    window = (jnp.moveaxis(jax.lax.dynamic_slice_in_dim(x, first, self._actions), 0, 1) for x in states)
    numbers = jnp.broadcast_to(first + jnp.arange(self._actions), (count, self._actions))
    return Trajectory(latents, Drawn(numbers, *window))

  def decode(self, params: Any, latents: jax.Array) -> jax.Array:
    """See `generation.base.Policy.decode`."""
    return slices.decoded(self._model, params, latents)

  def compare(self, params: Any, reference: Any, tokens_IS: jax.Array, lengths_I: jax.Array, drawn: Drawn) -> Compared:
    """See `generation.base.Policy.compare`. Of each step the state alone is kept for the backward pass."""
    ours = self._velocity(params, tokens_IS, lengths_I)
    theirs = None if reference is None else self._velocity(reference, tokens_IS, lengths_I)

    def step(_: None, one: Drawn) -> tuple[None, Compared]:
      mean, deviation = self._step(ours, one.before, one.step[0], jnp.bool_(True))
      ratio = sde.log_ratio(one.after, mean, one.mean, deviation, self._explore.normalised)
      if theirs is None:
        return None, Compared(ratio, jnp.zeros_like(ratio))
      other = jax.lax.stop_gradient(self._step(theirs, one.before, one.step[0], jnp.bool_(True))[0])
      return None, Compared(ratio, sde.divergence(mean, other, deviation))

    by_step = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), drawn)
    _, compared = jax.lax.scan(jax.checkpoint(step), None, by_step)
    return Compared(*(x.T for x in compared))

  def likelihood(
    self, params: Any, tokens_IS: jax.Array, lengths_I: jax.Array, pixels_IHWC: jax.Array, draws: tuple[Any, Any]
  ) -> jax.Array:
    """Minus half the squared error of the velocity (eq. 7): see `generation.base.Policy.likelihood`.

    Without guidance, at the mean of the picture's posterior.
    """
    time_I, noise = draws
    data, _ = self._model.bind({"params": params}).writer.posterior(pixels_IHWC)
    z = equations.interpolate(noise, jax.lax.stop_gradient(data), time_I)
    model, separate = with_separate_layers(self._model, params)
    prefix = sampler.read_prompts.function(model, separate, tokens_IS, lengths_I, guided=False)
    velocity = sampler.velocity(model, separate, prefix, lengths_I, len(z), np.float32(1), _WHOLE)
    error = jnp.square(velocity(z, time_I) - equations.velocity_target(noise, data))
    return -0.5 * jnp.mean(error, sde.AXES)

  def draw(self, key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Times, as in training with a standard normal logit, and noise."""
    time, noise = jax.random.split(key)
    return equations.logit_normal(time, (count,), 0.0, 1.0), jax.random.normal(noise, (count, *self._shape))

  def _velocity(self, params: Any, tokens_IS: jax.Array, lengths_I: jax.Array) -> equations.Velocity:
    """The guided velocity of images behind their prompts."""
    model, params = with_separate_layers(self._model, params)
    guidance = np.float32(self._explore.guidance)
    prefix = sampler.read_prompts.function(model, params, tokens_IS, lengths_I, guided=guidance != 1)
    return sampler.velocity(model, params, prefix, lengths_I, len(tokens_IS), guidance, _WHOLE)

  def _step(
    self, velocity: equations.Velocity, z: jax.Array, k: jax.Array, draws: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Mean [I, h, w, C] and deviation [] of the state after step k; without draws, Euler's step of the ODE."""
    grid, kept = jnp.asarray(self._grid), jnp.asarray(self._kept)
    t, u, keep = grid[k], grid[k + 1], jnp.where(draws, kept[k], 1.0)
    return sde.mean(z, velocity(z, t), t, u, keep), sde.deviation(u, keep)
