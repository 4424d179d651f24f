"""Writing by codes: the published numbers (tests/golden/janus_tiny), and the laws of layout, loss and sampling."""

import copy
import functools

import janus
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from refusals import refused

from configs import models
from jflow.batch import READ, WRITE, RowShape
from jflow.data.examples import Sample
from jflow.generation.base import settings
from jflow.generation.codes import FAMILY, flops, sampler
from jflow.generation.codes.layout import CodesLayout
from jflow.generation.codes.sampler import CodesSampler
from jflow.generation.codes.settings import Settings
from jflow.generation.codes.writer import Head, derived
from jflow.generation.flow import FAMILY as FLOW
from jflow.models import flops as model_flops
from jflow.models.config import ModelConfig
from jflow.models.layers import gelu
from jflow.models.unified import for_inference
from jflow.objectives import codes as objective
from jflow.sharding import unbox

P = janus.CONFIG.patches
TOLERANCE = 1e-5
SHAPE = RowShape(  # codes made ahead: a tokenizer takes long to compile
  tokens=64,
  images=3,
  image_patches=P,
  image_size=64,
  writer="codes",
  written_slots=FAMILY.layout.slots(P),
  stored=(P,),
  stored_dtype="uint16",
)


@pytest.fixture(autouse=True)
def exact():
  with jax.default_matmul_precision("highest"):
    yield


# --- the published numbers -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="model")
def teacher_forced(model, params, prompts, codes):
  """Prompts with BOI int32[B, n], codes int32[B, P] -> (the LLM's output that predicts each code, its logits)."""
  bound = model.bind({"params": params})
  x = jnp.concatenate([bound.embed(prompts), bound.writer.slots(codes)], axis=1)
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  hidden = bound.backbone(x, positions, jnp.ones_like(positions)).hidden[:, prompts.shape[1] - 1 : -1]
  return hidden, bound.writer.logits(hidden)


def forced(prompt, codes):
  return teacher_forced(janus.model(), janus.params(), np.tile(prompt, (len(codes), 1)), codes)


def twin(prompt):
  """The unconditional prompt: pads between BOS and BOI."""
  return np.where((np.arange(len(prompt)) > 0) & (np.arange(len(prompt)) < len(prompt) - 1), janus.Ids.pad, prompt)


def test_teacher_forced_codes_have_the_published_logits():
  golden = janus.golden()
  codes, prompt = golden["paint/codes"], golden["paint/prompt_ids"]
  assert prompt[-1] == janus.Ids.image_start
  bound = janus.model().bind({"params": janus.params()})
  assert janus.distance(bound.writer.generation_embed(codes), golden["paint/gen_embeds"]) < TOLERANCE
  assert janus.distance(bound.writer.slots(codes), golden["paint/aligned"]) < TOLERANCE
  hidden, conditional = forced(prompt, codes)
  _, unconditional = forced(twin(prompt), codes)
  assert janus.distance(hidden, golden["paint/hidden_cond"]) < TOLERANCE
  assert janus.distance(conditional, golden["paint/logits_cond"]) < TOLERANCE
  assert janus.distance(unconditional, golden["paint/logits_uncond"]) < TOLERANCE
  guided = sampler.guide(conditional, unconditional, 5.0)
  assert janus.distance(guided, golden["paint/logits_guided"]) < TOLERANCE
  assert janus.distance(objective.cross_entropy(conditional, codes), golden["paint/cross_entropy"]) < TOLERANCE


def test_loss_and_gradients_are_the_published_ones():
  """Of packed rows, through the layout, the packing and the step's own loss."""
  golden = janus.golden()
  prompt, codes = golden["paint/prompt_ids"][:-1], golden["paint/codes"]
  batch = tiny.batch([written(prompt, codes=codes[0])], [written(prompt, codes=codes[1])], shape=SHAPE)

  def loss(params):
    return janus.model().apply({"params": params}, batch, None, ("codes",), method="losses")["codes"] / 2

  value, gradient = jax.jit(jax.value_and_grad(loss))(janus.params())
  assert float(value) == pytest.approx(float(golden["train/image_loss"]), rel=TOLERANCE)
  parts = {
    "gen_embed": "generation_embed",
    "gen_aligner": "generation_projector",
    "gen_head": "generation_head",
    "language_model": "language_model",
  }
  norm = lambda tree: float(np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree))))
  for theirs, ours in parts.items():
    want = float(golden[f"train/image_grad_norm/{theirs}"])
    assert norm(gradient[ours]) == pytest.approx(want, rel=1e-4), theirs
  assert norm({part: x for part, x in gradient.items() if part not in parts.values()}) == 0.0


