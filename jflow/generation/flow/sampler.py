"""Painting: prompts -> latents by rectified flow with guidance -> pixels. One program runs all solver steps.

Legend: N pictures, S prompt slots (bucketed), K = 1 + P slots of a picture, D embed, h w C latents.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.errors import UserError
from jflow.generation.flow import equations as flow
from jflow.models.cache import Cache, Prefix
from jflow.models.unified import JanusFlow, normalise
from jflow.programs import Programs, bounded

_GRID = 256  # time grids are padded to a multiple of this: no usual number of steps compiles anew
_DECODED_AT_ONCE = 8 * 384 * 384  # pixels; the VAE's widest activations take 3 GB for them in f32


def check(
  prompts: Sequence[str],
  *,
  steps: int,
  guidance: float,
  seed: int,
  num_images: int,
  solver: str,
  shift: float,
  interval: tuple[float, float],
  precision: str,
  batch_size: int,
) -> None:
  """Checks what needs no model, see `Pipeline.generate`; raises UserError."""

  def need(ok: bool, message: str) -> None:
    if not ok:
      raise UserError(message)

  need(bool(prompts), "give at least one prompt")
  need(all(isinstance(prompt, str) for prompt in prompts), "a prompt must be text")
  need(all(prompt.strip() for prompt in prompts), "the prompt is empty: say what to paint")
  for name, value in dict(steps=steps, num_images=num_images, batch_size=batch_size).items():
    checks.whole(name, value)
  checks.seed(seed, num_images - 1)
  checks.number("guidance", guidance)
  need(
    guidance >= 1 or guidance == 0,
    f"guidance={guidance} must be at least 1 (1: none), or 0 (ignore the prompt)",
  )
  need(solver in flow.SOLVERS, f"solver={solver!r} must be one of {', '.join(flow.SOLVERS)}")
  checks.number("shift", shift)
  need(shift > 0, f"shift={shift} must be positive")
  need(
    isinstance(interval, (tuple, list)) and len(interval) == 2,
    f"interval={interval!r:.60} must hold two times in [0, 1], in order",
  )
  for time in interval:
    checks.number("a time of interval", time)
  need(
    0 <= interval[0] <= interval[1] <= 1,
    f"interval={tuple(interval)} must hold two times in [0, 1], in order",
  )
  need(precision in ("exact", "release"), f"precision={precision!r} must be 'exact' or 'release'")
  need(
    precision == "exact" or (solver == "euler" and shift == 1.0),
    "precision='release' goes with solver='euler' and shift=1",
  )


def paint(
  model: JanusFlow,
  params: Any,
  tokens_NS: np.ndarray,
  lengths_N: np.ndarray,
  noise_NhwC: np.ndarray,
  grid: np.ndarray,
  guidance: float,
  interval: tuple[float, float],
  *,
  solver: str,
  guided: bool,
  release: bool,
  on_step: Callable[[int, int], None] | None = None,
) -> jax.Array:
  """Solves the ODE from noise to pictures; the prompts' keys and values are computed once.

  The unconditional branch sees BOS alone, one copy for all pictures, while positions of the time token and the
  patches stay as they were: the release hides the other prompt tokens, which gives the same numbers.

  Args:
    model: with separate layers, see `janusflow.for_inference`.
    tokens_NS: int32 prompts, BOS first, padded on the right.
    lengths_N: int32 true lengths; the time token takes position `length`.
    noise_NhwC: f32, z at time 0.
    grid: f32[steps + 1] times from 0 to 1.
    guidance: w of eq. 5.
    interval: outside these times w is 1.
    guided: False skips the unconditional branch (w = 1).
    release: the state is kept in bf16, and time and step are rounded to bf16 as the published loop does.
    on_step: called with (steps done, steps); the host then waits ten times for the device, else not at all.

  Returns:
    f32[N, H, W, 3], about [-1, 1], not clipped.
  """
  steps = len(grid) - 1
  padded = np.pad(np.asarray(grid, np.float32), (0, _padded(steps) - len(grid)), mode="edge")
  prefix = read_prompts(model, params, tokens_NS, lengths_N, guided=guided)
  z = jnp.asarray(noise_NhwC, jnp.bfloat16 if release else jnp.float32)
  pieces = min(10, steps) if on_step else 1
  stops = [steps * (i + 1) // pieces for i in range(pieces)]
  for first, stop in zip([0, *stops], stops):
    z = solve(
      model,
      params,
      prefix,
      lengths_N,
      z,
      padded,
      np.int32(first),
      np.int32(stop),
      np.int32(steps),
      np.float32(guidance),
      np.asarray(interval, np.float32),
      solver=solver,
      release=release,
    )
    if on_step:
      z.block_until_ready()
      on_step(stop, steps)
  return decode(model, params, z, at_once=decoded_at_once(model.config.image_size))


def prepare(
  model: JanusFlow,
  params: Any,
  rows: int,
  slots: int,
  steps: int,
  *,
  solver: str,
  guided: bool,
  compile: bool = True,
) -> bool:
  """Compiles what `paint` runs for `rows` prompts of `slots` tokens, or looks whether that is done.

  Returns:
    Whether `paint` has nothing left to compile.
  """
  c = model.config

  def results(program: Programs, *args: Any, **static: Any) -> Any:
    return program.compile(model, params, *args, **static) if compile else program.kept(model, *args, **static)

  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  number, lengths = array(jnp.int32), array(jnp.int32, rows)
  prefix = results(read_prompts, array(jnp.int32, rows, slots), lengths, guided=guided)
  if prefix is None:
    return False
  z = array(jnp.float32, rows, c.latent_size, c.latent_size, c.autoencoder.latent_channels)
  z = results(
    solve,
    prefix,
    lengths,
    z,
    array(jnp.float32, _padded(steps)),
    number,
    number,
    number,
    array(jnp.float32),
    array(jnp.float32, 2),
    solver=solver,
    release=False,
  )
  return z is not None and results(decode, z, at_once=decoded_at_once(c.image_size)) is not None


def _padded(steps: int) -> int:
  """Entries of a time grid, padded."""
  return 1 + -(-steps // _GRID) * _GRID


@bounded(most=16)
def read_prompts(model: JanusFlow, params: Any, tokens_NS: jax.Array, lengths_N: jax.Array, *, guided: bool) -> Prefix:
  """Keys and values of the prompts, and of BOS for the unconditional half where there is one."""
  apply = functools.partial(model.apply, {"params": params})

  def read(tokens: jax.Array, lengths: jax.Array) -> Cache:
    n, s = tokens.shape
    x = apply(tokens, method="embed")
    positions = jnp.broadcast_to(jnp.arange(s), (n, s))
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    cache = Cache.empty(model.config.language_model, n, s, x.dtype)
    return apply(x, positions, segments, cache, method="backbone").cache

  prompts = read(tokens_NS, lengths_N)
  return Prefix((prompts, read(tokens_NS[:1, :1], jnp.ones(1, jnp.int32))) if guided else (prompts,))


@bounded(most=16)
def solve(
  model: JanusFlow,
  params: Any,
  prefix: Prefix,
  lengths_N: jax.Array,
  z: jax.Array,
  grid: jax.Array,
  first: jax.Array,
  stop: jax.Array,
  steps: jax.Array,
  guidance: jax.Array,
  interval: jax.Array,
  *,
  solver: str,
  release: bool,
) -> jax.Array:
  """Solver steps `first` to `stop` of `steps`; see `paint`. `prefix`: with two caches the pictures are guided."""
  apply = functools.partial(model.apply, {"params": params})
  n, k = len(z), 1 + model.config.patches
  guided = len(prefix.caches) == 2
  twice = lambda x: jnp.concatenate([x, x]) if guided else x
  positions = twice(lengths_N)[:, None] + jnp.arange(k)

  def velocity(z: jax.Array, time: jax.Array) -> jax.Array:
    slots, skip, time_ND = apply(z, jnp.broadcast_to(time, (n,)), method="write_slots")
    hidden = apply(twice(slots), positions, jnp.ones_like(positions), prefix, method="backbone").hidden[:, 1:]
    v = apply(hidden, twice(skip), twice(time_ND), method="velocity")
    if not guided:
      return v
    weight = jnp.where((time >= interval[0]) & (time <= interval[1]), guidance, 1.0)
    return flow.guide(v[:n], v[n:], weight)

  if release:
    return _release_loop(velocity, z, first, stop, steps)
  return flow.integrate(velocity, z, grid, solver, first, stop)


def _release_loop(
  velocity: flow.Velocity, z: jax.Array, first: jax.Array, stop: jax.Array, steps: jax.Array
) -> jax.Array:
  """Euler as the published loop computes it: bf16 state, bf16(1000 k / steps) as time, bf16(1 / steps) as step."""
  dt = (1.0 / steps.astype(jnp.float32)).astype(jnp.bfloat16)

  def body(i: jax.Array, z: jax.Array) -> jax.Array:
    time = (i.astype(jnp.float32) / steps * 1000.0).astype(jnp.bfloat16).astype(jnp.float32) / 1000.0
    return z + dt * velocity(z, time).astype(jnp.bfloat16)

  return jax.lax.fori_loop(first, stop, body, z)


def decoded_at_once(image_size: int) -> int:
  """Pictures that the VAE takes at a time."""
  return max(1, _DECODED_AT_ONCE // image_size**2)


@functools.partial(jax.jit, static_argnames=("model",))
def encode(model: JanusFlow, params: Any, pixels_NHW3: jax.Array) -> jax.Array:
  """uint8[N, H, W, 3] -> scaled latents f32[N, h, w, C], the posterior's mean."""
  return model.apply({"params": params}, normalise(pixels_NHW3), method="posterior")[0]


@bounded(most=6)
def decode(model: JanusFlow, params: Any, z_NhwC: jax.Array, *, at_once: int) -> jax.Array:
  """Scaled latents -> f32[N, H, W, 3], the VAE on at most `at_once` pictures at a time."""
  whole = lambda z: model.apply({"params": params}, z.astype(jnp.float32), method="decode")
  n = len(z_NhwC)
  if n <= at_once:
    return whole(z_NhwC)
  cut = n - n % at_once
  slices = z_NhwC[:cut].reshape(-1, at_once, *z_NhwC.shape[1:])
  pixels = jax.lax.map(whole, slices)
  pixels = pixels.reshape(cut, *pixels.shape[2:])
  return jnp.concatenate([pixels, whole(z_NhwC[cut:])]) if cut < n else pixels
