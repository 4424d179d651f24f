"""Laws of the objectives: formulas written out in numpy and PyTorch, masks, and where gradients may flow."""

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest

from jflow.objectives import alignment, flow_matching

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
  return RNG.standard_normal(shape).astype(np.float32)


def test_next_token_is_the_cross_entropy_of_the_masked_positions():
  torch = pytest.importorskip("torch")
  logits, targets, mask = 3 * normal(2, 7, 11), RNG.integers(0, 11, (2, 7)), RNG.random((2, 7)) < 0.6
  got = plain.next_token(logits, targets, mask)
  ignored = torch.tensor(np.where(mask, targets, -100)).flatten()
  want = torch.nn.functional.cross_entropy(torch.tensor(logits).reshape(-1, 11), ignored, reduction="sum")
  np.testing.assert_allclose(got, want.item(), rtol=1e-6)


def test_next_token_of_equal_logits_is_the_logarithm_of_the_vocabulary():
  got = plain.next_token(np.full((1, 4, 50), 7.0, np.float32), np.zeros((1, 4), int), np.ones((1, 4), bool))
  np.testing.assert_allclose(got, 4 * np.log(50), rtol=1e-6)


def test_next_token_survives_large_logits():
  logits = np.array([[1e4, -1e4]], np.float32)
  assert plain.next_token(logits, np.array([0]), np.array([True])) == 0
  assert plain.next_token(logits, np.array([1]), np.array([True])) == 2e4


def test_flow_is_the_sum_over_masked_images_of_mean_squared_errors():
  velocity, target = normal(2, 2, 3, 4, 4, 2)
  mask = np.array([[1, 0, 1], [0, 0, 1]], bool)
  want = sum(np.mean((velocity[i].astype(np.float64) - target[i]) ** 2) for i in zip(*np.nonzero(mask)))
  np.testing.assert_allclose(flow_matching.loss(velocity, target, mask), want, rtol=1e-6)


def test_flow_is_computed_in_f32_also_from_bf16():
  velocity, target = normal(1, 8, 8, 4), normal(1, 8, 8, 4)
  rounded = jnp.asarray(velocity, jnp.bfloat16)
  got = flow_matching.loss(rounded, target, np.ones(1, bool))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, np.mean((np.asarray(rounded, np.float64) - target) ** 2), rtol=1e-6)


def test_alignment_is_minus_the_cosine():
  torch = pytest.importorskip("torch")
  projected, features, mask = normal(2, 3, 5, 6), normal(2, 3, 5, 6), np.array([[1, 0, 1], [0, 1, 0]], bool)
  cosine = torch.nn.functional.cosine_similarity(torch.tensor(projected), torch.tensor(features), dim=-1)
  want = -(cosine.mean(-1) * torch.tensor(mask)).sum()
  np.testing.assert_allclose(alignment.loss(projected, features, mask), want.item(), rtol=1e-5)
  same = alignment.loss(3 * features, features, np.ones((2, 3), bool))
  np.testing.assert_allclose(same, -6, rtol=1e-6)


def test_alignment_gives_the_features_no_gradient_and_stays_finite_at_zero():
  projected, features, mask = normal(1, 2, 5, 6), normal(1, 2, 5, 6), np.array([[True, False]])
  to_projected, to_features = jax.grad(alignment.loss, argnums=(0, 1))(projected, features, mask)
  assert not np.any(to_features)
  assert np.abs(to_projected[0, 0]).max() > 0 and not np.any(to_projected[0, 1])
  at_zero = jax.grad(alignment.loss)(np.zeros_like(projected), np.zeros_like(features), mask)
  assert np.isfinite(at_zero).all()


@pytest.mark.parametrize("loss", [flow_matching.loss, alignment.loss])
def test_what_is_masked_out_is_not_read(loss):
  a, b, mask = normal(1, 3, 4, 4, 2), normal(1, 3, 4, 4, 2), np.array([[True, False, False]])
  if loss is alignment.loss:
    a, b = a.reshape(1, 3, 16, 2), b.reshape(1, 3, 16, 2)
  changed = a.copy()
  changed[0, 1:] = 1e6
  assert loss(a, b, mask) == loss(changed, b, mask) != 0
