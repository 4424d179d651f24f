"""The vision tower: patch order, independence of the batch, remat, and the size of the full model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow.models.config import SiglipConfig
from jflow.models.siglip import Siglip, patchify
from jflow.sharding import unbox

TINY = SiglipConfig(
  image_size=16, patch_size=4, embed_dim=16, mlp_dim=32, num_layers=2, num_heads=2, layer_norm_epsilon=1e-6, gelu="erf"
)
LARGE = SiglipConfig(
  image_size=384,
  patch_size=16,
  embed_dim=1024,
  mlp_dim=4096,
  num_layers=24,
  num_heads=16,
  layer_norm_epsilon=1e-6,
  gelu="erf",
)


def _pixels(batch: int, config: SiglipConfig = TINY) -> np.ndarray:
  shape = (batch, config.image_size, config.image_size, 3)
  return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def _noisy(params, seed=1):
  """Parameters with no zero biases and no unit scales, so that nothing hides."""
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(seed)
  return tree.unflatten([x + 0.1 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves])


@jax.jit
def features(params, pixels):
  return Siglip(TINY, jnp.float32, remat=False).apply(params, pixels)


@pytest.fixture(scope="module")
def params():
  model = Siglip(TINY, jnp.float32, remat=False)
  return _noisy(unbox(jax.jit(model.init)(jax.random.key(0), _pixels(1))))


def test_patchify_is_raster_order_with_channels_last():
  image = np.arange(1 * 4 * 6 * 3).reshape(1, 4, 6, 3)
  patches = patchify(image, 2)
  assert patches.shape == (1, 6, 12)
  for row in range(2):
    for column in range(3):
      expected = image[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(-1)
      np.testing.assert_array_equal(patches[0, 3 * row + column], expected)


def test_images_of_a_batch_do_not_see_each_other(params):
  pixels = _pixels(3)
  together = features(params, pixels)
  assert together.shape == (3, 16, 16)
  for i in range(3):
    np.testing.assert_allclose(together[i], features(params, pixels[i : i + 1])[0], rtol=1e-5, atol=1e-5)


def test_every_patch_sees_every_patch(params):
  jacobian = jax.jit(jax.jacrev(lambda x: features(params, x).sum(-1)[0]))(_pixels(1))  # [P, 1, H, W, 3]
  reach = patchify(np.abs(jacobian)[:, 0], 4).max(-1)
  assert (reach > 0).all()


@pytest.mark.smoke
def test_remat_changes_neither_parameters_nor_gradients(params):
  pixels = _pixels(2)
  loss = lambda remat: lambda p: jnp.sum(jnp.square(Siglip(TINY, jnp.float32, remat=remat).apply(p, pixels)))
  plain, saved = jax.jit(jax.grad(loss(False)))(params), jax.jit(jax.grad(loss(True)))(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, saved)


def test_pool_is_permutation_invariant_and_one_vector_per_image(params):
  model = Siglip(TINY, jnp.float32, remat=False)
  patches = np.random.default_rng(2).standard_normal((2, 16, 16)).astype(np.float32)
  pool = jax.jit(lambda x: model.apply(params, x, method="pool"))
  pooled = pool(patches)
  assert pooled.shape == (2, 16)
  np.testing.assert_allclose(pooled, pool(patches[:, ::-1]), rtol=1e-5, atol=1e-5)
  assert np.abs(pooled[0] - pooled[1]).max() > 1e-3


def test_bfloat16_compute_keeps_f32_parameters(params):
  rough = jax.jit(Siglip(TINY, jnp.bfloat16, remat=False).apply)(params, _pixels(1))
  exact = features(params, _pixels(1))
  assert rough.dtype == jnp.bfloat16
  assert np.linalg.norm(rough.astype(np.float32) - exact) < 0.05 * np.linalg.norm(exact)


def test_the_large_tower_has_the_published_number_of_parameters():
  model = Siglip(LARGE, jnp.bfloat16, remat=False)
  shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 384, 384, 3))))
  count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))
  # A block: 4 attention maps and 2 mlp maps with biases, 2 layer norms. The head: such maps and one norm.
  d, f = 1024, 4096
  maps = 4 * (d * d + d) + (d * f + f) + (f * d + d)
  assert count == (16 * 16 * 3 * d + d) + 576 * d + 24 * (maps + 4 * d) + 2 * d + (d + maps + 2 * d) == 316_283_904
