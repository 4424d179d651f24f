"""Laws of low-rank adapters: fresh ones change nothing, merged equals beside, gradients go to them alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict
from refusals import refused

from jflow import sharding
from jflow.errors import UserError
from jflow.generation.base import family
from jflow.models import lora
from jflow.models.build import initial_params
from jflow.models.unified import for_inference
from jflow.training import encode, optim, setup
from jflow.training.state import TrainState
from jflow.training.step import make_step

RANK, ALPHA = 2, 6.0
PATTERNS = (
  "language_model/layers/(attention/(query|output)|mlp/down)",
  "language_model/head",
  "understanding_encoder/layers",
  "understanding_projector",
  "generation_.*",
  "alignment_head/linear_2",
)


def config(**more):
  own = dict(rank=RANK, alpha=ALPHA, patterns=PATTERNS) | more
  return tiny.configuration(lora=own, optimizer=dict(trained=(), frozen=(".*",)))


def filled(own):
  """Parameters of the shapes and types of a config's start: the tiny model's, and adapters as fresh ones are."""
  shapes = jax.eval_shape(lambda: sharding.unbox(setup.initial_params(own, tiny.model())))
  base, rng = flatten_dict(tiny.params(), sep="/"), np.random.default_rng(1)

  def leaf(path, x):
    if path.endswith("lora_a"):
      return jnp.asarray(rng.standard_normal(x.shape), x.dtype)
    if path.endswith("lora_b"):
      return jnp.zeros(x.shape, x.dtype)
    return jnp.full(x.shape, ALPHA / RANK, x.dtype) if path.endswith("lora_scale") else base[path].astype(x.dtype)

  return unflatten_dict({path: leaf(path, x) for path, x in flatten_dict(shapes, sep="/").items()}, sep="/")


@functools.cache
def fresh():
  """The tiny model's parameters with fresh adapters."""
  return filled(config())


@functools.cache
def learned():
  """The same with adapters that change something."""
  rng = np.random.default_rng(0)
  flat = flatten_dict(fresh(), sep="/")
  changed = {path: jnp.asarray(rng.standard_normal(x.shape), x.dtype) for path, x in flat.items() if "lora_b" in path}
  return unflatten_dict(flat | changed, sep="/")


def test_a_fresh_adapter_gives_the_outputs_of_the_base_bit_for_bit():
  batch, draws = tiny.mixed(), tiny.draws(4)
  want = tiny.loss_sums(tiny.model(), tiny.params(), batch, draws)
  got = tiny.loss_sums(tiny.model(), fresh(), batch, draws)
  assert {name: float(x) for name, x in got.items()} == {name: float(x) for name, x in want.items()}


def test_merged_equals_beside():
  batch, draws = tiny.mixed(), tiny.draws(4)
  beside = tiny.loss_sums(tiny.model(), learned(), batch, draws)
  together = tiny.loss_sums(tiny.model(), lora.merged(learned()), batch, draws)
  base = tiny.loss_sums(tiny.model(), tiny.params(), batch, draws)
  for name in tiny.LOSSES:
    assert float(beside[name]) == pytest.approx(float(together[name]), rel=1e-4)
    assert abs(float(beside[name]) / float(base[name]) - 1) > 1e-3  # the adapters do something


def test_the_gradient_is_that_of_the_merged_matrix_by_the_chain_rule():
  """dA = s dW B^T and dB = s A^T dW, with dW from the merged weights."""
  batch, draws = tiny.mixed(), tiny.draws(4)
  dense = flatten_dict(tiny.loss_and_gradient(tiny.model(), lora.merged(learned()), batch, draws)[1], sep="/")
  got = flatten_dict(tiny.loss_and_gradient(tiny.model(), learned(), batch, draws)[1], sep="/")
  flat = flatten_dict(learned(), sep="/")
  places = [path.removesuffix("lora_a") for path in flat if path.endswith("lora_a")]
  assert len(places) > 15
  for place in places:
    dw, a, b = (
      np.asarray(x, np.float64) for x in (dense[place + "kernel"], flat[place + "lora_a"], flat[place + "lora_b"])
    )
    scale, turned = ALPHA / RANK, lambda x: np.swapaxes(x, -1, -2)
    for leaf, want in (("lora_a", scale * dw @ turned(b)), ("lora_b", scale * turned(a) @ dw)):
      error = np.linalg.norm(got[place + leaf] - want) / (np.linalg.norm(want) + 1e-6)
      assert error < 2e-4, (place, leaf, error)


def test_a_step_moves_adapters_alone():
  own = config()
  trained, frozen = optim.partition(fresh(), own.optimizer.trained, own.optimizer.frozen)
  assert {path[-1] for path in flatten_dict(trained)} == {"lora_a", "lora_b"}
  optimizer = optim.make_optimizer(own.optimizer)
  state = TrainState.create(trained, frozen, optimizer)
  new, metrics = jax.jit(make_step(tiny.model(), optimizer, own))(state, tiny.mixed())
  assert np.isfinite(metrics["loss"])
  jax.tree.map(np.testing.assert_array_equal, new.frozen, frozen)
  before, after = (flatten_dict(x, sep="/") for x in (trained, new.trained))
  still = {path for path in before if np.array_equal(before[path], after[path])}
  # The gradient of A is zero where B is; the pooling head is never used.
  assert {path for path in still if path.endswith("lora_b")} == set()
  assert lora.parts(trained) == set()


