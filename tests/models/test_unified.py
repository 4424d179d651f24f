"""Laws of the whole model: sizes, packing, what each loss reads, the dropped prompt, bad configs."""

import copy
import functools
import json

import janus
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from refusals import refused

from configs import models
from jflow.batch import NONE, WRITE, RowShape, empty
from jflow.data import examples
from jflow.data.packing import pack
from jflow.data.records import Record
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.generation.flow import FAMILY
from jflow.generation.flow.writer import Draws
from jflow.models.cache import Cache
from jflow.models.config import ModelConfig
from jflow.models.unified import for_inference
from jflow.world.codec import PatchPCA

CONFIG = tiny.CONFIG
RNG = np.random.default_rng(0)


def test_autoencoders_compute_the_same_with_parameters_in_the_compute_type():
  """The VQ's encoder is in f32 in a model of bf16, and upsampling adds its taps up in f32."""
  rng = np.random.default_rng(0)
  for own in (tiny, janus):
    model, params = own.model().clone(dtype=jnp.dtype("bfloat16")), own.params()
    cast = for_inference(model, params)[1]
    pixels = rng.uniform(-1, 1, (8, model.config.image_size, model.config.image_size, 3)).astype(np.float32)
    apply = lambda params, x, method, model=model: getattr(model.bind({"params": params}).writer, method)(x)
    if own is janus:
      np.testing.assert_array_equal(apply(cast, pixels, "encode"), apply(params, pixels, "encode"))
      written = rng.integers(0, model.config.autoencoder.codebook_size, (2, model.config.patches))
    else:
      side, channels = model.config.latent_size, model.config.autoencoder.latent_channels
      written = rng.standard_normal((2, side, side, channels)).astype(np.float32)
    np.testing.assert_array_equal(apply(cast, written, "decode"), apply(params, written, "decode"))


def sums(batch, draws):
  return {k: float(v) for k, v in tiny.loss_sums(tiny.model(), tiny.params(), batch, draws).items()}


