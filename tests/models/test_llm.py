"""Laws of the language model: causality, segments, the cache, the scan, remat, grouped heads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
import tiny
from refusals import refused

from jflow.models.cache import Cache
from jflow.models.llm import llama as llm_module
from jflow.models.llm.llama import Block, LanguageModel, rope_tables, rotate
from jflow.models.unified import separate_layers

LM = tiny.CONFIG.language_model
TAP = 1
B, S = 2, 24
RNG = np.random.default_rng(0)
X = RNG.standard_normal((B, S, LM.embed_dim)).astype(np.float32)
POSITIONS = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
ONE = np.ones((B, S), np.int32)
# Segments of 7, 9 and 5 positions and 3 of padding, positions restarting at 0.
SEGMENTS = np.broadcast_to(np.repeat([1, 2, 3, 0], [7, 9, 5, 3]).astype(np.int32), (B, S))
RESTARTED = np.broadcast_to(np.concatenate([np.arange(n) for n in (7, 9, 5, 3)]).astype(np.int32), (B, S))


def params():
  return {"params": tiny.params()["language_model"]}


@functools.cache
def llm(remat="none", unroll=1, config=LM):
  return LanguageModel(config, TAP, jnp.dtype("float32"), remat, unroll, "xla")


@functools.partial(jax.jit, static_argnums=0)
def run(model, variables, x, positions, segments):
  return model.apply(variables, x, positions, segments)


@functools.partial(jax.jit, static_argnums=0)
def sensitivity(model, variables, x, positions, segments, at):
  """Gradient of a random functional of what comes out at slot `at` with respect to the input: [B, S, D]."""

  def functional(x):
    out = model.apply(variables, x, positions, segments)
    hidden = jax.lax.dynamic_index_in_dim(out.hidden + out.layer, at, axis=1, keepdims=False)
    return jnp.sum(hidden * jnp.sin(jnp.arange(LM.embed_dim)))

  return jax.grad(functional)(x)


def test_nothing_depends_on_what_comes_after():
  for at in (0, 5, 22):
    gradient = np.abs(sensitivity(llm(), params(), X, POSITIONS, ONE, at)).max(axis=(0, 2))
    assert (gradient[: at + 1] > 0).all() and not gradient[at + 1 :].any()


@pytest.mark.smoke
def test_nothing_leaks_between_segments():
  for at, first in ((3, 0), (7, 7), (15, 7), (20, 16)):
    gradient = np.abs(sensitivity(llm(), params(), X, RESTARTED, SEGMENTS, at)).max(axis=(0, 2))
    assert (gradient[first : at + 1] > 0).all()
    assert not gradient[:first].any() and not gradient[at + 1 :].any()


def test_a_segment_gives_the_same_alone_and_packed():
  packed = run(llm(), params(), X, RESTARTED, SEGMENTS)
  for start, stop in ((0, 7), (7, 16), (16, 21)):
    x = np.zeros_like(X)
    x[:, : stop - start] = X[:, start:stop]
    alone = run(llm(), params(), x, POSITIONS, (POSITIONS < stop - start).astype(np.int32))
    for name in ("hidden", "layer"):
      np.testing.assert_allclose(
        getattr(packed, name)[:, start:stop], getattr(alone, name)[:, : stop - start], atol=2e-6
      )


def test_padding_stays_finite():
  out = run(llm(), params(), X, RESTARTED, SEGMENTS)
  assert np.isfinite(out.hidden).all()


def test_only_differences_of_positions_matter():
  a = run(llm(), params(), X, POSITIONS, ONE).hidden
  b = run(llm(), params(), X, POSITIONS + 50, ONE).hidden
  np.testing.assert_allclose(a, b, atol=2e-5)


def test_rotation_is_that_of_complex_numbers():
  x = RNG.standard_normal((1, 5, 2, 8)).astype(np.float32)
  positions = np.array([[0, 1, 2, 30, 100]])
  got = np.asarray(rotate(x, rope_tables(positions, 8, 10_000.0)))
  angle = positions[..., None, None] * 10_000.0 ** (-np.arange(4) / 4)
  z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
  np.testing.assert_allclose(got, np.concatenate([z.real, z.imag], axis=-1), atol=1e-5)


@pytest.mark.parametrize("pieces", [(24,), (10, 13, 1), (1,) * 24], ids=["whole", "three", "one by one"])
def test_the_cache_in_pieces_equals_one_pass(pieces):
  """With room to spare in the cache, and padding in front of row 1 that nobody sees."""
  segments = ONE.copy()
  segments[1, :4] = 0
  positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)
  whole = run(llm(), params(), X, positions, segments)
  separate = {"params": separate_layers(params()["params"], LM.num_layers)}
  step = jax.jit(lambda *a: llm(unroll=0).apply(separate, *a))
  cache, hidden, at = Cache.empty(LM, B, S + 9, jnp.float32), [], 0
  for n in pieces:
    cut = slice(at, at + n)
    out = step(X[:, cut], positions[:, cut], segments[:, cut], cache)
    cache, at = out.cache, at + n
    hidden.append(out.hidden)
  got = np.concatenate(hidden, axis=1)
  np.testing.assert_allclose(got[segments > 0], np.asarray(whole.hidden)[segments > 0], atol=3e-6)
  assert int(cache.length) == S


def test_merged_and_transposed_matrices_compute_the_same():
  separate = separate_layers(params()["params"], LM.num_layers)
  stored = LanguageModel.transposed(separate)
  paths = {"/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(stored)}
  assert "layers_0/attention/query_key_value/transposed_kernel" in paths
  assert "layers_0/mlp/gate_up/transposed_kernel" in paths
  assert not any(path.endswith("/kernel") for path in paths)
  assert sum(x.size for x in jax.tree.leaves(stored)) == sum(x.size for x in jax.tree.leaves(separate))
  jax.tree.map(np.testing.assert_array_equal, LanguageModel.transposed(stored), stored)  # stays as it is
  model = llm(unroll=0)
  run = jax.jit(
    lambda p: (
      out := model.apply({"params": p}, X, POSITIONS, ONE).hidden,
      model.apply({"params": p}, out, method="logits"),
    )
  )
  for got, want in zip(run(stored), run(separate), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
  """In bfloat16 a sum of ones stays at 256."""
  model, variables = LanguageModel(LM, 0, jnp.bfloat16, "none", 1, "xla"), params()
  tokens = jnp.full((2, 1000), 7)
  total = lambda table: jnp.sum(
    model.apply({"params": variables["params"] | {"embed": table}}, tokens, method="embed").astype(jnp.float32)
  )
  gradient = np.asarray(jax.grad(total)(variables["params"]["embed"]))
  np.testing.assert_array_equal(gradient[7], 2000.0)
  assert not np.delete(gradient, 7, axis=0).any()


def test_the_scan_equals_a_loop_over_its_layers():
  """Block by block, each with its slice of the stacked parameters; the tap is block 1's output."""
  tables, variables = rope_tables(RESTARTED, LM.head_dim, LM.rope_theta), params()["params"]
  carry = (jnp.asarray(X), None, jnp.zeros((), jnp.int32))
  outputs = []
  for layer in range(LM.num_layers):
    mine = jax.tree.map(lambda x: x[layer], variables["layers"])
    carry, _ = Block(LM, 0, jnp.dtype("float32"), "xla").apply({"params": mine}, carry, tables, SEGMENTS)
    outputs.append(carry[0])
  out = run(llm(), params(), X, RESTARTED, SEGMENTS)
  np.testing.assert_allclose(out.layer, outputs[TAP - 1], atol=2e-6)
  x = np.asarray(outputs[-1], np.float64)
  root_mean_square = np.sqrt((x**2).mean(-1, keepdims=True) + LM.rms_norm_epsilon)
  want = x / root_mean_square * np.asarray(variables["norm"]["scale"])
  np.testing.assert_allclose(out.hidden, want, atol=1e-5)


