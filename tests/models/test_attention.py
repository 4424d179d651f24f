"""Laws of attention: a loop over queries in numpy; blocks of queries equal the whole; kernels equal the plain one.

`pytest -m gpu` runs the same comparison for the kernels of the GPU that is there.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused

from jflow.models import kernels, plain_attention
from jflow.models.attention import choose, packed_attention, unmasked_attention, with_segments
from jflow.models.cache import Cache, Prefix
from jflow.models.plain_attention import attention

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
      j for j in range(k.shape[1]) if j <= start + i and kv_segments[b, j] == q_segments[b, i] and q_segments[b, i] > 0
    ]
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

  run = lambda *x: jax.value_and_grad(loss, argnums=(0, 1, 2))(*x)
  whole = jax.jit(run)(q, k, v)
  monkeypatch.setattr(plain_attention, "QUERY_BLOCK", 15)  # five blocks of 13: one position of padding
  blocks = jax.jit(lambda *x: run(*x))(q, k, v)  # another function to jit, which traces it anew
  assert "dynamic_slice" in str(jax.make_jaxpr(loss)(q, k, v))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, blocks)


def test_a_long_row_never_holds_all_pairs():
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  segments = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
  jaxpr = str(
    jax.make_jaxpr(attention, static_argnums=5)(
      shape(1, 4096, 2, 8), shape(1, 4096, 2, 8), shape(1, 4096, 2, 8), segments, segments, 0
    )
  )
  assert "1024,4096]" in jaxpr and "4096,4096]" not in jaxpr


def test_no_length_falls_back_to_all_pairs():
  """Blocks of one size, rounded up; the rest is padding that is cut off again."""
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  segments = jax.ShapeDtypeStruct((1, 1537), jnp.int32)
  args = (shape(1, 1537, 2, 8), shape(1, 1537, 2, 8), shape(1, 1537, 2, 8), segments, segments, 0)
  jaxpr = str(jax.make_jaxpr(attention, static_argnums=5)(*args))
  assert "769,1537]" in jaxpr and "1537,1537]" not in jaxpr
  assert jax.eval_shape(lambda *a: attention(*a, 0), *args[:5]).shape == (1, 1537, 2, 8)


def test_gradients_stay_finite_where_a_query_sees_nothing():
  q, k, v, *_ = inputs(1, 8, 8, 2, 2, 4)
  nothing = np.zeros((1, 8), np.int32)
  loss = lambda *x: jnp.sum(attention(*x, nothing, nothing, 0))
  gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
  assert all(np.isfinite(g).all() for g in gradients)


def test_attention_without_a_mask_is_softmax_over_all_keys():
  """Queries and keys of different numbers, as pooling has them; jax's own function."""
  q, k, v, *_ = inputs(2, 5, 24, 4, 4, 8)
  np.testing.assert_allclose(unmasked_attention(q, k, v, "xla"), jax.nn.dot_product_attention(q, k, v), atol=1e-6)


# --- kernels ----------------------------------------------------------------------------------------------


def packing(rng: np.random.Generator, batch: int, seq: int) -> np.ndarray:
  """Rows of random segments 1, 2, ... with padding at the end, one of them full."""
  out = np.zeros((batch, seq), np.int32)
  for row in range(batch):
    cuts = np.sort(rng.choice(np.arange(1, seq), size=rng.integers(1, 7), replace=False))
    ids = np.searchsorted(cuts, np.arange(seq), side="right") + 1
    out[row] = np.where(ids <= len(cuts), ids, 0) if row else ids
  return out


def compare(kernel, seq: int, width: int, dtype, tolerance: float) -> None:
  """Values and gradients against the plain one, and the leak test: a segment's outputs feel no other's inputs."""
  rng = np.random.default_rng(seq)
  segments = packing(rng, 2, seq)
  q, k, v, weight = (jnp.asarray(rng.standard_normal((2, seq, 2, width)), dtype) for _ in range(4))
  real = (segments > 0)[..., None, None]

  def program(f):
    def loss(q, k, v, counted):
      out = f(q, k, v, segments)
      return jnp.sum(jnp.where(counted, out.astype(jnp.float32) * weight, 0.0)), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))

  run = program(kernel)
  got, want = run(q, k, v, real), program(lambda *args: packed_attention(*args, "xla"))(q, k, v, real)
  for ours, theirs in zip(got[0], want[0], strict=True):
    ours, theirs = (np.where(real, np.asarray(x, np.float64), 0) for x in (ours, theirs))
    assert np.isfinite(ours).all()
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)
  ours, theirs = (np.where(real, np.asarray(x[1], np.float64), 0) for x in (got, want))
  np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max())
  for gradient in run(q, k, v, (segments == 2)[..., None, None])[0]:
    assert not np.asarray(gradient, np.float32)[segments != 2].any()


