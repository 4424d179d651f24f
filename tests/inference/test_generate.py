"""Painting: the cache, the batch and the padding change nothing; guidance, seed and noise keep their word."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from refusals import refused

import jflow
from jflow.data.tokenizer import Tokenizer
from jflow.generation.flow import sampler as painting
from jflow.generation.flow.sampler import FlowSampler
from jflow.generation.flow.settings import Settings
from jflow.inference.pipeline import Pipeline, to_image
from jflow.interop.native import save_params
from jflow.models.unified import for_inference

MODEL, STEPS = tiny.model(), 3
PAINTER = for_inference(MODEL, tiny.params())
SAMPLER = FlowSampler(*PAINTER)
LATENTS = (tiny.CONFIG.latent_size, tiny.CONFIG.latent_size, tiny.CONFIG.autoencoder.latent_channels)


@pytest.fixture(scope="module")
def tokenizer(pipeline) -> Tokenizer:
  return pipeline.tokenizer


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
  return tiny.pipeline()


def _prompts(*lengths: int) -> list[np.ndarray]:
  rows = [np.random.default_rng(n).integers(10, tiny.VOCABULARY, n).astype(np.int32) for n in lengths]
  for row in rows:
    row[0] = tiny.BOS
  return rows


def _noise(*seeds: int) -> np.ndarray:
  return np.stack([np.random.default_rng(seed).standard_normal(LATENTS).astype(np.float32) for seed in seeds])


def _paint(prompts, noise, slots: int, guidance=2.0, release=False, interval=(0.0, 1.0), pad=0) -> np.ndarray:
  tokens = np.full((len(prompts), slots), pad, np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt)] = prompt
  lengths = np.asarray([len(p) for p in prompts], np.int32)
  settings = Settings(steps=STEPS, guidance=guidance, interval=interval, precision="release" if release else "exact")
  return SAMPLER.sample(tokens, lengths, noise, settings)


def _close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-5) -> None:
  assert np.abs(b).max() > 0.1
  np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))


@functools.partial(jax.jit, static_argnames="visible")
def _velocity(params, prompt, z, time, visible: int):
  """The velocity by one pass over the whole sequence, with the first `visible` tokens of the prompt."""
  apply = functools.partial(MODEL.apply, {"params": params})
  slots, skip, time_D = apply(z[None], time[None], method=lambda m, *x: m.writer.slots(*x))
  x = jnp.concatenate([apply(prompt[None, :visible], method="embed"), slots], axis=1)
  positions = jnp.concatenate([jnp.arange(visible), len(prompt) + jnp.arange(slots.shape[1])])[None]
  hidden = apply(x, positions, jnp.ones_like(positions), method="backbone").hidden
  return apply(hidden[:, visible + 1 :], skip, time_D, method=lambda m, *x: m.writer.velocity(*x))[0]


@pytest.mark.parametrize("guidance", [2.0, 0.0])
def test_the_cache_equals_whole_passes(guidance):
  """Eq. 5 written out: the empty prompt keeps BOS, and the picture keeps its positions."""
  (prompt,), noise = _prompts(6), _noise(1)
  z = jnp.asarray(noise[0])
  for k in range(STEPS):
    time = jnp.float32(k / STEPS)
    v, empty = (_velocity(tiny.params(), prompt, z, time, visible) for visible in (len(prompt), 1))
    z = z + (guidance * v + (1 - guidance) * empty) / STEPS
  want = MODEL.apply({"params": tiny.params()}, z[None], method=lambda m, x: m.writer.decode(x))
  _close(_paint([prompt], noise, 32, guidance), np.asarray(want))


def test_a_picture_depends_on_nothing_beside_it():
  """In a batch with longer prompts, padded further, with other ids in the padding: the same picture."""
  prompts, noise = _prompts(3, 40, 12), _noise(1, 2, 3)
  together = _paint(prompts, noise, 64, pad=7)
  for i, slots in enumerate((32, 64, 32)):
    _close(together[i : i + 1], _paint(prompts[i : i + 1], noise[i : i + 1], slots))


def test_guidance_1_equals_no_guidance():
  prompts, noise = _prompts(6), _noise(1)
  plain = _paint(prompts, noise, 32, guidance=1.0)
  _close(_paint(prompts, noise, 32, guidance=5.0, interval=(0.99, 1.0)), plain)  # no step starts there
  assert np.abs(_paint(prompts, noise, 32, guidance=5.0) - plain).max() > 0.01


def test_guidance_0_ignores_the_prompt():
  prompt = _prompts(6)[0]
  other = np.append(prompt[:1], prompt[1:][::-1]).astype(np.int32)  # the same BOS and length
  _close(_paint([prompt], _noise(1), 32, guidance=0.0), _paint([other], _noise(1), 32, guidance=0.0))
  assert np.abs(_paint([prompt], _noise(1), 32) - _paint([other], _noise(1), 32)).max() > 0.01


def test_release_precision_is_coarser_and_near():
  prompts, noise = _prompts(6), _noise(1)
  exact, release = _paint(prompts, noise, 32), _paint(prompts, noise, 32, release=True)
  difference = np.abs(release - exact).max()
  assert 1e-5 < difference < 0.1 * np.abs(exact).max()


def test_the_vae_in_slices_gives_the_same_pictures():
  """Two at a time and one left over."""
  z = jnp.asarray(_noise(1, 2, 3, 4, 5))
  whole, slices = (np.asarray(painting.decode(*PAINTER, z, at_once=n)) for n in (8, 2))
  assert whole.shape == slices.shape == (5, 16, 16, 3)
  _close(slices, whole, 1e-6)


def test_a_picture_in_pieces_of_the_solver_is_the_same():
  prompts, noise, seen = _prompts(6), _noise(1), []
  at = np.pad(prompts[0], (0, 26))[None], np.asarray([6]), noise
  pieces = SAMPLER.sample(*at, Settings(steps=STEPS), on_step=lambda *x: seen.append(x))
  assert seen == [(1, 3), (2, 3), (3, 3)]
  np.testing.assert_array_equal(pieces, _paint(prompts, noise, 32))


def test_pixels_are_clipped_and_truncated():
  values = np.array([-9.0, -1.0, 0.0, 0.999, 1.0, 9.0], np.float32)
  pixels = np.asarray(to_image(np.broadcast_to(values[:, None], (1, 6, 3))))
  assert pixels[0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]


# --- Pipeline.generate ------------------------------------------------------------------------------------


def _bytes(images) -> list[bytes]:
  return [image.tobytes() for image in images]


def test_picture_j_starts_from_seed_plus_j(pipeline):
  """Whatever the batch: alone, two at once, or from noise that is passed in."""
  seen = []
  options = dict(steps=STEPS, batch_size=1)
  many = pipeline.generate("a red circle", seed=5, num_images=3, progress=lambda *x: seen.append(x), **options)
  assert seen == [(1, 3), (2, 3), (3, 3)]
  assert [image.size for image in many] == [(16, 16)] * 3 and len(set(_bytes(many))) == 3
  single = [pipeline.generate("a red circle", seed=5 + j, **options)[0] for j in range(3)]
  assert _bytes(single) == _bytes(many)
  noise = np.stack([jax.random.normal(jax.random.key(5 + j), LATENTS) for j in range(3)]).transpose(0, 3, 1, 2)
  assert _bytes(pipeline.generate("a red circle", seed=9, num_images=3, noise=noise, **options)) == _bytes(many)


def test_small_numbers_of_numpy_do_not_wrap_around(pipeline):
  plain = pipeline.generate("a red circle", steps=200, seed=255, num_images=2, batch_size=1, on_step=lambda *_: None)
  small = dict(steps=np.uint8(200), seed=np.uint8(255), num_images=np.int8(2), batch_size=np.uint8(1))
  assert _bytes(pipeline.generate("a red circle", **small, on_step=lambda *_: None)) == _bytes(plain)
  with refused("seed=4294967295 "):
    pipeline.generate("a red circle", seed=np.uint32(2**32 - 1), num_images=2)


def test_pictures_come_prompt_by_prompt(pipeline):
  options = dict(steps=STEPS, seed=2, batch_size=1)
  both = pipeline.generate(["a red circle", "two blue stars"], num_images=2, **options)
  apart = [x for p in ("a red circle", "two blue stars") for x in pipeline.generate(p, num_images=2, **options)]
  assert _bytes(both) == _bytes(apart)
  batched = pipeline.generate(["a red circle", "two blue stars"], num_images=2, steps=STEPS, seed=2, batch_size=3)
  for a, b in zip(batched, both):  # another program: float rounding may tip a pixel over one level
    assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


def test_the_longest_prompt_that_fits_and_one_more(pipeline, tokenizer):
  room = tiny.CONFIG.language_model.max_length - 1 - tiny.CONFIG.patches
  word = " red"
  while len(tokenizer.encode("a" + word)) + 1 < room:
    word += " red"
  assert len(tokenizer.encode("a" + word)) + 1 == room
  assert len(pipeline.generate("a" + word, steps=STEPS, guidance=1.0)) == 1
  with refused(f"{room + 1} tokens", f"{room}"):
    pipeline.generate("a" + word + " red", steps=STEPS)


@pytest.mark.parametrize(
  "arguments, named",
  [
    (dict(prompts=[]), "at least one prompt"),
    (dict(prompts="  "), "the prompt is empty"),
    (dict(prompts=["a star", ""]), "the prompt is empty"),
    (dict(prompts=[3]), "prompt"),
    (dict(steps=0), "steps=0 must be at least 1"),
    (dict(steps=2.5), "steps=2.5 must be a whole number"),
    (dict(steps=True), "steps=True must be a whole number"),
    (dict(num_images="2"), "num_images='2' must be a whole number"),
    (dict(seed=1.5), "seed=1.5"),
    (dict(guidance="2"), "guidance='2' must be a finite number"),
    (dict(interval=0.5), "interval=0.5"),
    (dict(interval=np.array([0.0, 0.5, 1.0])), "interval=[0.0, 0.5, 1.0]"),
    (dict(guidance=float("nan")), "guidance=nan "),
    (dict(guidance=float("inf")), "guidance=inf "),
    (dict(guidance=0.5), "guidance=0.5 must be at least 1"),
    (dict(guidance=-1.0), "guidance=-1.0 "),
    (dict(seed=-1), "seed=-1 "),
    (dict(seed=2**32), "seed=4294967296 "),
    (dict(num_images=0), "num_images=0 must be at least 1"),
    (dict(batch_size=0), "batch_size=0 must be at least 1"),
    (dict(solver="rk45"), "solver='rk45' must be one of euler, heun, midpoint"),
    (dict(shift=0.0), "shift=0.0 must be in [1e-06, 1e+06]"),
    (dict(shift=1e-50), "shift=1e-50 must be in [1e-06, 1e+06]"),
    (dict(steps=10**30), "must be at most 10000"),
    (dict(prompts=np.array(3)), "a prompt must be text"),
    (dict(interval=(0.8, 0.2)), "interval=(0.8, 0.2) "),
    (dict(interval=(0.0, float("nan"))), "interval="),
    (dict(precision="half"), "precision='half' must be 'exact' or 'release'"),
    (dict(precision="release", solver="heun"), "precision='release'"),
    (dict(noise=np.zeros((1, 8, 8, 4))), "(1, 8, 8, 4)"),
    (dict(noise=np.full((1, 4, 8, 8), np.nan)), "noise"),
    (dict(noise=np.zeros((1, 4, 8, 8), complex)), "noise"),
    (dict(noise=np.full((1, 4, 8, 8), "a")), "noise"),
    (dict(noise=[[1], [2, 3]]), "noise"),
    (dict(seeds=[-1]), "seed=-1 "),
    (dict(seeds=[1.5]), "seed=1.5"),
    (dict(seeds=5), "seeds must be a number for each of 1 images"),
    (dict(seeds=[5], noise=np.zeros((1, 4, 8, 8))), "noise or seeds"),
    (dict(guidance=10**400), "guidance=1"),
    (dict(guidance=1e7), "guidance=10000000.0 must be in"),
    (dict(solver=np.array(["euler"])), "solver="),
    (dict(prompts=None), "prompt"),
  ],
)
def test_bad_input_is_named(pipeline, arguments, named):
  with refused(named):
    pipeline.generate(**(dict(prompts="a star") | arguments))


def test_a_checkpoint_without_a_vae_says_how_to_give_one(tokenizer):
  with refused("--vae=DIR"):
    Pipeline(MODEL, tiny.params(), tokenizer, "plain", can_generate=False).generate("a star")


# --- jflow.load -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tokenizer):
  workdir = tmp_path_factory.mktemp("load") / "run"
  config = {"model": tiny.CONFIG.to_dict(), "data": {"template": "plain"}}
  save_params(workdir, jax.tree.map(np.asarray, tiny.params()), config, tokenizer)
  return workdir


@pytest.mark.smoke
def test_a_loaded_model_paints_as_the_one_that_was_saved(workdir, pipeline):
  ours = jflow.load(workdir, dtype="float32").generate("a red circle", steps=STEPS)
  assert _bytes(ours) == _bytes(pipeline.generate("a red circle", steps=STEPS))


def test_load_says_what_is_wrong(workdir, tmp_path):
  with refused("nowhere"):
    jflow.load(tmp_path / "nowhere")
  with refused("dtype='int8'"):
    jflow.load(workdir, dtype="int8")
  with refused("weights='best'"):
    jflow.load(workdir, weights="best")
  for template, named in (("jinja", "'jinja'"), ("pro", "<|User|>")):  # the tokenizer has no such token
    with refused("template", named):
      jflow.load(workdir, template=template)


def test_a_template_is_used_in_place_of_the_checkpoints(workdir, tokenizer):
  given, own = (jflow.load(workdir, template=template).generation_prompt("a red ring") for template in ("chat", None))
  assert tokenizer.decode(given).endswith("User: a red ring\n\nAssistant:") and "User" not in tokenizer.decode(own)