def test_grouped_heads_equal_repeated_ones():
  full = dataclasses.replace(LM, num_kv_heads=LM.num_heads)
  variables = jax.tree.map(lambda x: x, params())
  attention = dict(variables["params"]["layers"]["attention"])
  for name in ("key", "value"):
    kernel = attention[name]["kernel"].reshape(LM.num_layers, LM.embed_dim, LM.num_kv_heads, LM.head_dim)
    kernel = jnp.repeat(kernel, LM.num_heads // LM.num_kv_heads, axis=2)
    attention[name] = {"kernel": kernel.reshape(LM.num_layers, LM.embed_dim, -1)}
  layers = variables["params"]["layers"] | {"attention": attention}
  repeated = {"params": variables["params"] | {"layers": layers}}
  got = run(llm(config=full), repeated, X, RESTARTED, SEGMENTS).hidden
  np.testing.assert_allclose(got, run(llm(), params(), X, RESTARTED, SEGMENTS).hidden, atol=3e-6)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(model, variables):
  def loss(variables):
    out = model.apply(variables, X, RESTARTED, SEGMENTS)
    return jnp.sum(jnp.sin(out.hidden) + jnp.square(out.layer))

  return jax.value_and_grad(loss)(variables)


@pytest.mark.parametrize("remat, unroll", [("full", 1), ("dots", 1), ("save:attended,gate,up", 1), ("full", 2)])
def test_remat_and_unroll_change_neither_loss_nor_gradient(remat, unroll):
  want, got = loss_and_gradient(llm(), params()), loss_and_gradient(llm(remat, unroll), params())
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
  jax.tree.map(close, got, want)


def test_remat_keeps_less():
  """Without remat the backward pass is handed the mlp's activations; with "full" only the blocks' inputs."""
  kept = {}
  for remat in ("none", "dots", "save:gate", "full"):
    functional = lambda v: jnp.sum(llm(remat).apply(v, X, RESTARTED, SEGMENTS).hidden)
    residuals = jax.eval_shape(lambda v: jax.vjp(functional, v)[1], params())
    kept[remat] = sum(x.size for x in jax.tree.leaves(residuals))
  assert kept["full"] < kept["save:gate"] < kept["dots"] < kept["none"]


def test_logits_are_the_head_on_the_hidden_state():
  out = llm().apply(params(), X, method="logits")
  assert out.shape == (B, S, LM.vocab_size) and out.dtype == jnp.float32
  np.testing.assert_allclose(out, X @ np.asarray(params()["params"]["head"]["kernel"]), atol=1e-5)


def test_the_loss_is_that_of_the_logits():
  """With its gradients, also for the head's kernel; what carries no loss never becomes logits."""
  targets = RNG.integers(0, LM.vocab_size, (B, S)).astype(np.int32)
  mask = RNG.random((B, S)) < 0.7

  def ours(variables, x):
    return llm().apply(variables, x, targets, mask, method="next_token")

  def theirs(variables, x):
    return plain.next_token(llm().apply(variables, x, method="logits"), targets, mask)

  got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(params(), X) for f in (ours, theirs))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * max(float(np.abs(b).max()), 1e-6))
  jax.tree.map(close, got, want)


def test_a_remat_policy_may_name_what_it_keeps():
  assert llm_module.remat_policy("none") is None
  with refused("compute.remat='save:gate,nothing'"):
    llm_module.remat_policy("save:gate,nothing")
