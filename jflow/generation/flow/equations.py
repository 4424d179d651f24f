"""Rectified flow, pure: time distribution, interpolation, velocity, solvers, guidance (paper sections 3.1, 3.2).

Time runs from 0 (noise) to 1 (data): z_t = t x + (1 - t) z_0, dz_t/dt = x - z_0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def logit_normal(key: jax.Array, shape: tuple[int, ...], mean: float, std: float) -> jax.Array:
  """Times in (0, 1) whose logit is normal (paper section 3.4). Not in the paper: its mean and deviation."""
  return jax.nn.sigmoid(mean + std * jax.random.normal(key, shape))


def interpolate(noise: jax.Array, data: jax.Array, time: jax.Array) -> jax.Array:
  """z_t = t x + (1 - t) z_0 (eq. 2, 3); `time` has the leading axes of `data`."""
  time = time.reshape(time.shape + (1,) * (data.ndim - time.ndim))
  return time * data + (1.0 - time) * noise


def velocity_target(noise: jax.Array, data: jax.Array) -> jax.Array:
  """x - z_0, the velocity of the straight path (eq. 3, 7)."""
  return data - noise


def guide(conditional: jax.Array, unconditional: jax.Array, guidance: jax.Array | float) -> jax.Array:
  """v = w v(z | prompt) + (1 - w) v(z | empty) (eq. 5); w = 1 is the conditional velocity, w = 0 the other."""
  return guidance * conditional + (1.0 - guidance) * unconditional


Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (z, time f32[]) -> dz/dt


def _euler(f: Velocity, z: jax.Array, t: jax.Array, dt: jax.Array) -> jax.Array:
  return z + dt * f(z, t)


def _heun(f: Velocity, z: jax.Array, t: jax.Array, dt: jax.Array) -> jax.Array:
  first = f(z, t)
  return z + 0.5 * dt * (first + f(z + dt * first, t + dt))


def _midpoint(f: Velocity, z: jax.Array, t: jax.Array, dt: jax.Array) -> jax.Array:
  return z + dt * f(z + 0.5 * dt * f(z, t), t + 0.5 * dt)


# Solver -> (one step, evaluations of the velocity per step).
SOLVERS = {"euler": (_euler, 1), "heun": (_heun, 2), "midpoint": (_midpoint, 2)}


def time_grid(steps: int, shift: float = 1.0) -> np.ndarray:
  """f32[steps + 1] from 0 to 1; a shift s > 1 moves steps towards noise: t -> t / (t + s (1 - t)).

  Not in the paper: the shift. 1 is the paper's even grid.
  """
  # By NumPy, so that a new number of steps does not compile a new program; bit-identical to `jnp.linspace`.
  one = np.float32(1.0)
  t = np.append(np.arange(steps, dtype=np.float32) * (one / np.float32(steps)), one)
  return t / (t + np.float32(shift) * (one - t))


def integrate(
  velocity: Velocity,
  z: jax.Array,
  grid: jax.Array | np.ndarray,
  solver: str,
  first: jax.Array | int = 0,
  stop: jax.Array | int | None = None,
) -> jax.Array:
  """Solves dz/dt = velocity(z, t) from `z` at grid[0] to grid[-1] (eq. 4), in the dtype of `z`.

  `first` and `stop` solve from grid[first] to grid[stop]; they may be traced, so that one program serves any part.
  Reverse mode differentiates it where they are not traced.
  """
  step, _ = SOLVERS[solver]
  grid = jnp.asarray(grid)

  def body(i: jax.Array, z: jax.Array) -> jax.Array:
    return step(velocity, z, grid[i], grid[i + 1] - grid[i]).astype(z.dtype)

  return jax.lax.fori_loop(first, grid.shape[0] - 1 if stop is None else stop, body, z)
