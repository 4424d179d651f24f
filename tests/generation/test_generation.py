"""The ConvNeXt encoder and decoder: closed forms of each part, order of channels, size of the full model."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused

from jflow.generation.flow import convnext as generation
from jflow.generation.flow.config import FlowConfig
from jflow.generation.flow.convnext import ConvNeXtBlock, GenerationDecoder, GenerationEncoder
from jflow.models.siglip import patchify
from jflow.sharding import unbox

TINY = FlowConfig(kind="flow", channels=8, encoder_blocks=2, decoder_blocks=2, patch_size=2, norm_epsilon=1e-6)


def _random(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _noisy(params):
  leaves, tree = jax.tree.flatten(params)
  return tree.unflatten([x + 0.2 * _random(*x.shape, seed=i) for i, x in enumerate(leaves)])


def test_time_features_are_cosines_then_sines_of_a_thousand_times_the_time():
  time = np.array([0.0, 0.25, 1.0], np.float32)
  got = generation.time_features(time, 8)
  for b, t in enumerate(time):
    for i in range(4):
      angle = 1000.0 * float(t) * 10000.0 ** (-i / 4)
      assert got[b, i] == pytest.approx(math.cos(angle), abs=1e-4)
      assert got[b, 4 + i] == pytest.approx(math.sin(angle), abs=1e-4)


def _depthwise_loop(x, kernel):
  b, h, w, c = x.shape
  out = np.zeros(x.shape, np.float64)
  for i in range(7):
    for j in range(7):
      for y in range(h):
        for z in range(w):
          if 0 <= y + i - 3 < h and 0 <= z + j - 3 < w:
            out[:, y, z] += x[:, y + i - 3, z + j - 3] * kernel[i, j]
  return out


@pytest.mark.parametrize("path", ["depthwise", "convolution", "shifted_sum"])
def test_depthwise_convolution_equals_its_definition(path):
  x, kernel = _random(2, 5, 9, 3), _random(7, 7, 3, seed=1)
  np.testing.assert_allclose(getattr(generation, path)(x, kernel), _depthwise_loop(x, kernel), rtol=1e-4, atol=1e-4)


@pytest.mark.smoke
def test_depthwise_gradient_equals_that_of_the_convolution():
  x, kernel, weight = _random(2, 8, 5, 3), _random(7, 7, 3, seed=1), _random(2, 8, 5, 3, seed=2)
  loss = lambda f: lambda x, k: jnp.sum(weight * jnp.square(f(x, k)))
  gradient = lambda f: jax.jit(jax.grad(loss(f), argnums=(0, 1)))(x, kernel)
  got, expected = gradient(generation.depthwise), gradient(generation.convolution)
  for a, b in zip(got, expected):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_global_response_norm_starts_as_identity_and_follows_its_formula():
  x = _random(2, 3, 4, 5)
  x[0, :, :, 2] = 0.0  # a dead channel
  norm = generation.GlobalResponseNorm(1e-6, jnp.float32)
  params = unbox(norm.init(jax.random.key(0), x))
  np.testing.assert_array_equal(norm.apply(params, x), x)
  scale, bias = _random(5, seed=1), _random(5, seed=2)
  params = {"params": {"scale": scale, "bias": bias}}
  for b in range(2):
    n = np.sqrt((x[b].astype(np.float64) ** 2).sum((0, 1)))
    expected = (scale * n / (n.mean() + 1e-6) + 1) * x[b] + bias
    np.testing.assert_allclose(norm.apply(params, x)[b], expected, rtol=1e-5, atol=1e-5)
  gradient = jax.grad(lambda x: norm.apply(params, x).sum())(x)
  assert np.isfinite(gradient).all()


def test_unpatchify_is_the_pixel_shuffle_of_pytorch():
  x = _random(1, 2, 3, 4 * 4)
  got = generation.unpatchify(x, 2)
  assert got.shape == (1, 4, 6, 4)
  for c in range(4):
    for i in range(2):
      for j in range(2):
        np.testing.assert_array_equal(got[0, i::2, j::2, c], x[0, :, :, c * 4 + i * 2 + j])


def test_modulation_comes_after_the_residual():
  """With all maps zero but the modulation, the block is x (1 + scale) + shift."""
  x, time = _random(2, 4, 4, 8), _random(2, 6, seed=1)
  block = ConvNeXtBlock(TINY, jnp.float32)
  params = jax.tree.map(jnp.zeros_like, unbox(jax.jit(block.init)(jax.random.key(0), x, time)))
  kernel, bias = _random(6, 16, seed=2), _random(16, seed=3)
  params["params"]["modulation"] = {"kernel": kernel, "bias": bias}
  condition = time / (1 + np.exp(-time)) @ kernel + bias
  expected = x * (1 + condition[:, None, None, :8]) + condition[:, None, None, 8:]
  np.testing.assert_allclose(jax.jit(block.apply)(params, x, time), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def stack():
  encoder = GenerationEncoder(TINY, 6, 3, jnp.float32)
  decoder = GenerationDecoder(TINY, 6, 3, jnp.float32)
  latents, time = _random(2, 8, 8, 3), np.array([0.2, 0.9], np.float32)
  encoder_params = _noisy(unbox(jax.jit(encoder.init)(jax.random.key(0), latents, time)))
  encode, decode = jax.jit(encoder.apply), jax.jit(decoder.apply)
  decoder_params = unbox(jax.jit(decoder.init)(jax.random.key(1), *encode(encoder_params, latents, time)))
  return encode, encoder_params, decode, _noisy(decoder_params), latents, time


def test_shapes_and_skip(stack):
  encode, params, decode, decoder_params, latents, time = stack
  features, skip, embedding = encode(params, latents, time)
  assert (features.shape, skip.shape, embedding.shape) == ((2, 16, 8), (2, 4, 4, 8), (2, 6))
  np.testing.assert_array_equal(features.reshape(skip.shape), skip)
  velocity = decode(decoder_params, features, skip, embedding)
  assert velocity.shape == latents.shape and velocity.dtype == jnp.float32


def test_images_do_not_see_each_other_and_each_has_its_own_time(stack):
  encode, params, decode, decoder_params, latents, time = stack

  def velocity(latents, time):
    return decode(decoder_params, *encode(params, latents, time))

  together = velocity(latents, time)
  for i in range(2):
    np.testing.assert_allclose(together[i : i + 1], velocity(latents[i : i + 1], time[i : i + 1]), rtol=1e-4, atol=1e-5)
  assert np.abs(together[0] - velocity(latents, time[::-1])[0]).max() > 1e-3


def test_patch_embedding_is_the_strided_convolution(stack):
  _, params, _, _, latents, _ = stack
  p = params["params"]["patch_embed"]
  kernel = p["kernel"].reshape(2, 2, 3, 8)
  expected = jax.lax.conv_general_dilated(
    latents, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  ).reshape(2, 16, 8)
  np.testing.assert_allclose(patchify(latents, 2) @ p["kernel"], expected, rtol=1e-4, atol=1e-4)


def test_wrong_latent_channels_are_refused(stack):
  encode, params, *_ = stack
  with refused("5 channels", error=ValueError):
    encode(params, _random(1, 8, 8, 5), np.zeros(1, np.float32))


def test_the_full_heads_have_the_published_number_of_parameters():
  config = FlowConfig(kind="flow", channels=768, encoder_blocks=2, decoder_blocks=2, patch_size=2, norm_epsilon=1e-6)
  f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  encoder = GenerationEncoder(config, 2048, 4, jnp.bfloat16)
  decoder = GenerationDecoder(config, 2048, 4, jnp.bfloat16)
  key = jax.random.key(0)
  shapes = unbox(jax.eval_shape(encoder.init, key, f32(1, 48, 48, 4), f32(1)))
  shapes_decoder = unbox(jax.eval_shape(decoder.init, key, f32(1, 576, 768), f32(1, 24, 24, 768), f32(1, 2048)))
  count = lambda tree: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
  assert round((count(shapes) + count(shapes_decoder)) / 1e6, 2) == 72.18
