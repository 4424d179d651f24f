"""Laws of preferences: likelihoods are the losses of training, a pair begins undecided, and the better picture
gains."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from refusals import refused
from scipy import special

from jflow.data.tokenizer import Tokenizer
from jflow.generation.flow.writer import Draws
from jflow.models.unified import normalise
from jflow.rl import dpo, pairs, run
from jflow.rl.prompts import Asked
from jflow.training import optim, setup
from jflow.training.state import TrainState

PAIRS = 4


def configuration(**rl):
  return tiny.configuration(
    train=dict(batch_size=PAIRS, ema=0.0, accumulation=2),
    optimizer=dict(
      trained=("language_model", "generation_.*"),
      frozen=("understanding_.*", "vae", "alignment_head"),
      learning_rate=3e-3,
      warmup_steps=1,
    ),
    rl=dict(
      method="dpo",
      pairs="shapes",
      beta=20.0,
      explore=dict(steps=3, noise=0.7, window=0, guidance=1.0, normalised=0),
    )
    | rl,
  )


def test_the_loss_is_that_of_bradley_and_terry():
  better, worse = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
  found = dpo.objective(jnp.asarray(better), jnp.asarray(worse), 3.0, 6)
  assert float(found.loss) == pytest.approx(-np.log(special.expit(3 * (better - worse))).mean(), rel=1e-5)
  assert float(found.preferred) == pytest.approx(np.mean(better > worse))
  assert float(dpo.objective(jnp.zeros(2), jnp.zeros(2), 3.0, 2).loss) == pytest.approx(np.log(2))


def test_the_likelihood_of_a_picture_is_minus_half_its_flow_loss():
  """Of a posterior without deviation, on packed rows of training with the same times and noise."""
  policy = run.make_policy(configuration(), tiny.model(), None)
  samples = [tiny.writing(seed, 5) for seed in range(PAIRS)]
  batch, (time, noise) = tiny.batch(*([one] for one in samples)), policy.draw(jax.random.key(0), PAIRS)
  wide = lambda x: jnp.zeros((PAIRS, tiny.SHAPE.images, *x.shape[1:])).at[:, 0].set(x)
  draws = Draws(wide(time), wide(noise), jnp.zeros_like(wide(noise)))
  want = float(tiny.loss_sums(tiny.model(), tiny.params(), batch, draws, ("flow",))["flow"])
  tokens = np.stack([one.tokens[:6] for one in samples])
  pixels = normalise(np.stack([one.images[0] for one in samples]))
  got = jax.jit(policy.likelihood)(tiny.params(), tokens, np.full(PAIRS, 6, np.int32), pixels, (time, noise))
  assert -2 * float(jnp.sum(got)) == pytest.approx(want, rel=1e-5)


@functools.cache
def compared():
  rng, size = np.random.default_rng(0), tiny.CONFIG.image_size
  tokens = rng.integers(10, tiny.VOCABULARY, (PAIRS, 8)).astype(np.int32)
  noise = rng.integers(0, 60, (2, PAIRS, size, size, 3), np.uint8)
  return pairs.Compared(
    Asked(tokens, np.full(PAIRS, 8, np.int32), np.arange(PAIRS, dtype=np.int32)), 195 + noise[0], noise[1]
  )


def test_a_pair_begins_undecided_and_the_better_picture_gains():
  config = configuration()
  policy, optimizer = run.make_policy(config, tiny.model(), None), optim.make_optimizer(config.optimizer)
  parts = optim.partition(tiny.params(), config.optimizer.trained, config.optimizer.frozen)
  state, rows = TrainState.create(*parts, optimizer, referred=True), []
  update = jax.jit(run.make_preference(config, policy, optimizer))
  for _ in range(10):
    state, metrics = update(state, compared())
    rows.append({name: float(x) for name, x in metrics.items()})
  assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and rows[0]["margin"] == 0
  assert rows[-1]["preferred"] == 1 and rows[-1]["loss"] < 0.5 < rows[0]["loss"]
  jax.tree.map(np.testing.assert_array_equal, state.reference, parts[0])


@pytest.mark.parametrize(
  "row",
  [{}, {"better": "a.png"}, {"better": "a.png", "worse": "gone.png"}, {"better": "a.png", "worse": 3}]
  + [{"better": "a.png", "worse": "../a.png"}],
)
def test_a_pair_without_its_pictures_is_refused(tmp_path, row):
  folder = tmp_path / "pairs"
  folder.mkdir()
  painted(folder / "a.png", 0)
  painted(tmp_path / "a.png", 0)
  (folder / pairs.FILE).write_text(json.dumps({"prompt": "a dog"} | row) + "\n")
  with refused("rl.pairs", folder / pairs.FILE):
    pairs.read(str(folder), {})


def painted(file, seed):
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)).save(file)


def folder_of_pairs(folder, *seeds):
  folder.mkdir()
  for name, seed in zip(("a.png", "b.png"), seeds):
    painted(folder / name, seed)
  row = {"prompt": "a dog", "better": "a.png", "worse": "b.png"}
  (folder / pairs.FILE).write_text(json.dumps(row) + "\n")
  return folder


def test_a_picture_that_is_cut_is_named_before_the_run(tmp_path):
  file = folder_of_pairs(tmp_path / "pairs", 0, 1) / "b.png"
  file.write_bytes(file.read_bytes()[:200])
  with refused("rl.pairs", file):
    pairs.read(str(file.parent), {})


def test_pairs_are_known_by_their_pictures_wherever_they_lie(tmp_path):
  config, tokenizer = configuration(), Tokenizer.load(str(tiny.TOKENIZER))
  folders = [folder_of_pairs(tmp_path / name, 0, seed) for name, seed in (("here", 1), ("there", 1), ("other", 2))]
  opened = [pairs.Pairs(config, pairs.read(str(folder), {}), tokenizer, range(PAIRS)) for folder in folders]
  here, there, other = (data.identity()["prompts"][0]["fingerprint"] for data in opened)
  assert here == there != other


@pytest.mark.parametrize(
  "section, values, named",
  [
    ("rl", dict(pairs=""), "rl.pairs"),
    ("rl", dict(kl=0.5), "rl.kl"),
    ("rl", dict(updates=2), "rl.updates"),
    ("rl", dict(clip=5.0), "rl.clip"),
    ("rl", dict(group=4), "rl.group"),
    ("rl", dict(advantage="mean"), "rl.advantage"),
    ("rl", dict(timeout=1.0), "rl.timeout"),
    ("data", dict(crop="pad"), "data.crop"),
    ("data", dict(stored=True), "data.stored"),
    ("objective", dict(logged=("flow",)), "objective.logged"),
  ],
)
def test_what_a_run_of_pairs_does_not_compute_is_refused(section, values, named):
  with refused(named):
    setup.check(configuration().replace(**{section: values}))


def test_the_worlds_pairs_are_of_one_kind_and_differ():
  shapes = vars(configuration().data.shapes) | {"tags": {"colors": 1.0}}
  found = pairs.read("shapes", shapes)
  assert all(about["better"] != about["worse"] for _, about in found) and len({text for text, _ in found}) > 20