def prompts(*rows):
  """Prompts without BOI, padded on the right with an id that is no pad."""
  tokens = np.full((len(rows), 16), 7, np.int32)
  for row, ids in zip(tokens, rows):
    row[: len(ids)] = ids
  return tokens, np.asarray([len(ids) for ids in rows], np.int32)


@functools.cache
def drawer():
  return CodesSampler(*janus.inference(), janus.Ids)


def test_greedy_codes_of_prompts_of_two_lengths_are_the_published_ones_of_each_alone():
  golden = janus.golden()
  long, short = golden["paint/greedy_prompt_ids"][:-1], golden["paint/short_greedy_prompt_ids"][:-1]
  assert len(long) != len(short)
  told = []
  codes = drawer().write(
    *prompts(long, short), drawer().start([1, 2]), Settings(temperature=0), lambda *x: told.append(x)
  )
  np.testing.assert_array_equal(codes, np.stack([golden["paint/greedy_codes"], golden["paint/short_greedy_codes"]]))
  assert told[-1] == (P, P) and len(told) == 10
  pixels = drawer().sample(*prompts(long), drawer().start([1]), Settings(temperature=0))
  assert janus.distance(pixels.transpose(0, 3, 1, 2), golden["paint/image"]) < 2e-5
  uint8 = ((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)
  assert np.abs(uint8.astype(int) - golden["paint/image_uint8"]).max() <= 1


# --- layout ----------------------------------------------------------------------------------------------------


def written(prompt, seed=0, drop=False, codes=None):
  """A sample of a prompt without BOI and an image, whose codes have nothing to do with its pixels."""
  made = CodesLayout().sequence(np.asarray(prompt, np.int32), drop, janus.Ids, P)
  rng = np.random.default_rng(seed)
  pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
  codes = rng.integers(0, janus.CONFIG.autoencoder.codebook_size, P) if codes is None else codes
  n = len(made.tokens)
  targets, nothing = np.append(made.tokens[1:], 0).astype(np.int32), np.zeros(n, bool)
  return Sample(
    made.tokens, targets, nothing, made.positions, (made.image_start,), (WRITE,), (pixels,), (codes.astype(np.uint16),)
  )


def read(seed=0):
  """BOS BOI image*P EOI and an answer."""
  rng = np.random.default_rng(seed)
  ids = janus.Ids
  tokens = np.asarray(
    [ids.bos, ids.image_start] + [ids.image] * P + [ids.image_end, *rng.integers(0, 200, 5)], np.int32
  )
  n = len(tokens)
  learned = np.arange(n) >= n - 5
  pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
  targets = np.append(tokens[1:], 0).astype(np.int32)
  return Sample(tokens, targets, learned, np.arange(n, dtype=np.int32), (1,), (READ,), (pixels,))


def test_a_dropped_prompt_is_as_many_pads_which_are_seen():
  prompt = np.asarray([janus.Ids.bos, 5, 6, 7], np.int32)
  kept, dropped = (CodesLayout().sequence(prompt, drop, janus.Ids, P) for drop in (False, True))
  pad, begin, image = janus.Ids.pad, janus.Ids.image_start, janus.Ids.image
  assert kept.tokens.tolist() == [*prompt, begin] + [image] * P
  assert dropped.tokens.tolist() == [prompt[0], pad, pad, pad, begin] + [image] * P
  for made in (kept, dropped):
    assert made.positions.tolist() == list(range(5 + P)) and made.image_start == 5
  # The second half of guidance reads the same: what training drops is what sampling calls unconditional.
  batch = tiny.batch([written(prompt, drop=True)], [written([prompt[0], pad, pad, pad])], shape=SHAPE)
  one, two = (losses(jax.tree.map(lambda x, i=i: x[i : i + 1], batch)) for i in range(2))
  assert one["codes"] == two["codes"] > 0


# --- laws of the loss ------------------------------------------------------------------------------------------


@jax.jit
def loss_sums(params, batch):
  return janus.model().apply({"params": params}, batch, None, ("text", "codes"), method="losses")


def losses(batch):
  return {name: float(value) for name, value in loss_sums(janus.params(), batch).items()}


def test_no_code_sees_itself_or_a_later_one():
  """The gradient of a code's logits at the slots of the codes."""
  model, params = janus.model(), janus.params()
  codes, prompt = janus.golden()["paint/codes"][:1], jnp.asarray(janus.golden()["paint/prompt_ids"])

  def logits(slots):
    bound = model.bind({"params": params})
    x = jnp.concatenate([bound.embed(prompt[None]), slots], axis=1)
    positions = jnp.arange(x.shape[1])[None]
    hidden = bound.backbone(x, positions, jnp.ones_like(positions)).hidden[:, len(prompt) - 1 : -1]
    return jnp.sum(jnp.square(bound.writer.logits(hidden)), axis=-1)[0]

  slots = model.bind({"params": params}).writer.slots(codes)
  seen = np.abs(jax.jit(jax.jacrev(logits))(slots)[:, 0]).max(-1)  # [predicted, at]
  assert (seen[np.triu_indices(P)] == 0).all() and (seen[np.tril_indices(P, -1)] > 0).all()


def test_packed_samples_cost_what_they_cost_alone():
  samples = [read(1), written([251, 4, 9], 2), written([251, 8], 3, drop=True)]
  packed = losses(tiny.batch(samples, shape=SHAPE))
  alone = [losses(tiny.batch([sample], shape=SHAPE)) for sample in samples]
  assert [row["text"] > 0 for row in alone] == [True, False, False]
  assert [row["codes"] > 0 for row in alone] == [False, True, True]
  for name, value in packed.items():
    assert value == pytest.approx(sum(row[name] for row in alone), rel=2e-5)


def test_codes_that_are_stored_cost_what_those_of_the_pixels_do():
  batch = tiny.batch([written([251, 4, 9], 2), read(1)], shape=SHAPE)
  encode = jax.jit(lambda p, x: janus.model().bind({"params": p}).writer.encode(x))
  codes = batch.stored.copy()
  codes[0, 0] = encode(janus.params(), batch.images[0, :1] / 127.5 - 1.0)[0]
  by_pixels = losses(batch._replace(stored=np.zeros((1, SHAPE.images, 0), np.uint16)))
  assert by_pixels == pytest.approx(losses(batch._replace(stored=codes)), rel=1e-6)  # two programs


def test_the_token_before_a_read_image_keeps_its_embedding_and_learns():
  """Janus has no start vector: the gradient of an answer reaches the embedding of BOI."""
  batch = tiny.batch([read(1)], shape=SHAPE)
  text = lambda p: janus.model().apply({"params": p}, batch, None, ("text",), method="losses")["text"]
  gradient = jax.jit(jax.grad(text))(janus.params())["language_model"]["embed"]
  assert np.abs(gradient[janus.Ids.image_start]).max() > 0 and np.abs(gradient[janus.Ids.image]).max() == 0
  assert "understanding_start" not in janus.params()


# --- laws of sampling ------------------------------------------------------------------------------------------

ROWS = ([251, 3, 5, 8, 2], [251, 7], [251, 4, 4, 4, 4, 4, 4, 9])


def drawn(rows, seeds, **given):
  return np.asarray(drawer().write(*prompts(*rows), drawer().start(seeds), Settings(**given)))


def test_a_batch_equals_one_by_one():
  together = drawn(ROWS, [5, 6, 5])
  for i, row in enumerate(ROWS):
    np.testing.assert_array_equal(drawn([row], [[5, 6, 5][i]])[0], together[i])
  assert (drawn([ROWS[0]], [6])[0] != together[0]).any()


def test_what_attention_covers_and_how_matrices_lie_change_no_code(monkeypatch):
  """Attention covers a quarter of the codes, then a half ...; matrices lie as a GPU reads them."""
  want = drawn(ROWS, [5, 6, 5])
  monkeypatch.setattr(sampler, "_LONG", 1)
  monkeypatch.setattr(sampler, "MANY_ROWS", 1)
  model, params = for_inference(janus.model(), janus.params(), gpu=True)
  assert "transposed_kernel" in params["generation_head"]["output"]
  for one in (drawer(), CodesSampler(model, params, janus.Ids)):
    np.testing.assert_array_equal(one.write(*prompts(*ROWS), one.start([5, 6, 5]), Settings()), want)


def test_cached_equals_uncached():
  """Each code is the draw from the teacher-forced logits of the codes before it."""
  for row, guidance in ((ROWS[0], 5.0), (ROWS[1], 1.0), (ROWS[1], 0.0)):
    codes = drawn([row], [9], guidance=guidance, temperature=0.7)
    prompt = np.asarray([*row, janus.Ids.image_start], np.int32)
    conditional, unconditional = (np.asarray(forced(p, codes)[1], np.float64) for p in (prompt, twin(prompt)))
    logits = guidance * conditional + (1 - guidance) * unconditional
    for k in range(P):
      key = jax.random.fold_in(jax.random.key(9), k)
      noisy = logits[0, k] / 0.7 + np.asarray(jax.random.gumbel(key, logits[0, k].shape, jnp.float32))
      best = np.sort(noisy)[-2:]
      assert codes[0, k] == noisy.argmax() or best[1] - best[0] < 1e-3, (guidance, k)


def test_a_guidance_of_one_is_none_and_of_zero_ignores_the_prompt():
  one = drawn([ROWS[0]], [3], guidance=1.0)
  np.testing.assert_array_equal(one, drawn([ROWS[0]], [3], guidance=1.0 + 1e-7))
  other = [251, 100, 120, 140, 160]
  np.testing.assert_array_equal(drawn([ROWS[0]], [3], guidance=0), drawn([other], [3], guidance=0))
  assert (drawn([ROWS[0]], [3], guidance=0) != one).any()


def test_release_rounds_the_logits_to_bfloat16():
  """Greedy codes of rounded logits are the argmax of guidance in bfloat16; where that decides, exact ones are not."""
  row, weight = next(row for row in ROWS if len(row) == 5), 8.0
  prompt = np.asarray([*row, janus.Ids.image_start], np.int32)
  greedy = lambda precision: drawn([row], [1], temperature=0, guidance=weight, precision=precision)
  release, exact = greedy("release"), greedy("exact")
  rounded = [forced(p, release)[1].astype(jnp.bfloat16) for p in (prompt, twin(prompt))]
  best = np.asarray(sampler.guide(*rounded, jnp.bfloat16(weight)), np.float32)[0].argmax(-1)
  np.testing.assert_array_equal(release[0], best)
  first = int(np.argmax(release[0] != exact[0]))  # from there on the two go on behind different codes
  assert release[0, first] != exact[0, first]
  whole = [forced(p, exact)[1] for p in (prompt, twin(prompt))]
  assert np.asarray(sampler.guide(*whole, weight))[0, first].argmax() == exact[0, first]


def test_prepare_compiles_what_sampling_runs():
  tokens, lengths = prompts(*ROWS[:2])
  given = Settings(guidance=3.0, temperature=0.5)
  fresh = CodesSampler(janus.inference()[0].clone(), janus.inference()[1], janus.Ids)
  assert fresh.prepare(2, tokens.shape[1], given)
  before = len(sampler.read_prompts), len(sampler.draw), len(sampler.decode)
  fresh.sample(tokens, lengths, fresh.start([1, 2]), given)
  assert (len(sampler.read_prompts), len(sampler.draw), len(sampler.decode)) == before
  assert fresh.prepare(2, tokens.shape[1], given, compile=False)
  assert not fresh.prepare(3, tokens.shape[1], given, compile=False)


def test_a_round_trip_is_that_of_the_tokenizer():
  pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
  trip = jax.jit(lambda p, x: janus.model().bind({"params": p}).writer.vq(x))
  want = trip(janus.params(), pixels / 127.5 - 1.0)
  np.testing.assert_allclose(drawer().round_trip(pixels), want, atol=1e-4)


def test_a_model_in_bfloat16_does_not_round_its_logits():
  """Guidance multiplies differences of logits: only their factors are bfloat16, forward and in the gradient."""
  head = Head(48, 96, jnp.bfloat16)
  hidden = jax.random.normal(jax.random.key(0), (7, 32))
  params = unbox(head.init(jax.random.key(1), hidden))["params"]

  def logits(params):
    return head.apply({"params": params}, hidden)

  made, (_, back) = logits(params), jax.vjp(logits, params)
  products = jnp.dot(hidden.astype(jnp.bfloat16), params["hidden"]["kernel"].astype(jnp.bfloat16))
  inside = gelu(products, "erf")
  factors = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (inside, params["output"]["kernel"])]
  want = factors[0] @ factors[1]
  assert made.dtype == jnp.float32 and (made != made.astype(jnp.bfloat16)).any()
  np.testing.assert_allclose(made, want, atol=1e-5)
  ones = jnp.ones_like(made)
  got = back(ones)[0]["output"]["kernel"]
  np.testing.assert_allclose(got, factors[0].T @ ones, rtol=2**-7, atol=1e-2)


