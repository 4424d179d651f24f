"""The closed-form tokenizer: its codes are the nearest rows, what it keeps of the world's pictures, determinism."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from refusals import refused

from jflow.sharding import unbox
from jflow.world.patch_codes import PatchCodesConfig, fit_patch_codes, k_means
from jflow.world.source import WorldSource


def _config(codebook: int, dim: int = 12) -> PatchCodesConfig:
  return PatchCodesConfig("patch_codes", codebook_size=codebook, code_dim=dim, patch_size=6)


def _pictures(count: int, split: str = "train") -> np.ndarray:
  source = WorldSource("generation", count, 0, split)
  return np.stack([source[i].images[0].render(48) for i in range(count)])


def test_codes_are_the_nearest_rows_and_more_of_them_keep_more():
  test = _pictures(20, "val").astype(np.float32) / 127.5 - 1
  kept = []
  for codebook in (16, 128):
    config = _config(codebook)
    model, params = config.make(jnp.float32), {"params": fit_patch_codes(_pictures(100), config)}
    expected = jax.tree.map(lambda x: x.shape, unbox(jax.eval_shape(model.init, jax.random.key(0), test)))
    assert jax.tree.map(lambda x: x.shape, params) == expected
    codes = np.asarray(model.apply(params, test, method="encode"))
    assert codes.shape == (20, 8, 8) and codes.dtype == np.int32
    z = np.asarray(model.apply(params, test, method=lambda m, x: m.encoder(x)), np.float64)
    distances = np.square(z[..., None, :] - params["params"]["codebook"].astype(np.float64)).sum(-1)
    assert np.take_along_axis(distances, codes[..., None], -1) == pytest.approx(
      distances.min(-1, keepdims=True), abs=1e-4
    )
    kept.append(tiny.psnr(model.apply(params, codes, method="decode"), test))
  assert kept[1] > kept[0] + 2 > 20


def test_the_fit_is_deterministic_to_the_bit():
  a, b = (fit_patch_codes(_pictures(40), _config(32)) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_k_means_finds_separate_groups():
  rng = np.random.default_rng(1)
  true = np.asarray([[0, 0], [10, 0], [0, 10], [10, 10]], np.float64)
  x = (true[:, None] + 0.1 * rng.standard_normal((4, 50, 2))).reshape(-1, 2)
  found = k_means(x, 4)
  assert np.abs(found[:, None] - true).sum(-1).min(0).max() < 0.2


def test_a_codebook_beyond_the_patches_is_refused():
  with refused("codebook_size=4096"):
    fit_patch_codes(_pictures(5), _config(4096))
