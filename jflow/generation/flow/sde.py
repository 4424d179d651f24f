"""Rectified flow as a stochastic policy: an SDE with the marginals of the ODE, and the Gaussian of each of its steps.

Time runs from 0 (noise) to 1 (data): z_t = t x + (1 - t) z_0. Given the data, z_t is normal with mean t x and deviation
1 - t, so the score of the marginal follows from the velocity v(z, t) = E[x - z_0 | z_t = z]:

  score(z, t) = -E[z_0 | z] / (1 - t) = -(z - t v) / (1 - t).

For any s(t), the Fokker-Planck equation of

  dz = [v + s^2 / 2 score] dt + s dw

is that of dz = v dt, since s^2 / 2 div(p score) = s^2 / 2 laplace(p): same marginals. In x^ = z + (1 - t) v, the data
that the velocity points to, and e^ = z - t v, the noise that it comes from (z = t x^ + (1 - t) e^), the SDE reads,
while x^ stays as it is,

  de^ = -L' / 2 e^ dt + sqrt(L') dw,   L'(t) = s^2 / (1 - t)^2,

an Ornstein-Uhlenbeck process that forgets noise and draws it anew. Over a step from t to u it has the exact solution

  z_u = u x^ + (1 - u) (k e^ + sqrt(1 - k^2) eps),   k = exp(-(L(u) - L(t)) / 2),   eps ~ N(0, 1).

With s^2 = a^2 (1 - t) / t, Flow-GRPO's (arXiv 2505.05470, whose time runs the other way), L = a^2 log(t / (1 - t)),
thus

  k = (t (1 - u) / (u (1 - t)))^(a^2 / 2).

Differs from that paper: it takes Euler-Maruyama's step, whose variance is too large for few steps and infinite at t =
0. This one has the noise of time u at every number of steps (as arXiv 2509.05952 asks), is finite at both ends, and
with a = 0 is Euler's step of the ODE. The last step, to u = 1, draws nothing.

Log-probabilities, ratios and divergences are means over an image's latents, as in the papers: of sums, a ratio of
thousands of dimensions would leave any clip range at the first update.
"""

import jax
import jax.numpy as jnp
import numpy as np

AXES = (-3, -2, -1)  # of an image's latents


def kept(grid: np.ndarray, noise: float) -> np.ndarray:
  """k of each step, f32[steps]: the share of the old noise. `grid`: times from 0 to 1; `noise`: a."""
  t, u = np.asarray(grid[:-1], np.float64), np.asarray(grid[1:], np.float64)
  with np.errstate(divide="ignore"):
    odds = np.where(u < 1, t * (1 - u) / (u * np.where(t < 1, 1 - t, 1.0)), 0.0)
  return (odds ** (noise**2 / 2)).astype(np.float32)


def mean(z: jax.Array, velocity: jax.Array, t: jax.Array, u: jax.Array, keep: jax.Array) -> jax.Array:
  """The mean of z_u given z at time t."""
  data, noise = z + (1.0 - t) * velocity, z - t * velocity
  return u * data + (1.0 - u) * keep * noise


def deviation(u: jax.Array, keep: jax.Array) -> jax.Array:
  """The deviation of z_u given z."""
  return (1.0 - u) * jnp.sqrt(jnp.maximum(0.0, 1.0 - jnp.square(keep)))


def log_ratio(
  after: jax.Array, mean: jax.Array, old: jax.Array, deviation: jax.Array, normalised: bool = False
) -> jax.Array:
  """log N(after; mean) - log N(after; old), the mean over an image's latents: [..., h, w, C] -> [...].

  With e = (after - old) / deviation and d = (mean - old) / deviation it is the mean of e d - d^2 / 2, whose second term
  is negative, and whose first grows as the deviation shrinks: late steps leave the clip range first, and downwards.
  `normalised` takes the mean of e (mean - old), without the bias and of one scale at all times (after GRPO-Guard's
  RatioNorm, arXiv 2510.22319).
  """
  drawn = (after - old) / deviation
  if normalised:
    return jnp.mean(drawn * (mean - old), AXES)
  moved = (mean - old) / deviation
  return jnp.mean(drawn * moved - 0.5 * jnp.square(moved), AXES)


def divergence(mean: jax.Array, reference: jax.Array, deviation: jax.Array) -> jax.Array:
  """KL(N(mean) || N(reference)) of one deviation, the mean over an image's latents: [..., h, w, C] -> [...]."""
  return 0.5 * jnp.mean(jnp.square((mean - reference) / deviation), AXES)
