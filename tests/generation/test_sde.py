"""Laws of the SDE of rectified flow: its marginals are those of the ODE, and each step is the Gaussian it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jflow.generation.flow import equations, sde

WEIGHTS, MEANS, DEVIATIONS = np.array([0.3, 0.7]), np.array([-2.0, 1.0]), np.array([0.3, 0.5])


def mixture_velocity(z, t):
  """E[x - z_0 | z_t = z] of a mixture of normals in one dimension, by Bayes' rule."""
  variance = (t * DEVIATIONS) ** 2 + (1 - t) ** 2
  apart = z[..., None] - t * MEANS
  log = jnp.log(WEIGHTS) - 0.5 * apart**2 / variance - 0.5 * jnp.log(variance)
  posterior = jax.nn.softmax(log, axis=-1)
  data = MEANS + t * DEVIATIONS**2 / variance * apart
  noise = (1 - t) / variance * apart
  return jnp.sum(posterior * (data - noise), axis=-1)


def marginal(t):
  """Cumulative distribution of z_t."""
  deviation = np.sqrt((t * DEVIATIONS) ** 2 + (1 - t) ** 2)
  return lambda z: sum(w * stats.norm(t * m, s).cdf(z) for w, m, s in zip(WEIGHTS, MEANS, deviation))


def solve(velocity, z, grid, noise):
  """z at each time of the grid after the first."""
  key = jax.random.key(0)

  def step(z, now):
    k, t, u, keep = now
    drawn = jax.random.normal(jax.random.fold_in(key, k), z.shape)
    z = sde.mean(z, velocity(z, t), t, u, keep) + sde.deviation(u, keep) * drawn
    return z, z

  return jax.lax.scan(step, z, (np.arange(len(grid) - 1), grid[:-1], grid[1:], sde.kept(grid, noise)))[1]


@pytest.mark.parametrize("noise", [0.0, 0.4, 1.0])
def test_marginals_of_a_mixture_are_the_odes(noise):
  grid = equations.time_grid(100)
  start = jax.random.normal(jax.random.key(1), (20_000,))
  found = np.asarray(solve(mixture_velocity, start, grid, noise), np.float64)
  for stop in (30, 80, 100):
    z = found[stop - 1]
    assert stats.kstest(z, marginal(float(grid[stop]))).statistic < 0.02  # 0.01 by chance, the rest by 100 steps
  together = abs(np.corrcoef(found[-1], np.asarray(start))[0, 1])
  assert together < 0.1 if noise else together > 0.5  # with noise it is no function of where it started


@pytest.mark.parametrize("steps", [2, 3, 10])
@pytest.mark.parametrize("noise", [0.3, 1.0, 2.0])
def test_noise_is_that_of_the_time_however_few_the_steps(steps, noise):
  """Of one true picture, whose velocity is (x - z) / (1 - t): exactly normal with t x and 1 - t after every step."""
  grid, data = equations.time_grid(steps), 1.7
  start = jax.random.normal(jax.random.key(2), (20_000,))
  found = np.asarray(solve(lambda z, t: (data - z) / (1 - t), start, grid, noise))
  for z, u in zip(found[:-1], grid[1:-1].tolist()):
    assert z.mean() == pytest.approx(u * data, abs=0.03)
    assert z.std() == pytest.approx(1 - u, rel=0.03)
  np.testing.assert_allclose(found[-1], data, atol=1e-5)


def test_without_noise_it_is_the_ode():
  grid, z = equations.time_grid(7), jax.random.normal(jax.random.key(3), (4, 2, 2, 3))
  velocity = lambda z, t: jnp.sin(z) - t * z
  np.testing.assert_allclose(
    solve(velocity, z, grid, 0.0)[-1], equations.integrate(velocity, z, grid, "euler"), atol=1e-6
  )


def test_ratio_and_divergence_are_those_of_normals():
  rng = np.random.default_rng(0)
  after, mean, old = rng.standard_normal((3, 5, 2, 2, 3))
  deviation = 0.4
  density = lambda m: stats.norm(m, deviation).logpdf(after).mean((1, 2, 3))
  np.testing.assert_allclose(sde.log_ratio(after, mean, old, deviation), density(mean) - density(old), rtol=1e-4)
  np.testing.assert_allclose(sde.log_ratio(after, old, old, deviation), 0)
  want = np.square(mean - old).mean((1, 2, 3)) / (2 * deviation**2)
  np.testing.assert_allclose(sde.divergence(mean, old, deviation), want, rtol=1e-5)
  normalised = sde.log_ratio(after, mean, old, deviation, normalised=True)
  np.testing.assert_allclose(normalised, deviation * (density(mean) - density(old) + want), rtol=1e-4, atol=1e-6)


def test_a_normalised_ratio_has_no_bias():
  """Where the policy that drew is left by a random move, the mean log-ratio is below 0, the normalised one 0."""
  old, move = np.zeros((4000, 1, 1, 3)), 0.5
  after = 0.4 * np.random.default_rng(1).standard_normal(old.shape)
  plain, normalised = (float(jnp.mean(sde.log_ratio(after, old + move, old, 0.4, kind))) for kind in (False, True))
  assert plain == pytest.approx(-0.5 * (move / 0.4) ** 2, rel=0.1) and abs(normalised) < 0.02
