"""Laws of rectified flow: closed forms of the path, the times, the solvers and guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jflow.generation.flow import equations as flow

RNG = np.random.default_rng(0)


@pytest.mark.smoke
def test_path_starts_at_noise_ends_at_data_and_moves_at_the_target_velocity():
  noise, data = RNG.standard_normal((2, 5, 4, 4, 3)).astype(np.float32)
  ends = [np.asarray(flow.interpolate(noise, data, jnp.full(5, t))) for t in (0.0, 1.0)]
  np.testing.assert_array_equal(ends[0], noise)
  np.testing.assert_array_equal(ends[1], data)
  rate = jax.jvp(lambda t: flow.interpolate(noise, data, t), (jnp.full(5, 0.3),), (jnp.ones(5),))[1]
  np.testing.assert_allclose(rate, flow.velocity_target(noise, data), atol=1e-6)


def test_each_picture_gets_its_own_time():
  noise, data = np.zeros((2, 3, 4, 4, 1), np.float32), np.ones((2, 3, 4, 4, 1), np.float32)
  time = RNG.uniform(size=(2, 3)).astype(np.float32)
  np.testing.assert_allclose(np.asarray(flow.interpolate(noise, data, time)).mean((2, 3, 4)), time, rtol=1e-6)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 1.7)])
def test_times_are_logit_normal(mean, std):
  time = np.asarray(flow.logit_normal(jax.random.key(1), (20_000,), mean, std), np.float64)
  assert 0 < time.min() and time.max() < 1
  assert stats.kstest(np.log(time / (1 - time)), stats.norm(mean, std).cdf).pvalue > 0.01
  quantiles = [0.1, 0.5, 0.9]
  want = 1 / (1 + np.exp(-stats.norm(mean, std).ppf(quantiles)))
  np.testing.assert_allclose(np.quantile(time, quantiles), want, atol=0.015)


def test_guidance_one_is_the_conditional_and_zero_the_other():
  conditional, other = RNG.standard_normal((2, 7)).astype(np.float32)
  np.testing.assert_array_equal(flow.guide(conditional, other, 1.0), conditional)
  np.testing.assert_array_equal(flow.guide(conditional, other, 0.0), other)
  np.testing.assert_allclose(flow.guide(conditional, other, 2.5), 2.5 * conditional - 1.5 * other, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_even_grid_is_the_papers(steps):
  np.testing.assert_allclose(flow.time_grid(steps), np.arange(steps + 1) / steps, atol=1e-7)


def test_shifted_grid_keeps_its_ends_and_moves_towards_noise():
  grid, even = np.asarray(flow.time_grid(10, 3.0)), np.arange(11) / 10
  assert grid[0] == 0 and grid[-1] == 1 and (np.diff(grid) > 0).all()
  assert (grid[1:-1] < even[1:-1]).all()
  np.testing.assert_allclose(grid, even / (even + 3 * (1 - even)), atol=1e-6)
  # In terms of the share of noise 1 - t the shift multiplies the odds by s.
  inner = slice(1, -1)
  odds = lambda t: (1 - t[inner]) / t[inner]
  np.testing.assert_allclose(odds(grid), 3 * odds(even), rtol=1e-4)


@pytest.mark.parametrize("solver", flow.SOLVERS)
@pytest.mark.parametrize("steps", [1, 7])
def test_every_solver_is_exact_on_a_constant_field(solver, steps):
  noise, data = RNG.standard_normal((2, 3, 5)).astype(np.float32)
  field = lambda z, t: jnp.asarray(data - noise)
  end = flow.integrate(field, jnp.asarray(noise), flow.time_grid(steps, 2.0), solver)
  np.testing.assert_allclose(end, data, atol=1e-6)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_order_of_a_solver(solver, order):
  """dz/dt = z (1 + t) has z(1) = z(0) exp(3/2); halving the step divides the error by 2 ** order."""
  exact = np.exp(1.5)
  error = [
    abs(float(flow.integrate(lambda z, t: z * (1 + t), jnp.ones(()), flow.time_grid(n), solver)) - exact)
    for n in (16, 32)
  ]
  assert error[0] / error[1] == pytest.approx(2**order, rel=0.15)
  assert error[1] < 0.06 * exact


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_a_solver_costs_the_evaluations_it_states_and_asks_at_times_of_the_grid(solver):
  asked = []

  def field(z, t):
    jax.debug.callback(lambda t: asked.append(float(t)), t)
    return z

  flow.integrate(field, jnp.ones(()), flow.time_grid(4), solver).block_until_ready()
  jax.effects_barrier()
  assert len(asked) == 4 * flow.SOLVERS[solver][1]
  assert min(asked) == 0.0 and max(asked) <= 1.0