# --- sizes -----------------------------------------------------------------------------------------------------


def test_flops_of_a_picture_are_those_of_the_sources():
  """JANUS.md, section 14: 3.2 T in LLM and head for both halves behind 40 tokens, 0.57 T in the decoder."""
  config = ModelConfig.from_dict(models.janus_1b())
  decoder = config.autoencoder.decoder_flops(config.latent_size)
  both, one = (flops.image(config, Settings(guidance=w), 40) - decoder for w in (5.0, 1.0))
  assert both == pytest.approx(3.2e12, rel=0.02) and one == pytest.approx(both / 2, rel=0.01)


def test_flops_of_a_step_follow_what_is_trained():
  """Of one written image at janus_tiny's sizes; a frozen head passes gradients on, a frozen table ends them."""
  config = janus.CONFIG
  work = model_flops.Work(tokens=0, pairs=0, loss_tokens=0, read=0, written=1)
  aligner, head = 64 * 8 + 64 * 64, 64 * 64 + 64 * 512
  new = {"generation_embed", "generation_projector", "generation_head"}
  for trained, into, out in ((new, 6, 6), (new - {"generation_projector"}, 4, 6), (set(), 2, 4)):
    made = flops.step(config, trained, work, stored=False)
    assert made["heads"] == (into * aligner + out * head) * P
    assert made["vq"] == config.autoencoder.encoder_flops(64)
    assert flops.step(config, trained, work, stored=True) == made | {"vq": 0.0}


