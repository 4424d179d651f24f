"""Group relative policy optimisation, pure (GRPO, arXiv 2402.03300; of flow, Flow-GRPO, arXiv 2505.05470).

Legend: I pictures, those of a prompt consecutive, R rewards, A actions of a picture.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jflow.generation.base import Compared

_LEAST = 1e-6  # of a deviation: a group of equal rewards has no advantage


class Objective(NamedTuple):
  """Sums over pictures and actions, divided by the numbers of the whole batch."""

  loss: jax.Array  # f32[]
  divergence: jax.Array  # f32[], the mean KL to the reference
  clipped: jax.Array  # f32[], the share of actions whose ratio the clip range stops
  ratio: jax.Array  # f32[], the mean


def groups(x: jax.Array, group: int) -> jax.Array:
  """[I, ...] -> [I / group, group, ...]."""
  return x.reshape(-1, group, *x.shape[1:])


def advantages(rewards_I: jax.Array, group: int, kind: str) -> jax.Array:
  """How much better each picture is than its group, f32[I].

  Args:
    rewards_I: f32.
    group: pictures of a prompt.
    kind: what the difference from the group's mean is divided by: the deviation of rewards in the "group", or in the
      "batch", which weighs prompts by how much their pictures differ; "mean": nothing (arXiv 2503.20783).
  """
  each = groups(rewards_I, group)
  less = each - each.mean(1, keepdims=True)
  spread = {
    "group": jnp.sqrt(jnp.mean(jnp.square(less), 1, keepdims=True)) + _LEAST,
    "batch": jnp.sqrt(jnp.mean(jnp.square(less))) + _LEAST,
    "mean": jnp.ones(()),
  }[kind]
  return (less / spread).reshape(-1)


def objective(compared: Compared, advantages_I: jax.Array, clip: float, kl: float, count: int) -> Objective:
  """The clipped surrogate with the divergence from the reference, to be minimised.

  -min(r a, clip(r, 1 - c, 1 + c) a) + kl KL, the mean over actions and over `count` pictures, of which these are a
  part: the sums of parts add up. At the parameters that drew, r = 1 and the gradient is REINFORCE's, -a grad log p.
  """
  ratio_IA, advantage_I1 = jnp.exp(compared.log_ratio), advantages_I[:, None]
  inside_IA = jnp.clip(ratio_IA, 1.0 - clip, 1.0 + clip)
  gain_IA = jnp.minimum(ratio_IA * advantage_I1, inside_IA * advantage_I1)
  stopped_IA = (ratio_IA * advantage_I1 > inside_IA * advantage_I1).astype(jnp.float32)
  total = lambda x_IA: jnp.sum(jnp.mean(x_IA, 1)) / count
  divergence = total(compared.divergence)
  return Objective(kl * divergence - total(gain_IA), divergence, total(stopped_IA), total(ratio_IA))


def spread(rewards_I: jax.Array, group: int) -> jax.Array:
  """The mean deviation of rewards within groups, f32[]; 0 where nothing can be learned."""
  return jnp.mean(jnp.std(groups(rewards_I, group), axis=1))


def diversity(pixels: jax.Array, group: int) -> jax.Array:
  """The root mean square deviation of pixels from their group's mean picture, f32[]; 0 where all are one picture."""
  return jnp.sqrt(jnp.mean(jnp.var(groups(pixels.astype(jnp.float32), group), axis=1)))