def close(got, want, tolerance=2e-5):
  assert got.keys() == want.keys()
  for name, value in want.items():
    assert got[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name


# --- sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset, patches", [(models.janusflow_384, 576), (models.janusflow_256, 256)])
def test_the_full_models_have_the_published_number_of_parameters(preset, patches):
  config = ModelConfig.from_dict(preset())
  sizes = {path: int(np.prod(x.shape)) for path, x in flatten_dict(tiny.shapes(config)).items()}
  count = lambda *parts: sum(n for path, n in sizes.items() if path[0] in parts)
  fewer_positions = (576 - patches) * 1024  # SigLIP's table: all that depends on the size of the picture
  assert config.patches == patches
  assert sum(sizes.values()) - count("vae", "alignment_head") == 2_046_367_504 - fewer_positions
  assert count("vae") == 83_653_863
  assert round(count("generation_encoder", "generation_decoder") / 1e6, 2) == 72.18


def test_a_model_that_recomputes_for_training_writes_by_the_same_modules():
  """Sample pictures of a run with `compute.remat="full"`: a cache does not go through recomputed blocks."""
  params = tiny.params()
  assert for_inference(tiny.model().clone(remat="full"), params)[0] == for_inference(tiny.model(), params)[0]


def test_the_full_loss_and_its_gradient_have_the_right_shapes():
  config = ModelConfig.from_dict(models.janusflow_384())
  batch = empty(2, RowShape(tokens=1024, images=1, image_patches=576, image_size=384, writer="flow"))
  latents = jax.ShapeDtypeStruct((2, 1, 48, 48, 4), jnp.float32)
  draws = Draws(jax.ShapeDtypeStruct((2, 1), jnp.float32), latents, latents)
  evaluate = functools.partial(tiny.loss_and_gradient, tiny.model(config, "full"))
  loss, gradient = jax.eval_shape(evaluate, tiny.shapes(config), batch, draws)
  assert loss.shape == ()
  assert jax.tree.map(lambda x: x.shape, gradient) == jax.tree.map(lambda x: x.shape, tiny.shapes(config))


# --- packing -----------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_packed_samples_cost_what_they_cost_alone():
  samples = [tiny.reading(1), tiny.writing(2), tiny.text(3), tiny.writing(4, 3)]
  packed, one = tiny.batch(samples), tiny.draws(1)
  total = sums(packed, one)
  alone = []
  for sample, slot in zip(samples, (0, 1, None, 2)):
    draws = one if slot is None else jax.tree.map(lambda x: np.roll(x, -slot, axis=1), one)
    alone.append(sums(tiny.batch([sample]), draws))
  close(total, {name: sum(row[name] for row in alone) for name in total})
  assert [row["text"] > 0 for row in alone] == [True, False, True, False]
  assert [row["flow"] > 0 for row in alone] == [False, True, False, True]


def test_rows_of_a_batch_add_up():
  batch, draws = tiny.mixed(), tiny.draws(4)
  cut = lambda x, i: jax.tree.map(lambda a: a[i : i + 1], x)
  rows = [sums(cut(batch, i), cut(draws, i)) for i in range(4)]
  close(sums(batch, draws), {name: sum(row[name] for row in rows) for name in rows[0]})


def test_a_neighbour_in_the_row_changes_nothing():
  """Swapping the sample in front for another of its size keeps the picture's losses."""
  draws = tiny.draws(1)
  a = sums(tiny.batch([tiny.reading(1), tiny.writing(2)]), draws)
  b = sums(tiny.batch([tiny.reading(5), tiny.writing(2)]), draws)
  assert a["text"] != b["text"]
  close(a | {"text": 0.0}, b | {"text": 0.0})


def test_what_a_sample_does_not_use_is_not_read():
  """Ids in image slots, pictures in empty slots, randomness of pictures to read, targets without loss."""
  batch, draws = tiny.mixed(), tiny.draws(4)
  changed = batch._replace(
    tokens=np.where(batch.image_index >= 0, 77, batch.tokens),
    targets=np.where(batch.loss_mask, batch.targets, 99),
    images=np.where((batch.image_kind == NONE)[..., None, None, None], 200, batch.images).astype(np.uint8),
  )
  writes = lambda like: (batch.image_kind == WRITE).reshape(4, 3, *[1] * (like.ndim - 2))
  other = jax.tree.map(lambda x, y: np.where(writes(x), x, y), draws, tiny.draws(4, 1))
  assert sums(changed, other) == sums(batch, draws)


# --- what the losses are -----------------------------------------------------------------------------


@jax.jit
def painted_velocity(params, tokens, z, time):
  """As a sampler computes it: the prompt into a cache, then time token and patches on top. [1, h, w, C]."""
  model, params = for_inference(tiny.model(), params)
  apply = functools.partial(model.apply, {"params": params})
  prompt, slots = tokens.shape[1], 1 + CONFIG.patches
  ones = jnp.ones((1, prompt), jnp.int32)
  cache = Cache.empty(CONFIG.language_model, 1, prompt + slots, jnp.float32)
  cache = apply(apply(tokens, method="embed"), jnp.arange(prompt)[None], ones, cache, method="backbone").cache
  x, skip, time_embed = apply(z, time, method=lambda m, *x: m.writer.slots(*x))
  out = apply(x, prompt + jnp.arange(slots)[None], jnp.ones((1, slots), jnp.int32), cache, method="backbone")
  features = apply(out.layer[:, 1:], method=lambda m, x: m.objectives["alignment"].alignment_head(x))
  return apply(out.hidden[:, 1:], skip, time_embed, method=lambda m, *x: m.writer.velocity(*x)), features


def test_the_losses_of_a_picture_are_those_of_the_sampler():
  """Training regresses what a sampler asks for: same slots and positions, no shift, z_t, x - z_0."""
  sample, draws = tiny.writing(2), tiny.draws(1)
  apply = functools.partial(tiny.model().apply, {"params": tiny.params()})
  pixels = np.asarray(sample.images[0], np.float32)[None] / 127.5 - 1
  mean, std = apply(pixels, method=lambda m, x: m.writer.posterior(x))
  data = np.asarray(mean + std * draws.posterior[:, 0])
  noise, t = draws.noise[:, 0], float(draws.time[0, 0])
  prompt = sample.tokens[None, : sample.image_starts[0]]
  z = t * data + (1 - t) * noise
  velocity, projected = painted_velocity(tiny.params(), prompt, z, draws.time[0, :1])
  features = np.asarray(apply(pixels, method="features"), np.float64)
  projected = np.asarray(projected, np.float64)
  norms = np.linalg.norm(projected, axis=-1) * np.linalg.norm(features, axis=-1)
  want = {
    "text": 0.0,
    "flow": float(np.mean((np.asarray(velocity) - (data - noise)) ** 2)),
    "alignment": -float(np.mean((projected * features).sum(-1) / norms)),
  }
  close(sums(tiny.batch([sample]), draws), want)


@jax.jit
def read_logits(params, tokens, image, start):
  """Embeddings laid out by hand: start vector and projected features over the slots of the image."""
  apply = functools.partial(tiny.model().apply, {"params": params})
  x = apply(tokens[None], method="embed")
  features = apply(image[None] / 127.5 - 1, method="features")
  projector = params["understanding_projector"]
  slots = jnp.concatenate([params["understanding_start"][None], features[0] @ projector["kernel"] + projector["bias"]])
  x = jax.lax.dynamic_update_slice(x, slots[None], (0, start, 0))
  positions = jnp.arange(len(tokens))[None]
  return apply(apply(x, positions, jnp.ones_like(positions), method="backbone").hidden, method="logits")[0]


def test_the_loss_of_an_answer_is_that_of_a_layout_by_hand():
  sample = tiny.reading(1)
  logits = read_logits(tiny.params(), sample.tokens, sample.images[0].astype(np.float32), sample.image_starts[0])
  log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
  answer = np.flatnonzero(sample.loss_mask)  # 3 tokens and EOS, each predicted from the one before
  assert len(answer) == 4 and answer[-1] == len(sample.tokens) - 2
  want = -sum(log_p[i, sample.tokens[i + 1]] for i in answer)
  got = sums(tiny.batch([tiny.text(9), sample]), tiny.draws(1))["text"]
  got -= sums(tiny.batch([tiny.text(9)]), tiny.draws(1))["text"]
  assert got == pytest.approx(want, rel=2e-5)


@functools.cache
def reached():
  """Loss -> parts (the LLM's by layer) that its gradient reaches, on pictures to write; all but the VAE."""
  batch, draws = tiny.batch([tiny.writing(6), tiny.writing(7, 9)]), tiny.draws(1)

  @jax.jit
  def gradient(weights, params):
    losses = lambda p: tiny.model().apply({"params": p}, batch, draws, tiny.LOSSES, method="losses")
    return jax.grad(lambda p: jnp.dot(jnp.stack([losses(p)[name] for name in tiny.LOSSES]), weights))(params)

  out = {}
  for i, name in ((1, "flow"), (2, "alignment")):
    flat = flatten_dict(gradient(jnp.eye(3)[i], tiny.params()))
    flat = {path: np.asarray(g) for path, g in flat.items() if path[0] != "vae"}
    out[name] = {path[0] for path, g in flat.items() if path[0] != "language_model" and np.any(g)}
    for path, g in flat.items():
      if path[:2] == ("language_model", "layers"):
        out[name] |= {f"layer {layer}" for layer in range(len(g)) if np.any(g[layer])}
      elif path[0] == "language_model" and np.any(g):
        out[name].add(path[1])
  return out


def test_the_flow_loss_teaches_the_writing_path_only():
  assert reached()["flow"] == {
    "generation_encoder",
    "generation_projector",
    "generation_output_norm",
    "generation_output_projector",
    "generation_decoder",
    "embed",
    "layer 0",
    "layer 1",
    "norm",
  }


def test_alignment_reads_after_its_block_and_leaves_the_encoder_alone():
  """An alignment layer of 1: nothing behind block 1, and no gradient into SigLIP, which eq. 8 holds constant."""
  assert reached()["alignment"] == {"alignment_head", "generation_encoder", "generation_projector", "embed", "layer 0"}


def test_losses_not_asked_for_are_absent_and_the_others_unchanged():
  batch, draws = tiny.mixed(), tiny.draws(4)
  whole = sums(batch, draws)
  text = tiny.loss_sums(tiny.model(), tiny.params(), batch, draws, ("text",))
  assert set(text) == {"text"}
  close(text, {"text": whole["text"]})


def test_latents_are_scaled_after_encoding_and_before_decoding(monkeypatch):
  """Mean, standard deviation and decoder of an autoencoder that knows nothing of the factor (0.5 here)."""
  mean, log_variance = RNG.standard_normal((2, 1, 8, 8, 4)).astype(np.float32)
  monkeypatch.setattr(PatchPCA, "encode", lambda self, pixels: (jnp.asarray(mean), jnp.asarray(log_variance)))
  monkeypatch.setattr(PatchPCA, "decode", lambda self, latents: latents)
  apply = functools.partial(tiny.model().apply, {"params": tiny.params()})
  scaled, deviation = apply(np.zeros((1, 16, 16, 3), np.float32), method=lambda m, x: m.writer.posterior(x))
  np.testing.assert_allclose(scaled, 0.5 * mean, rtol=1e-6)
  np.testing.assert_allclose(deviation, 0.5 * np.sqrt(np.exp(log_variance)), rtol=1e-5)
  np.testing.assert_allclose(apply(scaled, method=lambda m, x: m.writer.decode(x)), mean, rtol=1e-6)


# --- the dropped prompt ------------------------------------------------------------------------------


def test_a_dropped_prompt_is_the_masked_prompt_without_its_masked_slots():
  """Training's compact form equals the release's unconditional row: the prompt hidden, positions kept."""
  tokenizer = Tokenizer.load(tiny.TOKENIZER)
  pixels = RNG.integers(0, 256, (16, 16, 3), np.uint8)
  record = Record("1", (pixels,), "a red circle and two blue stars", ())
  build = lambda drop: examples.build(
    record, "generation", tokenizer, "chat", CONFIG.patches, np.random.default_rng(0), 0.0, drop, FAMILY.layout
  )
  whole, dropped = build(0.0), build(1.0)
  prompt = whole.image_starts[0]
  assert prompt > 8 and len(dropped.tokens) == len(whole.tokens) - prompt + 1
  masked = pack([whole], tiny.SHAPE)
  masked.segment_ids[1:prompt] = 0
  masked, draws = jax.tree.map(lambda x: x[None], masked), tiny.draws(1)
  compact = sums(tiny.batch([tiny.text(1), dropped]), draws) | {"text": 0.0}
  close(compact, sums(masked, draws))
  assert sums(tiny.batch([whole]), draws)["flow"] != pytest.approx(compact["flow"], rel=1e-3)


# --- configs -----------------------------------------------------------------------------------------


BAD = [
  ("language_model.num_heads", 3, "num_heads=3"),
  ("language_model.head_dim", 7, "head_dim=7"),
  ("language_model.num_kv_heads", 0, "language_model.num_kv_heads"),
  ("language_model.embed_dim", -32, "language_model.embed_dim"),
  ("language_model.embed_dim", "32", "language_model.embed_dim"),
  ("language_model.num_layers", True, "language_model.num_layers"),
  ("language_model.rms_norm_epsilon", "small", "language_model.rms_norm_epsilon"),
  ("language_model.rms_norm_epsilon", 0.0, "language_model.rms_norm_epsilon"),
  ("language_model.experts", 8, "language_model.experts"),
  ("language_model", 5, "model.language_model"),
  ("understanding_encoder.patch_size", 0, "understanding_encoder.patch_size"),
  ("understanding_encoder.patch_size", 5, "16 patches, a read one 9"),
  ("understanding_encoder.patch_size", 8, "16 patches, a read one 4"),
  ("understanding_encoder.num_heads", 5, "num_heads=5"),
  ("understanding_encoder.gelu", "relu", "gelu='relu'"),
  ("generation.patch_size", 0, "generation.patch_size"),
  ("generation.patch_size", 3, "generation.patch_size=3"),
  ("generation.channels", 15, "generation.channels=15"),
  ("autoencoder.kind", "jpeg", "autoencoder.kind='jpeg'"),
  ("autoencoder.patch_size", 0, "autoencoder.patch_size"),
  ("autoencoder.window", 1, "autoencoder.window=1"),
  ("autoencoder.latent_channels", 0, "autoencoder.latent_channels"),
  ("autoencoder.scaling", 0.0, "autoencoder.scaling"),
  ("objectives.alignment.layer", 3, "alignment.layer=3"),
  ("objectives.alignment.layer", 0, "alignment.layer=0"),
  ("objectives.alignment.hidden_dim", 0, "alignment.hidden_dim=0"),
  ("generation.kind", "paint", "generation.kind='paint'"),
  ("language_model.kind", "rnn", "language_model.kind='rnn'"),
]


@pytest.mark.parametrize("field, value, words", BAD, ids=[f"{field}={value}" for field, value, _ in BAD])
def test_a_bad_model_config_names_its_field(field, value, words):
  values = copy.deepcopy(tiny.DICT)
  *sections, name = field.split(".")
  section = functools.reduce(dict.__getitem__, sections, values)
  section[name] = value
  with pytest.raises(UserError) as error:
    ModelConfig.from_dict(values)
  assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"block_channels": 8}, "autoencoder.block_channels"),
    ({"block_channels": ()}, "autoencoder.block_channels"),
    ({"block_channels": (8, 10)}, "autoencoder.block_channels"),
    ({"layers_per_block": 0}, "autoencoder.layers_per_block"),
    ({"norm_groups": 0}, "autoencoder.norm_groups"),
  ],
)
def test_a_bad_autoencoder_names_its_field(changes, words):
  good = dict(kind="autoencoder_kl", block_channels=(8, 16), layers_per_block=1, norm_groups=4)
  values = tiny.DICT | {"autoencoder": tiny.DICT["autoencoder"] | good | dict(patch_size=0, window=0)}
  ModelConfig.from_dict(values)
  with refused(words):
    ModelConfig.from_dict(values | {"autoencoder": values["autoencoder"] | changes})


def test_a_missing_field_is_named():
  values = copy.deepcopy(tiny.DICT)
  del values["generation"]["channels"]
  with refused("model.generation.channels"):
    ModelConfig.from_dict(values)


def test_a_config_travels_as_json():
  back = ModelConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict())))
  assert back == CONFIG and hash(back) == hash(CONFIG)