@pytest.mark.parametrize(
  "name, seq, width", [("splash", 200, 128), ("triton", 256, 64), ("packed", 256, 64), ("packed", 200, 16)]
)
def test_a_kernel_equals_plain_attention(name, seq, width):
  """In the interpreter of Pallas; 200 is padded to two tiles."""
  compare(functools.partial(kernels.KERNELS[name], interpret=True), seq, width, jnp.float32, 2e-5)


def test_tiles_of_other_segments_are_not_visited():
  """Values there that would spoil any product: NaN times zero is NaN."""
  segments = np.repeat(np.array([[1, 2, 0]], np.int32), 128, axis=1)
  q, k, v = (jnp.asarray(RNG.standard_normal((1, 384, 1, 16)), jnp.float32) for _ in range(3))
  poison = lambda x: jnp.where((segments != 2)[..., None, None], jnp.nan, x)
  loss = lambda q, k, v: jnp.sum(kernels.packed(q, k, v, segments, interpret=True)[:, 128:256] ** 2)
  run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
  want, got = run(q, k, v), run(poison(q), poison(k), poison(v))
  assert float(got[0]) == float(want[0])
  for ours, theirs in zip(got[1], want[1], strict=True):
    np.testing.assert_array_equal(ours[:, 128:256], theirs[:, 128:256])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cudnn", "cudnn:8", "triton", "packed"])
def test_a_kernel_of_this_gpu_equals_plain_attention(name):
  device = jax.devices()[0]
  why = kernels.obstacle(name.partition(":")[0], device, jnp.bfloat16, 128)
  if why:
    pytest.skip(f"{name} {why}")
  compare(lambda *args: packed_attention(*args, name), 1024, 128, jnp.bfloat16, 2e-2)


def behind_prefixes(dtype, seq=160, width=8):
  """Queries, keys, values of two groups of two pictures, and caches of a prompt for each and of one for all."""
  arrays = [jnp.asarray(RNG.standard_normal((4, seq, n, width)), dtype) for n in (4, 2, 2)]
  made = []
  for rows, slots, lengths in ((2, 6, [[6], [3]]), (1, 1, [[1]])):
    normal = lambda *shape: (jnp.asarray(RNG.standard_normal((rows * 2, *shape)), dtype),)
    filled = jnp.arange(slots) < jnp.asarray(lengths)
    made.append(Cache(normal(width, slots), normal(slots, width), filled, jnp.asarray(slots)))
  return Prefix(tuple(made)), arrays


def plain_causal(q, k, v):
  """As `kernels.causal` in float32: the output, and the logarithm of each query's sum of exponentials."""
  group = q.shape[2] // k.shape[2]
  q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)))
  logits = jnp.einsum("bsnh,btnh->bnst", q, k) / np.sqrt(q.shape[-1])
  logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits, -jnp.inf)
  return jnp.einsum("bnst,btnh->bsnh", jax.nn.softmax(logits), v), jax.nn.logsumexp(logits, axis=-1)


def test_a_prefix_merged_by_its_sums_equals_one_softmax(monkeypatch):
  prefix, arrays = behind_prefixes(jnp.float32)
  monkeypatch.setattr(kernels, "causal", plain_causal)  # which a CPU has not
  whole, merged = (prefix.layer(0, jnp.ones((4, 160)), kernel)(*arrays)[0] for kernel in ("xla", "fused"))
  np.testing.assert_allclose(merged, whole, rtol=2e-5, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("seq", [160, 577])
def test_the_fused_causal_kernel_of_this_gpu_returns_its_sums(seq):
  prefix, arrays = behind_prefixes(jnp.bfloat16, seq, 128)
  for got, want in zip(jax.jit(kernels.causal)(*arrays), plain_causal(*arrays), strict=True):
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=3e-2)
  run = lambda kernel: np.asarray(jax.jit(prefix.layer(0, jnp.ones((4, seq)), kernel))(*arrays)[0], np.float32)
  np.testing.assert_allclose(run("fused"), run("xla"), atol=5e-2)


