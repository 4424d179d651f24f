"""Laws of attention: a loop over queries in numpy; blocks of queries equal the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow.models import attention as module
from jflow.models.attention import attention

RNG = np.random.default_rng(0)


def inputs(batch, queries, keys, heads, kv_heads, width):
  normal = lambda *shape: RNG.standard_normal(shape).astype(np.float32)
  segments = np.sort(RNG.integers(1, 4, (batch, keys)), axis=1).astype(np.int32)
  segments[:, -3:] = 0
  return (
    normal(batch, queries, heads, width),
    normal(batch, keys, kv_heads, width),
    normal(batch, keys, kv_heads, width),
    segments[:, keys - queries :],
    segments,
    keys - queries,
  )


def by_hand(q, k, v, q_segments, kv_segments, start):
  """Each query of each head by itself, in f64; zeros where nothing is seen."""
  out = np.zeros(q.shape)
  group = q.shape[2] // k.shape[2]
  for b, i, n in np.ndindex(q.shape[:3]):
    seen = [
      j for j in range(k.shape[1])
      if j <= start + i and kv_segments[b, j] == q_segments[b, i] and q_segments[b, i] > 0
    ]  # fmt: skip
    if seen:
      logits = k[b, seen, n // group].astype(np.float64) @ q[b, i, n] / np.sqrt(q.shape[3])
      weights = np.exp(logits - logits.max())
      out[b, i, n] = weights / weights.sum() @ v[b, seen, n // group]
  return out


@pytest.mark.parametrize("queries, heads, kv_heads", [(24, 4, 4), (24, 4, 2), (9, 6, 1)])
def test_attention_equals_a_loop_over_queries(queries, heads, kv_heads):
  """Also with fewer queries than keys, as in cached decoding, and with shared key heads."""
  args = inputs(2, queries, 24, heads, kv_heads, 8)
  got, real = np.asarray(attention(*args)), args[3] > 0
  np.testing.assert_allclose(got[real], by_hand(*args)[real], atol=2e-6)
  assert np.isfinite(got).all()


def test_shared_key_heads_equal_repeated_ones():
  q, k, v, *rest = inputs(2, 16, 16, 6, 2, 8)
  repeat = lambda x: np.repeat(x, 3, axis=2)
  np.testing.assert_allclose(attention(q, k, v, *rest), attention(q, repeat(k), repeat(v), *rest), atol=1e-6)


def test_blocks_of_queries_equal_the_whole_with_gradients(monkeypatch):
  q, k, v, *rest = inputs(2, 64, 64, 4, 2, 8)
  real = (rest[0] > 0)[..., None, None]
  weight = RNG.standard_normal(q.shape).astype(np.float32)

  def loss(q, k, v):
    return jnp.sum(jnp.where(real, attention(q, k, v, *rest), 0.0) * weight)

  whole = jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)
  monkeypatch.setattr(module, "_QUERY_BLOCK", 16)
  blocks = jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)
  assert "dynamic_slice" in str(jax.make_jaxpr(loss)(q, k, v))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, blocks)


def test_a_long_row_never_holds_all_pairs():
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  segments = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
  jaxpr = str(jax.make_jaxpr(attention, static_argnums=5)(
    shape(1, 4096, 2, 8), shape(1, 4096, 2, 8), shape(1, 4096, 2, 8), segments, segments, 0
  ))  # fmt: skip
  assert "1024,4096]" in jaxpr and "4096,4096]" not in jaxpr


def test_gradients_stay_finite_where_a_query_sees_nothing():
  q, k, v, *_ = inputs(1, 8, 8, 2, 2, 4)
  nothing = np.zeros((1, 8), np.int32)
  gradients = jax.grad(lambda *x: jnp.sum(attention(*x, nothing, nothing, 0)), argnums=(0, 1, 2))(q, k, v)
  assert all(np.isfinite(g).all() for g in gradients)
