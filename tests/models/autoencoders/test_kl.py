"""The autoencoder of SDXL: shapes, independence of the batch, the clamp, and the size of the full one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow.models.autoencoders.kl import AutoencoderKL, AutoencoderKLConfig, Conv, Upsample
from jflow.sharding import unbox

KL = AutoencoderKLConfig(
  kind="autoencoder_kl",
  latent_channels=4,
  scaling=0.13025,
  block_channels=(8, 16),
  layers_per_block=1,
  norm_groups=4,
)


@pytest.mark.smoke
def test_kl_shapes_batches_and_clamp():
  model = KL.make(jnp.float32)
  assert isinstance(model, AutoencoderKL)
  pixels = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
  params = unbox(jax.jit(model.init)(jax.random.key(0), pixels))
  encode = jax.jit(lambda params, x: model.apply(params, x, method="encode"))
  decode = jax.jit(lambda params, x: model.apply(params, x, method="decode"))
  mean, log_variance = encode(params, pixels)
  assert mean.shape == log_variance.shape == (2, 8, 8, 4)
  out = decode(params, mean)
  assert out.shape == pixels.shape
  beside_another = encode(params, pixels * np.float32([-1, 1])[:, None, None, None])[0]
  np.testing.assert_array_equal(mean[1], beside_another[1])
  assert not np.allclose(mean[0], beside_another[0], atol=1e-2)
  params["params"]["quant"]["bias"] = jnp.array([0.0] * 4 + [1e3, -1e3, 0.0, 0.0])
  _, log_variance = encode(params, pixels)
  assert (log_variance[..., 0] == 20).all() and (log_variance[..., 1] == -30).all()


def test_upsampling_is_a_convolution_of_the_doubled_image():
  """With the same parameters, the border included; odd and even sizes."""
  rng, dtype = np.random.default_rng(0), jnp.dtype("float32")
  for shape in ((2, 5, 4, 3), (1, 1, 1, 2)):
    x = rng.standard_normal(shape).astype(np.float32)
    params = unbox(Upsample(6, dtype).init(jax.random.key(0), x))["params"] | {"bias": jnp.arange(6.0)}
    doubled = x.repeat(2, axis=1).repeat(2, axis=2)
    want = Conv(6, 3, dtype).apply({"params": params}, doubled)
    np.testing.assert_allclose(Upsample(6, dtype).apply({"params": params}, x), want, rtol=1e-5, atol=2e-6)


def test_the_full_autoencoder_has_the_published_number_of_parameters():
  config = AutoencoderKLConfig("autoencoder_kl", 4, 0.13025, (128, 256, 512, 512), 2, 32)
  model = config.make(jnp.bfloat16)
  shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3))))
  assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes)) == 83_653_863
  latents = jax.eval_shape(lambda p, x: model.apply(p, x, method="encode"), shapes, jnp.zeros((1, 384, 384, 3)))
  assert latents[0].shape == (1, 48, 48, 4)
