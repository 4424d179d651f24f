"""The gradient through the sampler against finite differences, and its images against the sampler's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from refusals import refused

from jflow.generation.flow.differentiable import sample
from jflow.generation.flow.sampler import FlowSampler
from jflow.generation.flow.settings import Settings
from jflow.models.unified import for_inference

TOKENS = np.array([[1, 40, 50, 60], [1, 70, 0, 0]], np.int32)
LENGTHS = np.array([4, 2], np.int32)
CASES = [Settings(steps=3), Settings(steps=2, guidance=1.0, solver="heun", shift=2.0)]


def noise() -> jax.Array:
  return jnp.asarray(FlowSampler(*for_inference(tiny.model(), tiny.params())).start([3, 4]))


@functools.partial(jax.jit, static_argnums=2)
def loss(params, z, settings):
  return jnp.mean(jnp.square(sample(tiny.model(), params, TOKENS, LENGTHS, z, settings) - 0.3))


@functools.cache
def gradients(settings):
  return jax.grad(loss, argnums=(0, 1))(tiny.params(), noise(), settings)


def slope(settings, params, z) -> float:
  """Along a direction, by a central difference."""
  step = 2e-3
  at = lambda sign: jax.tree.map(lambda x, d: x + sign * step * d, (tiny.params(), noise()), (params, z))
  return (float(loss(*at(1), settings)) - float(loss(*at(-1), settings))) / (2 * step)


@pytest.mark.parametrize("settings", CASES, ids=("euler, guided", "heun"))
def test_the_images_are_those_of_the_sampler(settings):
  sampler = FlowSampler(*for_inference(tiny.model(), tiny.params()))
  want = sampler.sample(TOKENS, LENGTHS, noise(), settings)
  got = jax.jit(lambda p, z: sample(tiny.model(), p, TOKENS, LENGTHS, z, settings))(tiny.params(), noise())
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", CASES, ids=("euler, guided", "heun"))
def test_the_gradient_by_the_noise_is_the_slope(settings):
  _, by_noise = gradients(settings)
  for direction in (by_noise / jnp.linalg.norm(by_noise), jax.random.normal(jax.random.key(0), by_noise.shape)):
    still = jax.tree.map(jnp.zeros_like, tiny.params())
    assert slope(settings, still, direction) == pytest.approx(float(jnp.vdot(by_noise, direction)), rel=0.01, abs=1e-4)


@pytest.mark.parametrize("part", ["language_model", "generation_encoder", "generation_decoder", "vae"])
def test_the_gradient_by_the_parameters_is_the_slope(part):
  by_params, _ = gradients(CASES[0])
  norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(by_params[part])))
  direction = jax.tree.map(jnp.zeros_like, tiny.params()) | {part: jax.tree.map(lambda g: g / norm, by_params[part])}
  assert slope(CASES[0], direction, jnp.zeros_like(noise())) == pytest.approx(float(norm), rel=0.01)


def test_what_painting_does_not_use_has_no_gradient():
  by_params, _ = gradients(CASES[0])
  moved = {path[0] for path, g in flatten_dict(by_params).items() if float(jnp.abs(g).max())}
  assert moved >= {"language_model", "generation_encoder", "generation_decoder", "vae"}
  assert not moved & {"understanding_encoder", "understanding_projector", "understanding_start", "alignment_head"}


def test_the_steps_of_the_release_are_refused():
  with refused("precision='release'"):
    sample(tiny.model(), tiny.params(), TOKENS, LENGTHS, noise(), Settings(precision="release"))