def test_a_fresh_table_is_the_codebook_at_length_one():
  rows = derived(janus.CONFIG, {"vq/codebook": janus.params()["vq"]["codebook"]})["generation_embed/embed"]
  np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), 1.0, rtol=1e-6)
  np.testing.assert_allclose(
    rows[7] * np.linalg.norm(janus.params()["vq"]["codebook"][7]), janus.params()["vq"]["codebook"][7], rtol=1e-5
  )


# --- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "family, field, value",
  [
    (FAMILY, "steps", 30),
    (FAMILY, "solver", "heun"),
    (FAMILY, "guidance", 0.5),
    (FAMILY, "guidance", float("nan")),
    (FAMILY, "temperature", -1),
    (FAMILY, "temperature", "hot"),
    (FAMILY, "precision", "half"),
    (FLOW, "temperature", 1.0),
  ],
)
def test_a_setting_of_the_other_way_or_out_of_range_is_refused(family, field, value):
  with refused(field):
    settings(family, {field: value})


def test_noise_is_refused():
  with refused("noise"):
    drawer().given(np.zeros((1, 4, 8, 8)), 1)


def changed(section, **values):
  made = copy.deepcopy(janus.DICT)
  made[section] = made[section] | values if values else None
  return made


@pytest.mark.parametrize(
  "values, named",
  [
    (changed("autoencoder"), "model.autoencoder"),
    (janus.DICT | {"autoencoder": tiny.DICT["autoencoder"]}, "model.autoencoder.kind='patch_pca'"),
    (tiny.DICT | {"autoencoder": janus.DICT["autoencoder"]}, "model.autoencoder.kind='vq'"),
    (changed("understanding_encoder", patch_size=8), "64 patches"),
    (changed("generation", projector_layers=0), "model.generation.projector_layers"),
    (changed("reader", layers=0), "model.reader.layers"),
    (changed("reader", start="vector"), "model.reader.start='vector'"),
    (changed("reader", kind="shared"), "model.reader.kind='shared'"),
  ],
)
def test_a_model_that_does_not_fit_names_the_field(values, named):
  with refused(named):
    ModelConfig.from_dict(values)


def test_paths_are_those_of_the_published_parts():
  parts = {path[0] for path in flatten_dict(janus.params())}
  assert parts == {
    "language_model",
    "understanding_encoder",
    "understanding_projector",
    "generation_embed",
    "generation_projector",
    "generation_head",
    "vq",
  }