def test_inference_uses_the_merged_matrices():
  model, params = for_inference(tiny.model(), learned())
  want = for_inference(tiny.model(), lora.merged(learned()))[1]
  jax.tree.map(np.testing.assert_array_equal, params, want)
  assert not any(map(lora.is_adapter, flatten_dict(params, sep="/")))


def test_frozen_matrices_in_bfloat16_keep_what_a_bfloat16_model_computes():
  model = tiny.model().clone(dtype=jnp.dtype("bfloat16"))
  whole, half = fresh(), filled(config(frozen_dtype="bfloat16"))
  layers = half["language_model"]["layers"]
  assert half["language_model"]["embed"].dtype == layers["mlp"]["up"]["kernel"].dtype == "bfloat16"
  assert half["language_model"]["head"]["lora_a"].dtype == half["language_model"]["norm"]["scale"].dtype == "float32"
  batch, draws = tiny.mixed(), tiny.draws(4)
  want, got = (tiny.loss_sums(model, params, batch, draws) for params in (whole, half))
  assert {name: float(x) for name, x in got.items()} == {name: float(x) for name, x in want.items()}


@pytest.mark.parametrize("model", [tiny.CONFIG, tiny.JANUS], ids=["vae", "vq"])
def test_images_encoded_ahead_are_those_of_a_run_with_frozen_matrices_in_half(model):
  """The autoencoder keeps its float32 numbers, by which such images are known."""
  kind = family(model.generation).stored
  run = config(patterns=("language_model/layers",), frozen_dtype="bfloat16").replace(model=model)
  start = setup.initial_params(run, tiny.model(model))
  params = sharding.unbox(start)
  fresh = sharding.unbox(initial_params(tiny.model(model), run.train.seed))
  assert params["language_model"]["embed"].dtype == "bfloat16" and fresh["language_model"]["embed"].dtype == "float32"
  encode.check({"DIR": encode.fingerprint(kind, fresh[kind.part], model)}, params, model)


def test_a_fresh_adapter_is_random_by_its_path_and_zero_in_its_second_factor():
  boxed = {"a": {"kernel": sharding.Boxed(jnp.zeros((3, 64, 8)), ("layers", "embed", "mlp"))}}
  boxed["b"] = {"kernel": sharding.Boxed(jnp.zeros((64, 8)), ("embed", "mlp"))}
  made = sharding.unbox(lora.added(boxed, ("a", "b"), 4, 8.0, seed=0))
  assert np.std(made["a"]["lora_a"]) == pytest.approx(64**-0.5, rel=0.1)
  assert not np.array_equal(made["a"]["lora_a"][0], made["a"]["lora_a"][1])
  assert not np.array_equal(made["a"]["lora_a"][0], made["b"]["lora_a"])
  assert made["a"]["lora_b"].shape == (3, 4, 8) and not np.any(made["a"]["lora_b"])
  np.testing.assert_array_equal(made["a"]["lora_scale"], np.full(3, 2.0))
  again = sharding.unbox(lora.added({"b": boxed["b"]}, ("b",), 4, 8.0, seed=0))
  np.testing.assert_array_equal(again["b"]["lora_a"], made["b"]["lora_a"])


def test_adapters_lie_on_the_mesh_as_their_matrices_do():
  boxed = jax.eval_shape(lambda: setup.initial_params(config(), tiny.model()))
  for place, names in (
    (("language_model", "layers", "attention", "query"), (("layers", "embed", None), ("layers", None, "heads"))),
    (("language_model", "head"), (("embed", None), (None, "vocab"))),
  ):
    at = boxed
    for name in place:
      at = at[name]
    assert (at["lora_a"].names, at["lora_b"].names) == names
    assert at["lora_scale"].names == names[0][:-2]


@pytest.mark.parametrize(
  "own, trained, field, value",
  [
    (dict(patterns=("language_modle/layers",)), (), "lora.patterns", "language_modle"),
    (dict(patterns=("language_model/layers/mlp/norm",)), (), "lora.patterns", "language_model/layers/mlp/up"),
    (dict(patterns=("vae/codebook",)), (), "lora.patterns", "vae/codebook"),
    (dict(rank=33), (), "lora.rank", "33"),
    (dict(), ("language_model/head",), "lora.patterns", "language_model/head/kernel"),
  ],
)
def test_what_does_not_fit_is_refused(own, trained, field, value):
  made = config(**own)
  with pytest.raises(UserError) as error:
    params = jax.eval_shape(lambda: sharding.unbox(setup.initial_params(made, tiny.model())))
    optim.partition(params, trained, ("(?!language_model/head).*",) if trained else made.optimizer.frozen)
  assert field in str(error.value) and value in str(error.value)


def test_a_checkpoint_with_half_an_adapter_is_refused():
  shapes = {"a/kernel": (4, 6), "a/lora_a": (4, 2), "a/lora_b": (2, 6), "a/lora_scale": ()}
  lora.check_complete(shapes, "DIR")
  for broken in (
    {k: v for k, v in shapes.items() if k != "a/lora_b"},
    {k: v for k, v in shapes.items() if k != "a/kernel"},
    shapes | {"a/lora_a": (5, 2)},
    shapes | {"a/lora_b": (3, 6)},
    shapes | {"a/lora_scale": (4,)},
  ):
    with refused("DIR", "adapter a"):
      lora.check_complete(broken, "DIR")
