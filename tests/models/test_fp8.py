"""Products in 8 bits: as exact as their types allow, seven in each block, and nothing else changes."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict
from refusals import refused

from jflow import sharding
from jflow.models import fp8, lora
from jflow.models.unified import for_inference
from jflow.perf import hlo
from jflow.training import optim, setup

AXES = ("embed", "mlp")
LAYERS = tiny.CONFIG.language_model.num_layers
UNIT = {fp8.FORWARD: 2.0**-4, fp8.BACKWARD: 2.0**-3}  # the largest relative error of a normal number
LEAST = {fp8.FORWARD: 2.0**-10, fp8.BACKWARD: 2.0**-17}  # the largest error of a subnormal one


def eight(**more):
  return tiny.model(**more).clone(matmul="fp8")


@functools.cache
def gradient(remat: str = "none", unroll: int = 1):
  return tiny.loss_and_gradient(eight(remat=remat, unroll=unroll), tiny.params(), tiny.mixed(), tiny.draws(4))


def error_of(x, kind):
  """The largest error of each entry of x where it is rounded with a scale that just fits."""
  x = np.abs(np.asarray(x, np.float64))
  return UNIT[kind] * x + 2 * LEAST[kind] * x.max() / float(jnp.finfo(kind).max)


def bound(a, b, of_a, of_b):
  """The largest error of a @ b."""
  a, b, da, db = (np.asarray(x, np.float64) for x in (np.abs(a), np.abs(b), error_of(a, of_a), error_of(b, of_b)))
  return da @ b + a @ db + da @ db + 1e-5 * (a @ b)


@pytest.mark.parametrize("size", [1.0, 3e4, 2e-6])
def test_a_product_and_its_gradient_are_within_the_rounding_of_their_types(size):
  keys = jax.random.split(jax.random.key(0), 3)
  x, kernel, dy = (
    s * jax.random.normal(k, n) for s, k, n in zip((1, size, size), keys, ((24, 64), (64, 48), (24, 48)))
  )
  y, back = jax.vjp(lambda x, kernel: fp8.product(x, kernel, AXES), x, kernel)
  dx, dkernel = back(dy)
  assert y.dtype == dx.dtype == dkernel.dtype == jnp.float32
  cases = (
    (y, x, kernel, fp8.FORWARD, fp8.FORWARD),
    (dx, dy, kernel.T, fp8.BACKWARD, fp8.FORWARD),
    (dkernel, x.T, dy, fp8.FORWARD, fp8.BACKWARD),
  )
  for got, a, b, of_a, of_b in cases:
    want = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    error = np.abs(np.asarray(got) - want)
    assert np.all(error <= bound(a, b, of_a, of_b))
    assert np.linalg.norm(error) > 1e-3 * np.linalg.norm(want)  # it is rounded


@pytest.mark.parametrize("kind", [fp8.FORWARD, fp8.BACKWARD])
def test_a_scale_is_the_least_power_of_two_that_fits(kind):
  most = float(jnp.finfo(kind).max)
  for top in (most, 1.001 * most, 1.0, 3e-9, 7e30):
    scale = float(fp8.scale_of(jnp.array([0.0, -top, top / 3]), kind))
    assert np.frexp(scale)[0] == 0.5 and top <= most * scale < 2 * top
  assert not np.any(fp8.quantized(jnp.zeros(3), kind)[0].astype(jnp.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(bad):
  """A step that it spoils is skipped."""
  x = jnp.ones((4, 8)).at[1, 2].set(bad)
  assert not np.isfinite(fp8.product(x, jnp.ones((8, 2)), AXES)).all()


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def products(text: str) -> list[str]:
  """The operand types of the products in 8 bits of a program as text."""
  found = re.findall(r"stablehlo.dot_general.*: \(tensor<[\dx]+x(\w+)>, tensor<[\dx]+x(\w+)>\)", text)
  return sorted(f"{a} {b}" for a, b in found if a.startswith("f8") or b.startswith("f8"))


def lowered(model) -> str:
  return tiny.loss_and_gradient.lower(model, tiny.params(), tiny.mixed(), tiny.draws(4)).as_text()


def test_seven_products_of_a_block_and_their_gradients_are_in_8_bits():
  """The text holds the block of the scan once; with remat it holds six forward products twice, all but the last."""
  forward, backward = ["f8E4M3FN f8E4M3FN"], ["f8E4M3FN f8E5M2", "f8E5M2 f8E4M3FN"]
  assert products(lowered(eight())) == sorted(7 * (forward + backward))
  assert products(lowered(eight(remat="full"))) == sorted(7 * (forward + backward) + 6 * forward)
  assert products(lowered(tiny.model())) == []


def test_calls_of_the_library_in_8_bits_are_counted_and_take_half_the_time():
  call = '%y = (bf16[16,8]{1,0}, s8[64]{0}) custom-call(%a, %b, %s, %s), custom_call_target="__cublas$lt$matmul$f8"'
  text = f"""\
HloModule step

