"""Laws of the head's loss: the plain loss and its gradients, work that follows the mask. On any mesh: test_mesh.py."""

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest

from jflow.objectives import next_token

B, S, D, V = 2, 24, 16, 50
RNG = np.random.default_rng(0)
HIDDEN = RNG.standard_normal((B, S, D)).astype(np.float32)
KERNEL = RNG.standard_normal((D, V)).astype(np.float32)
TARGETS = RNG.integers(0, V, (B, S)).astype(np.int32)


def reference(hidden, kernel, mask):
  return plain.next_token(hidden @ kernel, TARGETS, mask)


def ours(hidden, kernel, mask, chunk=8):
  return next_token.loss(hidden, kernel, TARGETS, mask, chunk)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [7, 8, 100])
def test_loss_and_gradients_are_those_of_the_plain_loss(share, chunk):
  """For no position, some and all of them; for chunks that do not divide and that exceed them."""
  mask = RNG.random((B, S)) < share
  run = lambda f, *rest: jax.value_and_grad(lambda h, k: 3.0 * f(h, k, mask, *rest), argnums=(0, 1))
  got, want = run(ours, chunk)(HIDDEN, KERNEL), run(reference)(HIDDEN, KERNEL)
  np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
  for mine, theirs in zip(got[1], want[1], strict=True):
    np.testing.assert_allclose(mine, theirs, atol=1e-6 * max(1.0, float(np.abs(theirs).max())))
  np.testing.assert_allclose(ours(HIDDEN, KERNEL, mask, chunk), want[0] / 3.0, rtol=1e-6)


def test_large_logits_survive():
  mask = np.ones((B, S), bool)
  value, gradient = jax.value_and_grad(ours)(1e4 * HIDDEN, KERNEL, mask)
  np.testing.assert_allclose(value, reference(1e4 * HIDDEN, KERNEL, mask), rtol=1e-6)
  assert np.isfinite(gradient).all()


def test_no_array_holds_all_logits_and_none_is_made_where_no_loss_stands():
  step = jax.value_and_grad(lambda h, k, m: ours(h, k, m), argnums=(0, 1))
  program = str(jax.make_jaxpr(step)(HIDDEN, KERNEL, np.ones((B, S), bool)))
  assert f"f32[8,{V}]" in program and f"{B * S},{V}]" not in program and f"{S},{V}]" not in program
  poisoned = np.where(np.arange(S)[None, :, None] < 12, HIDDEN, np.nan).astype(np.float32)
  mask = np.broadcast_to(np.arange(S)[None] < 10, (B, S))
  value, gradients = step(poisoned, KERNEL, mask)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)


def test_the_gradient_of_the_kernel_is_summed_in_f32():
  """In bf16, 4,096 equal contributions would stop growing at 256 times the first."""
  n = 4096
  hidden = jnp.ones((1, n, 8), jnp.bfloat16)
  kernel, targets = np.zeros((8, 2), np.float32), np.zeros((1, n), np.int32)
  gradient = jax.grad(next_token.loss, argnums=1)(hidden, kernel, targets, np.ones((1, n), bool), 16)
  assert gradient.dtype == jnp.float32
  np.testing.assert_array_equal(gradient[:, 0], -n / 2)
