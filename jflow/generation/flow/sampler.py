"""Sampling: prompts -> latents by rectified flow with guidance -> pixels. One program runs all solver steps.

Legend: I images, S prompt slots (bucketed), K = 1 + P slots of an image, D embed, h w C latents.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow.errors import UserError
from jflow.generation import slices
from jflow.generation.base import Loop, tenths
from jflow.generation.flow import equations
from jflow.generation.flow.settings import Settings
from jflow.models.cache import Cache, Prefix
from jflow.models.unified import UnifiedModel, normalise
from jflow.programs import bounded

_GRID = 256  # time grids are padded to a multiple of this, so that a new number of steps rarely compiles


class FlowSampler:
  """The sampler of rectified flow, see `generation.base.Sampler`. The prompts' keys and values are computed once.

  The unconditional branch sees only BOS, one copy for all images, with the positions of the time token and the patches
  unchanged: the release masks the other prompt tokens, which gives the same numbers.
  """

  halves = ("solve", "decode")

  def __init__(self, model: UnifiedModel, params: Any, tokenizer: Any = None):
    """`model`: with separate layers, see `unified.for_inference`. The time token is no token of `tokenizer`."""
    self._model, self._params = model, params
    c = model.config
    self._at_once = slices.at_once(c.image_size)
    self._shape = (c.latent_size, c.latent_size, c.autoencoder.latent_channels)

  def start(self, seeds: Sequence[int]) -> np.ndarray:
    """z at time 0, f32[I, h, w, C]."""
    made = {seed: np.asarray(jax.random.normal(jax.random.key(seed), self._shape)) for seed in set(seeds)}
    return np.stack([made[seed] for seed in seeds])

  def given(self, noise: Any, count: int) -> np.ndarray:
    """z at time 0 from f32[I, C, h, w] latents."""
    h, w, c = self._shape
    want = (count, c, h, w)
    try:
      noise = np.asarray(noise)
      shape, real = noise.shape, noise.dtype.kind != "c"
      noise = noise.astype(np.float32) if real else noise
    except (TypeError, ValueError, RuntimeError) as error:  # texts, lists of many lengths, tensors of a graph
      raise UserError(f"noise must be an array of numbers: {str(error).splitlines()[0]}") from None
    if shape != want:
      raise UserError(f"noise has shape {shape}, it must be {want} (images, channels, height, width)")
    if not (real and np.isfinite(noise).all()):
      raise UserError("noise must hold finite real numbers")
    return noise.transpose(0, 2, 3, 1)

  def evaluations(self, settings: Settings) -> int:
    """See `generation.base.Sampler.evaluations`."""
    return settings.evaluations

  def sample(
    self,
    tokens_IS: np.ndarray,
    lengths_I: np.ndarray,
    start: np.ndarray,
    settings: Settings,
    on_step: Callable[[int, int], None] | None = None,
  ) -> np.ndarray:
    """Solves the ODE and decodes the latents, see `write`."""
    return self.decode(self.write(tokens_IS, lengths_I, start, settings, on_step))

  def write(
    self,
    tokens_IS: np.ndarray,
    lengths_I: np.ndarray,
    start: np.ndarray,
    settings: Settings,
    on_step: Callable[[int, int], None] | None = None,
  ) -> jax.Array:
    """Solves the ODE (eq. 4, 5): latents [I, h, w, C]. With `on_step` the host waits for the device ten times."""
    steps, release = settings.steps, settings.precision == "release"
    grid = equations.time_grid(steps, settings.shift)
    grid = np.pad(np.asarray(grid, np.float32), (0, _padded(steps) - len(grid)), mode="edge")
    prefix = read_prompts(self._model, self._params, tokens_IS, lengths_I, guided=settings.guidance != 1.0)
    z = jnp.asarray(start, jnp.bfloat16 if release else jnp.float32)
    stops = tenths(steps) if on_step else [steps]
    for first, stop in zip([0, *stops], stops):
      z = solve(
        self._model,
        self._params,
        prefix,
        lengths_I,
        z,
        grid,
        np.int32(first),
        np.int32(stop),
        np.int32(steps),
        np.float32(settings.guidance),
        np.asarray(settings.interval, np.float32),
        solver=settings.solver,
        release=release,
      )
      if on_step:
        z.block_until_ready()
        on_step(stop, steps)
    return z

  def decode(self, z_IhwC: jax.Array) -> np.ndarray:
    """Pixels of latents, see `sample`."""
    return np.asarray(decode(self._model, self._params, z_IhwC, at_once=self._at_once))

  def round_trip(self, pixels_IHW3: np.ndarray) -> np.ndarray:
    """See `generation.base.Sampler.round_trip`; the latents are the posterior's mean."""
    return self.decode(encode(self._model, self._params, pixels_IHW3))

  def prepare(self, rows: int, slots: int, settings: Settings, compile: bool = True) -> bool:
    """See `generation.base.Sampler.prepare`."""
    to = (compile, self._model, self._params)
    tokens, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, slots), (rows,)))
    prefix = read_prompts.prepare(*to, tokens, lengths, guided=settings.guidance != 1.0)
    if prefix is None:
      return False
    args, static = self._solving(prefix, rows, settings)
    z = solve.prepare(*to, *args, **static)
    return z is not None and decode.prepare(*to, z, at_once=self._at_once) is not None

  def loop(self, rows: int, slots: int, settings: Settings) -> Loop:
    """See `generation.base.Sampler.loop`."""
    tokens, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, slots), (rows,)))
    read = read_prompts.jitted(self._model, guided=settings.guidance != 1.0)
    args, static = self._solving(jax.eval_shape(read, self._params, tokens, lengths), rows, settings)
    return Loop(solve, args, static, step="solver step", large=True)

  def _solving(self, prefix: Prefix, rows: int, settings: Settings) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `solve` after the params, as shapes, and its static ones."""
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    number = array(jnp.int32)
    args = (
      prefix,
      array(jnp.int32, rows),
      array(jnp.float32, rows, *self._shape),
      array(jnp.float32, _padded(settings.steps)),
      number,
      number,
      number,
      array(jnp.float32),
      array(jnp.float32, 2),
    )
    return args, dict(solver=settings.solver, release=settings.precision == "release")


def _padded(steps: int) -> int:
  """Number of entries of a padded time grid."""
  return 1 + -(-steps // _GRID) * _GRID


@bounded(most=16)
def read_prompts(
  model: UnifiedModel, params: Any, tokens_IS: jax.Array, lengths_I: jax.Array, *, guided: bool
) -> Prefix:
  """Keys and values of the prompts, and of BOS for the unconditional half where there is one."""

  def read(tokens: jax.Array, lengths: jax.Array) -> Cache:
    bound, (n, s) = model.bind({"params": params}), tokens.shape
    x = bound.embed(tokens)
    positions = jnp.broadcast_to(jnp.arange(s), (n, s))
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    cache = Cache.empty(model.config.language_model, n, s, x.dtype)
    return bound.backbone(x, positions, segments, cache).cache

  prompts = read(tokens_IS, lengths_I)
  return Prefix((prompts, read(tokens_IS[:1, :1], jnp.ones(1, jnp.int32))) if guided else (prompts,))


@bounded(most=16)
def solve(
  model: UnifiedModel,
  params: Any,
  prefix: Prefix,
  lengths_I: jax.Array,
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
  """Runs solver steps `first` to `stop` of `steps`; a prefix of two caches turns guidance on."""
  field = velocity(model, params, prefix, lengths_I, len(z), guidance, interval)
  if release:
    return _release_loop(field, z, first, stop, steps)
  return equations.integrate(field, z, grid, solver, first, stop)


def velocity(
  model: UnifiedModel,
  params: Any,
  prefix: Prefix,
  lengths_I: jax.Array,
  n: int,
  guidance: jax.Array | np.float32,
  interval: jax.Array | np.ndarray,
) -> equations.Velocity:
  """The velocity of `n` images behind their prompts; a prefix of two caches turns guidance on."""
  k = 1 + model.config.written_patches
  guided = len(prefix.caches) == 2
  twice = lambda x: jnp.concatenate([x, x]) if guided else x
  positions = twice(lengths_I)[:, None] + jnp.arange(k)

  def at(z: jax.Array, time: jax.Array) -> jax.Array:
    bound = model.bind({"params": params})
    slots, skip, time_ID = bound.writer.slots(z, jnp.broadcast_to(time, (n,)))
    hidden = bound.backbone(twice(slots), positions, jnp.ones_like(positions), prefix).hidden[:, 1:]
    v = bound.writer.velocity(hidden, twice(skip), twice(time_ID))
    if not guided:
      return v
    weight = jnp.where((time >= interval[0]) & (time <= interval[1]), guidance, 1.0)
    return equations.guide(v[:n], v[n:], weight)

  return at


def _release_loop(
  velocity: equations.Velocity, z: jax.Array, first: jax.Array, stop: jax.Array, steps: jax.Array
) -> jax.Array:
  """Euler as the published loop computes it: bf16 state, bf16(1000 k / steps) as time, bf16(1 / steps) as step."""
  dt = (1.0 / steps.astype(jnp.float32)).astype(jnp.bfloat16)

  def body(i: jax.Array, z: jax.Array) -> jax.Array:
    time = (i.astype(jnp.float32) / steps * 1000.0).astype(jnp.bfloat16).astype(jnp.float32) / 1000.0
    return z + dt * velocity(z, time).astype(jnp.bfloat16)

  return jax.lax.fori_loop(first, stop, body, z)


@functools.partial(jax.jit, static_argnames=("model",))
def encode(model: UnifiedModel, params: Any, pixels_NHW3: jax.Array) -> jax.Array:
  """uint8[I, H, W, 3] -> scaled latents f32[I, h, w, C], the posterior's mean."""
  return model.bind({"params": params}).writer.posterior(normalise(pixels_NHW3))[0]


@bounded(most=6)
def decode(model: UnifiedModel, params: Any, z_NhwC: jax.Array, *, at_once: int) -> jax.Array:
  """Scaled latents -> f32[I, H, W, 3], by the VAE on at most `at_once` images at a time."""
  return slices.decoded(model, params, z_NhwC.astype(jnp.float32), at_once)
