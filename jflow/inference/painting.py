"""Painting: prompts -> latents by rectified flow with guidance, one compiled program for all steps.

Legend: N pictures, S prompt slots (bucketed), K = 1 + P slots of a picture, D embed, h w C latents.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jflow import flow
from jflow.models.janusflow import JanusFlow
from jflow.models.llm import Cache


@functools.partial(jax.jit, static_argnames=("model", "solver", "guided", "release"))
def paint(
  model: JanusFlow,
  params: Any,
  tokens_NS: jax.Array,
  lengths_N: jax.Array,
  noise_NhwC: jax.Array,
  grid: jax.Array,
  guidance: jax.Array,
  interval: jax.Array,
  *,
  solver: str,
  guided: bool,
  release: bool,
) -> jax.Array:
  """Solves the ODE from noise to pictures; the prompt's keys and values are computed once.

  The unconditional branch keeps BOS and hides the other prompt positions, while positions of the time token and
  the patches stay as they were (the release's sense of the empty prompt).

  Args:
    tokens_NS: int32 prompts, BOS first, padded on the right.
    lengths_N: int32 true lengths; the time token takes position `length`.
    noise_NhwC: f32, z at time 0.
    grid: f32[steps + 1] times from 0 to 1.
    guidance: f32[], w of eq. 5.
    interval: f32[2]; outside these times w is 1.
    guided: False skips the unconditional branch (w = 1).
    release: the state is kept in bf16, and time and step are rounded to bf16 as the published loop does.

  Returns:
    f32[N, H, W, 3], about [-1, 1], not clipped.
  """
  apply = functools.partial(model.apply, {"params": params})
  n, s = tokens_NS.shape
  k = 1 + model.config.patches
  segments = (jnp.arange(s) < lengths_N[:, None]).astype(jnp.int32)
  twice = lambda x: jnp.concatenate([x, x]) if guided else x
  if guided:
    segments = jnp.concatenate([segments, jnp.broadcast_to(jnp.arange(s) < 1, (n, s)).astype(jnp.int32)])
  rows = segments.shape[0]
  x = apply(twice(tokens_NS), method="embed")
  cache = Cache.empty(model.config.language_model, rows, s + k, x.dtype)
  positions = jnp.broadcast_to(jnp.arange(s), (rows, s))
  cache = apply(x, positions, segments, cache, method="backbone").cache
  positions = twice(lengths_N)[:, None] + jnp.arange(k)
  ones = jnp.ones((rows, k), jnp.int32)

  def velocity(z: jax.Array, time: jax.Array) -> jax.Array:
    slots, skip, time_ND = apply(z, jnp.broadcast_to(time, (n,)), method="write_slots")
    hidden = apply(twice(slots), positions, ones, cache, method="backbone").hidden[:, 1:]
    v = apply(hidden, twice(skip), twice(time_ND), method="velocity")
    if not guided:
      return v
    weight = jnp.where((time >= interval[0]) & (time <= interval[1]), guidance, 1.0)
    return flow.guide(v[:n], v[n:], weight)

  if release:
    z = _release_loop(velocity, noise_NhwC, grid.shape[0] - 1)
  else:
    z = flow.integrate(velocity, noise_NhwC, grid, solver)
  return apply(z.astype(jnp.float32), method="decode")


def _release_loop(velocity: flow.Velocity, noise: jax.Array, steps: int) -> jax.Array:
  """Euler as the published loop computes it: bf16 state, bf16(1000 k / steps) as time, bf16(1 / steps) as step."""
  dt = jnp.asarray(1.0 / steps, jnp.bfloat16)

  def body(i: jax.Array, z: jax.Array) -> jax.Array:
    time = (i.astype(jnp.float32) / steps * 1000.0).astype(jnp.bfloat16).astype(jnp.float32) / 1000.0
    return z + dt * velocity(z, time).astype(jnp.bfloat16)

  return jax.lax.fori_loop(0, steps, body, noise.astype(jnp.bfloat16))