def test_the_table_of_segments_is_what_the_packer_made():
  segments = np.array([[1, 1, 1, 2, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [0] * 8], np.int32)
  lengths, starts = kernels.segment_table(jnp.asarray(segments), 4)
  np.testing.assert_array_equal(lengths, [[3, 1, 2, 2], [8, -1, -1, -1], [8, -1, -1, -1]])  # padding is one more
  np.testing.assert_array_equal(starts, [[0, 3, 4, 6, -1], [0, -1, -1, -1, -1], [0, -1, -1, -1, -1]])


@pytest.mark.parametrize("seed", range(4))
def test_cudnn_is_told_where_each_segment_of_each_row_lies(seed):
  """The table for cuDNN as jax makes it: a flat list of all segments, their places counted in numbers."""
  from jax._src.cudnn.fused_attention_stablehlo import _fix_seqlen_offsets

  rng = np.random.default_rng(seed)
  batch, seq, heads, width = 3, 64, 2, 8
  segments = packing(rng, batch, seq)
  limit = 10 if seed % 2 else int(segments.max()) + 1  # the longest list has no room left
  if seed == 0:
    segments[1] = 0  # a row of padding alone
  lengths, starts = kernels.segment_table(jnp.asarray(segments), limit)
  like = jnp.zeros((batch, seq, heads, width))
  lengths, _, starts, _ = map(np.asarray, _fix_seqlen_offsets(lengths, lengths, starts, starts, like, like))
  want = [
    (row * seq + int(np.argmax(segments[row] == i)), int((segments[row] == i).sum()))
    for row in range(batch)
    for i in (*range(1, segments[row].max() + 1), *([0] if (segments[row] == 0).any() else []))
  ]
  assert sum(length for _, length in want) == batch * seq
  stride = heads * width
  got = list(zip((starts.ravel() // stride).tolist(), lengths.ravel().tolist()))
  assert got[: len(want)] == want
  assert starts.ravel()[len(want)] == batch * seq * stride and not any(length for _, length in got[len(want) :])


@pytest.mark.parametrize("most, table", [(1, "cudnn:8"), (7, "cudnn:8"), (8, "cudnn:16"), (127, "cudnn:128")])
def test_the_table_has_room_for_the_samples_of_a_row_and_padding(most, table):
  assert with_segments("cudnn", most) == table and with_segments("triton", most) == "triton"
  for other in ("cudnn:8", "cudnn:128"):  # held-out rows may hold more samples than training's, or fewer
    assert with_segments(other, most) == table


def test_rows_of_more_samples_than_the_largest_table_are_refused():
  with refused("compute.attention='cudnn'", "127", "128"):
    with_segments("cudnn", 128)


def device(platform: str, capability: str = ""):
  return types.SimpleNamespace(platform=platform, compute_capability=capability)


def test_the_kernel_follows_the_device():
  bf16, f32 = "bfloat16", "float32"
  assert choose("auto", device("cpu"), bf16, 128) == "xla"
  assert choose("auto", device("tpu"), bf16, 128) == "splash"
  assert choose("auto", device("tpu"), bf16, 64) == "xla"
  assert choose("auto", device("gpu", "9.0"), bf16, 128) == "triton"
  assert choose("auto", device("gpu", "8.0"), f32, 128) == "triton"
  assert choose("auto", device("gpu", "9.0"), bf16, 96) == "xla"
  assert choose("cudnn", device("gpu", "9.0"), bf16, 128) == "cudnn"
  assert choose("xla", device("tpu"), bf16, 128) == "xla"


@pytest.mark.parametrize(
  "name, where, dtype, said",
  [
    ("splash", device("cpu"), "float32", "cpu"),
    ("cudnn", device("gpu", "8.0"), "bfloat16", "9.0"),
    ("cudnn", device("gpu", "9.0"), "float32", "compute.dtype='bfloat16'"),
    ("flash", device("gpu", "9.0"), "bfloat16", "auto, xla, cudnn"),
  ],
)
def test_a_kernel_that_cannot_run_is_refused_by_name(name, where, dtype, said):
  with refused(f"config.compute.attention='{name}'", said):
    choose(name, where, dtype, 128)