ENTRY %main (a: f8e4m3fn[16,32], b: f8e4m3fn[8,32], s: f32[]) -> bf16[16,8] {{
  %a = f8e4m3fn[16,32]{{1,0}} parameter(0)
  %b = f8e4m3fn[8,32]{{1,0}} parameter(1)
  %s = f32[] parameter(2)
  {call}, backend_config={{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}
  ROOT %out = bf16[16,8]{{1,0}} get-tuple-element(%y), index=0
}}
"""
  counted = hlo.count(text, {}, lambda loop: 1.0, hlo.Rates(1.0, 1.0, 1e12, 0.0))
  assert (counted.fp8_products, counted.fp8_flops, counted.flops) == (1, 2 * 16 * 8 * 32, 2 * 16 * 8 * 32)
  assert counted.seconds == 16 * 8 * 32


def test_losses_and_gradient_are_near_those_in_float32():
  want, got = tiny.loss_and_gradient(tiny.model(), tiny.params(), tiny.mixed(), tiny.draws(4)), gradient()
  assert 0 < abs(float(got[0]) / float(want[0]) - 1) < 0.02
  a, b = flat(want[1]), flat(got[1])
  assert a @ b > 0.98 * np.linalg.norm(a) * np.linalg.norm(b)
  layers = flatten_dict(got[1]["language_model"]["layers"], sep="/")
  assert all(np.isfinite(x).all() and np.any(x) for x in layers.values())


@pytest.mark.parametrize("choice", [dict(remat="full"), dict(unroll=LAYERS)])
def test_what_is_kept_and_unrolled_changes_nothing(choice):
  (want, of_want), (got, of_got) = gradient(), gradient(**choice)
  assert float(got) == pytest.approx(float(want), rel=1e-5)
  a, b = flat(of_want), flat(of_got)
  assert np.linalg.norm(a - b) <= 5e-3 * np.linalg.norm(
    a
  )  # a sum that differs in its last bit may be rounded otherwise


def test_rows_alone_have_the_products_of_rows_together():
  """A microbatch has scales of its own, which are powers of two: only what is too small for the type changes."""
  keys = jax.random.split(jax.random.key(0), 3)
  x, kernel, dy = (jax.random.normal(k, n) for k, n in zip(keys, ((24, 64), (64, 48), (24, 48))))
  x, dy = (a.at[:8].multiply(100.0) for a in (x, dy))

  def computed(x, dy):
    y, back = jax.vjp(lambda x: fp8.product(x, kernel, AXES), x)
    return y, back(dy)[0]

  for alone, together, other in zip(computed(x[8:], dy[8:]), computed(x, dy), (kernel, kernel.T), strict=True):
    small = 2.0 * np.abs(other).sum(0) * 100 * 4 * 2.0**-16  # half a subnormal number of the larger scale
    assert np.all(np.abs(alone - together[8:]) <= small)
    assert np.linalg.norm(alone - together[8:]) < 5e-3 * np.linalg.norm(alone)


def test_adapters_learn_beside_matrices_in_8_bits():
  own = dict(rank=4, alpha=8.0, patterns=("language_model/layers",))
  config = tiny.configuration(lora=own, optimizer=dict(trained=(), frozen=(".*",)), compute=dict(matmul="fp8"))
  model = setup.build(config, jax.devices()[0])
  shapes = flatten_dict(jax.eval_shape(lambda: sharding.unbox(setup.initial_params(config, model))), sep="/")
  base = flatten_dict(tiny.params(), sep="/")
  made = {path: base.get(path, jnp.full(x.shape, 0.01, x.dtype)) for path, x in shapes.items()}
  trained, frozen = optim.partition(unflatten_dict(made, sep="/"), config.optimizer.trained, config.optimizer.frozen)
  loss = lambda trained: sum(tiny.loss_sums(model, optim.merge(trained, frozen), tiny.mixed(), tiny.draws(4)).values())
  flat = flatten_dict(jax.jit(jax.grad(loss))(trained), sep="/")
  assert len(flat) == 14 and all(map(lora.is_adapter, flat))
  assert all(np.isfinite(x).all() and np.any(x) for x in flat.values())


def test_inference_has_none():
  model, _ = for_inference(eight(), tiny.params())
  assert model.matmul == "dtype"


def test_a_gpu_without_such_products_and_a_tpu_are_refused():
  config = tiny.configuration(compute=dict(matmul="fp8"))
  devices = (("gpu", "8.0"), ("tpu", ""))
  for platform, capability in devices:
    device = types.SimpleNamespace(platform=platform, compute_capability=capability, device_kind="")
    with refused("compute.matmul='fp8'", capability):
      setup.build(config, device)
  for name in ("8.9", "9.0"):
    assert fp8.obstacle(types.SimpleNamespace(platform="gpu", compute_capability=name)) == ""


def test_it_is_said_that_a_cpu_emulates(capsys):
  setup.build(tiny.configuration(compute=dict(matmul="fp8")), jax.devices()[0])
  assert "compute.matmul=fp8 is emulated" in capsys.readouterr().err


def test_products_of_gradients_add_up_in_float32():
  """A GPU's default for 8 bits adds up in less; flax's own products ask for it in the same way."""
  x, kernel = jnp.ones((16, 8)), jnp.ones((8, 32))

  def gradients(x, kernel):
    y, back = jax.vjp(lambda x, kernel: fp8.product(x, kernel, AXES), x, kernel)
    return back(y)

  count = lambda function: jax.jit(function).lower(x, kernel).as_text().count("precision = [HIGHEST, HIGHEST]")
  assert count(lambda x, kernel: fp8.product(x, kernel, AXES)) == 0
  assert count(gradients) == 2
