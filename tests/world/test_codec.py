"""The closed-form codec: optimality, scaling, determinism, and what it keeps of the world's pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jflow.sharding import unbox
from jflow.world.codec import PatchPCA, PatchPCAConfig, fit_patch_pca
from jflow.world.source import WorldSource


def _pca(channels: int, patch: int = 4, window: int = 4, scaling: float = 1.0) -> PatchPCAConfig:
  return PatchPCAConfig(
    kind="patch_pca",
    latent_channels=channels,
    scaling=scaling,
    patch_size=patch,
    window=window,
  )


def _pictures(count: int, seed: int = 0) -> np.ndarray:
  """uint8[N, 32, 32, 3]: a disc and a bar of random colours on a smooth background."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:32, :32]
  out = np.empty((count, 32, 32, 3), np.uint8)
  for image in out:
    background = rng.uniform(60, 200, 3) + rng.uniform(-1, 1, 3) * x[..., None] + rng.uniform(-1, 1, 3) * y[..., None]
    disc = (x - rng.uniform(6, 26)) ** 2 + (y - rng.uniform(6, 26)) ** 2 < rng.uniform(3, 8) ** 2
    bar = np.abs(x * rng.uniform(-1, 1) + y - rng.uniform(6, 26)) < 3
    image[...] = np.clip(background, 0, 255)
    image[bar] = rng.uniform(0, 255, 3)
    image[disc] = rng.uniform(0, 255, 3)
  return out


def _round_trip(config, train, test):
  model = config.make(jnp.float32)
  params = {"params": fit_patch_pca(train, config)}
  pixels = test.astype(np.float32) / 127.5 - 1
  expected = jax.tree.map(lambda x: x.shape, unbox(jax.eval_shape(model.init, jax.random.key(0), pixels)))
  assert jax.tree.map(lambda x: x.shape, params) == expected
  latents, log_variance = model.apply(params, pixels, method="encode")
  assert (log_variance < -20).all()
  return pixels, latents, model.apply(params, latents, method="decode")


def test_all_components_reconstruct_exactly():
  pixels, _, out = _round_trip(_pca(4 * 4 * 3), _pictures(200), _pictures(4, seed=1))
  np.testing.assert_allclose(out, pixels, atol=2e-3)


@pytest.mark.parametrize("channels", [4, 12])
def test_no_code_of_single_patches_is_better(channels):
  """On the training images the error is below the eigenvalues left out (Eckart-Young); on new ones too."""
  train = _pictures(200)
  pixels, _, out = _round_trip(_pca(channels), train, train)
  patches = pixels.reshape(-1, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 48).astype(np.float64)
  bound = np.linalg.eigvalsh(np.cov(patches.T, bias=True))[:-channels].sum() / 48
  assert np.mean((out - pixels) ** 2) < bound
  pixels, _, out = _round_trip(_pca(channels), train, _pictures(50, seed=1))
  assert tiny.psnr(out, pixels) > 10 * np.log10(4 / bound)


@pytest.mark.parametrize("scaling", [1.0, 0.3])
def test_scaled_latents_have_zero_mean_and_unit_variance(scaling):
  train = _pictures(100)
  _, latents, _ = _round_trip(_pca(8, scaling=scaling), train, train)
  scaled = np.asarray(latents, np.float64) * scaling
  np.testing.assert_allclose(scaled.mean((0, 1, 2)), 0, atol=1e-3)
  variances = scaled.var((0, 1, 2))
  assert variances.mean() == pytest.approx(1, rel=1e-3)
  assert variances[0] > 1 > variances[-1]


def test_the_fit_is_deterministic_to_the_bit():
  a, b = (fit_patch_pca(_pictures(50), _pca(8, window=8)) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_window_beyond_the_patch_sees_the_neighbours():
  config = _pca(8, window=8)
  model = PatchPCA(config, jnp.float32)
  params = {"params": fit_patch_pca(_pictures(50), config)}
  image = np.zeros((1, 32, 32, 3), np.float32)
  base, _ = model.apply(params, image, method="encode")
  image[0, 12, 12] = 1.0  # patch (3, 3); the windows of patches 2 and 3 hold it
  changed = np.abs(model.apply(params, image, method="encode")[0] - base).max(-1)[0] > 1e-6
  assert {tuple(i) for i in np.argwhere(changed)} == {(2, 2), (2, 3), (3, 2), (3, 3)}


def test_pictures_of_the_world_keep_32_decibels():
  """8 channels of 4 x 4 pixels keep more than the 31.1 dB of plain patch PCA, on new pictures."""
  draw = lambda split, n: np.stack([WorldSource("generation", n, 0, split)[i].images[0].render(64) for i in range(n)])
  pixels, _, out = _round_trip(_pca(8), draw("train", 300), draw("val", 50))
  assert tiny.psnr(out, pixels) > 32
