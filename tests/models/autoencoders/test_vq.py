"""VQ-16 against the published PyTorch code: codes exact, maps within 2e-5; and its comparison of codes by hand."""

import copy
import math

import janus
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused

from jflow.models.autoencoders import kl, vq
from jflow.models.config import ModelConfig

TOLERANCE = 2e-5  # some 40 convolutions
CODEC = janus.CONFIG.autoencoder
SIDE = janus.CONFIG.latent_size


@pytest.fixture(scope="module")
def codec():
  """name of a method, arguments -> its result with the golden weights."""
  module, params = CODEC.make(jnp.float32), janus.params()["vq"]

  def run(method, *args):
    with jax.default_matmul_precision("highest"):
      return jax.jit(lambda p, *xs: module.apply({"params": p}, *xs, method=method))(params, *args)

  return run


def channels_first(x):
  return np.moveaxis(np.asarray(x), -1, 1)


def test_an_image_is_encoded_as_published(codec):
  golden = janus.golden()
  pixels = golden["vq/pixels"].transpose(0, 2, 3, 1)
  inside, latents, codes = codec(lambda m, x: (m.encoder(x), m.latents(x), m.encode(x)), pixels)
  assert janus.distance(channels_first(inside), golden["vq/encoder_output"]) < TOLERANCE
  assert janus.distance(channels_first(latents), golden["vq/latents"]) < TOLERANCE
  assert golden["vq/margin"].min() > 1e-3
  np.testing.assert_array_equal(codes.reshape(golden["vq/codes"].shape), golden["vq/codes"])


def test_codes_do_not_depend_on_the_type_that_a_model_computes_in():
  golden = janus.golden()
  module = CODEC.make(jnp.bfloat16)
  with jax.default_matmul_precision("highest"):
    encode = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode"))
    codes = encode(janus.params()["vq"], golden["vq/pixels"].transpose(0, 2, 3, 1))
  np.testing.assert_array_equal(codes.reshape(golden["vq/codes"].shape), golden["vq/codes"])


def test_codes_are_decoded_as_published(codec):
  golden = janus.golden()
  codes = golden["vq/codes"].reshape(-1, SIDE, SIDE).astype(np.int32)
  assert janus.distance(channels_first(codec("lookup", codes)), golden["vq/quantised"]) < TOLERANCE
  assert janus.distance(channels_first(codec("decode", codes)), golden["vq/decoded"]) < TOLERANCE


def test_the_nearest_row_has_the_largest_cosine_and_the_lowest_index_of_equal_ones():
  rng = np.random.default_rng(0)
  rows = rng.standard_normal((40, 6)) * rng.uniform(0.1, 10, (40, 1))  # lengths do not count
  rows[30], rows[7] = 3 * rows[11], 2 * rows[11]  # one direction three times
  z = rng.standard_normal((2, 3, 5, 6))
  z[0, 0, 0], z[1, 2, 4] = rows[30], 0.0  # zero: all cosines are 0
  unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
  want = np.argmax(np.round(unit(z) @ unit(rows).T, 6), axis=-1)
  assert want[0, 0, 0] == 7 and want[1, 2, 4] == 0
  got = vq.nearest(jnp.asarray(z, jnp.float32), jnp.asarray(rows, jnp.float32))
  np.testing.assert_array_equal(got, want)


def test_codes_survive_the_codebook(codec):
  """A latent on the row of a code, of any length, is that code again."""
  codes = np.arange(CODEC.codebook_size, dtype=np.int32).reshape(1, 16, -1)
  rows = 3.0 * codec("lookup", codes)
  np.testing.assert_array_equal(vq.nearest(rows, janus.params()["vq"]["codebook"]), codes)


def test_the_flops_are_those_of_the_convolutions():
  """By shapes: 2 x positions x weights of every map, and the products of attention and codebook."""
  config, params = CODEC, janus.params()["vq"]
  size, factor = 64, config.factor
  weights = lambda tree: sum(
    x.size for path, x in jax.tree_util.tree_leaves_with_path(tree) if path[-1].key == "kernel"
  )
  assert config.factor == 16

  def positions(name):  # of the map that a block works on
    level = {"conv_in": 0, "middle": 4, "conv_out": 4}.get(name)
    level = int(name.split("_")[1]) + ("sample" in name) if level is None else level
    return (size >> level) ** 2

  total = sum(2 * positions(name) * weights(part) for name, part in params["encoder"].items() if name != "norm_out")
  total += 3 * 4 * (size // factor) ** 4 * config.widths[-1]  # attention: one in the middle, two at the lowest level
  codes = (size // factor) ** 2
  total += 2 * codes * (weights(params["quant_conv"]) + config.codebook_size * config.code_dim)
  assert config.encoder_flops(size) == total


def test_the_published_size_takes_what_the_sources_say():
  """JANUS.md, sections 1 and 14: parameters, and FLOPs of one picture of 384 x 384."""
  config = vq.VQConfig("vq", 16_384, 8, 128, (1, 1, 2, 2, 4), 2, 256, 32)
  shapes = jax.eval_shape(config.make(jnp.float32).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  assert (count(shapes["encoder"]), count(shapes["decoder"])) == (29_298_176, 42_449_795)
  assert count(shapes) == 71_883_403
  assert config.encoder_flops(384) == pytest.approx(0.31e12, rel=0.05)
  assert config.decoder_flops(24) == pytest.approx(0.57e12, rel=0.05)
  assert kl.encoder_flops(384, config.widths, 2, 256) < config.encoder_flops(384)


@pytest.mark.parametrize(
  "field, value",
  [("multipliers", (1, 1, 2, 2, 3.5)), ("multipliers", ()), ("norm_groups", 24), ("codebook_size", 2**16 + 1)],
)
def test_a_bad_size_is_named(field, value):
  values = copy.deepcopy(janus.DICT)
  values["autoencoder"][field] = value
  with refused(field):
    ModelConfig.from_dict(values)
