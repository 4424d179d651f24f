"""The ablations of table 6: the papers' counts of steps, what each reads with, one step of each."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from refusals import refused

from configs import ablation
from jflow.__main__ import main
from jflow.data.tokenizer import Tokenizer
from jflow.inference.pipeline import Pipeline
from jflow.interop.janusflow import config_to_official
from jflow.models import build
from jflow.models.config import JANUSFLOW_READER, ModelConfig
from jflow.training import config_files, optim, setup

READERS = {reader: ModelConfig.from_dict(tiny.DICT | {"reader": reader}) for reader in ("shared", "separate")}


def rows(config) -> np.ndarray:
  """Rows in 100 of read, painted, text over the whole run."""
  mixture, steps = config.data.mixture, config.train.steps
  ends = [start for start, _ in mixture[1:]] + [steps]
  return sum((end - start) * np.array(shares) / sum(shares) for (start, shares), end in zip(mixture, ends))


def test_the_papers_counts_of_steps_are_the_shares_of_the_unified_run():
  whole = ablation.get_config("F-256")
  assert whole.train.steps == 50_000
  assert ablation.get_config("D-256").train.steps == 13_000
  assert ablation.get_config("E-256").train.steps == 37_000
  unified = rows(whole)
  np.testing.assert_allclose(rows(ablation.get_config("D-256")), unified * (1, 0, 1))
  np.testing.assert_allclose(rows(ablation.get_config("E-256")), unified * (0, 1, 0))


@pytest.mark.parametrize("size", ["F", "G-tiny", "F-huge", "F-mid", "F-tiny-x", "F-tiny-0", "tiny", ""])
def test_other_sizes_are_refused(size):
  with pytest.raises(ValueError):
    ablation.get_config(size)


@pytest.mark.parametrize("size", ["tiny", "shapes", "256"])
@pytest.mark.parametrize("letter", ablation.LETTERS)
def test_every_parameter_of_every_ablation_is_trained_or_frozen(letter, size):
  file = tiny.ROOT / "configs" / "ablation.py"
  config = config_files.load(f"{file}:{letter}-{size}", [f"--config.data.tokenizer={tiny.TOKENIZER}"])
  setup.check(config)
  model = tiny.model(config.model)
  shapes = jax.eval_shape(lambda: build.initial_params(model, 0))
  trained, frozen = optim.partition(
    setup.sharding.unbox(shapes),
    config.optimizer.trained,
    config.optimizer.frozen,
  )
  optim.check_muon(setup.sharding.unbox(shapes), config.optimizer.muon)
  axes = optim.muon_axes(setup.sharding.unbox(shapes), config.optimizer.muon)
  assert letter != "C" or axes["latent_encoder"] == axes["generation_encoder"]
  assert set(frozen) == {"understanding_encoder", "vae"}
  assert ("alignment_head" in trained) == (letter not in "AD")
  assert ("understanding_projector" in trained) == (letter not in "BC")
  assert ("latent_encoder" in trained) == (letter == "C")


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_of_latents_sees_the_picture_by_its_own_encoder_alone(reader):
  """Slots change with the picture; SigLIP's parameters, and painting's where they are separate, do not matter."""
  config = READERS[reader]
  model, params = tiny.model(config), tiny.params(config)
  read = jax.jit(lambda p, x: model.apply({"params": p}, x, method="read"))
  pixels = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)
  slots = read(params, pixels)
  assert slots.shape == (2, 1 + config.patches, config.language_model.embed_dim)
  assert np.abs(slots[0, 1:] - slots[1, 1:]).max() > 0.1 and np.all(slots[:, 0] == slots[0, 0])
  used = jax.grad(lambda p: jnp.sum(jnp.square(read(p, pixels))))(params)
  used = {path[0] for path, g in flatten_dict(used).items() if np.abs(g).max() > 0}
  own = {
    "shared": {"generation_encoder", "generation_projector"},
    "separate": {"latent_encoder", "latent_projector"},
  }
  assert used == own[reader] | {"vae", "understanding_start"}


def test_separate_encoders_are_equal_at_the_start_alone():
  model = tiny.model(READERS["separate"])
  program, shapes = jax.make_jaxpr(lambda: build.initial_params(model, 0), return_shape=True)()
  made = jax.tree.unflatten(jax.tree.structure(shapes), program.jaxpr.outvars)
  first, second, other = (
    jax.tree.leaves(made[part]) for part in ("latent_encoder", "generation_encoder", "generation_decoder")
  )
  assert len(first) > 10 and all(a is b for a, b in zip(first, second, strict=True))
  assert not {id(x) for x in first} & {id(x) for x in other}


@pytest.mark.parametrize("reader", READERS)
def test_training_and_answering_read_alike(reader):
  """The loss of an answer in training is its likelihood in inference."""
  config = READERS[reader]
  model, params = tiny.model(config), tiny.params(config)
  sample = tiny.reading(3)
  batch, draws = tiny.batch([sample]), tiny.draws(1)
  loss = float(tiny.loss_sums(model, params, batch, draws, ("text",))["text"])
  slots = model.apply({"params": params}, jnp.asarray(sample.images[0][None], jnp.float32) / 127.5 - 1, method="read")
  n = len(sample.tokens)
  index = np.full((1, n), -1, np.int32)
  start = sample.image_starts[0]
  index[0, start : start + slots.shape[1]] = np.arange(slots.shape[1])
  x = model.apply({"params": params}, sample.tokens[None], slots, index, method="assemble")
  out = model.apply({"params": params}, x, sample.positions[None], np.ones((1, n), np.int32), method="backbone")
  logits = model.apply({"params": params}, out.hidden, method="logits")[0]
  nll = -jax.nn.log_softmax(logits)[np.arange(n), sample.targets]
  assert loss == pytest.approx(float(nll[sample.loss_mask].sum()), rel=1e-5)


def test_a_checkpoint_older_than_the_field_reads_with_siglip():
  older = {name: section for name, section in tiny.DICT.items() if name != "reader"}
  assert ModelConfig.from_dict(older) == tiny.CONFIG and tiny.CONFIG.reader == JANUSFLOW_READER


def test_a_reader_without_siglip_has_no_published_layout_and_no_stored_latents():
  with refused("model.reader.kind='shared'"):
    config_to_official(READERS["shared"], "float32")
  config = tiny.configuration(data=dict(stored=True)).replace(model=READERS["shared"])
  with refused("data.stored"):
    setup.check(config)


def test_an_unknown_reader_is_named():
  with refused("model.reader.kind='clip'"):
    ModelConfig.from_dict(tiny.DICT | {"reader": "clip"})


def test_reading_alone_trains_with_the_command(tmp_path):
  """D paints nothing: no loss may be divided by its count of zero."""
  config = f"--config={tiny.ROOT / 'configs' / 'ablation.py'}:D-tiny"
  fields = ["--config.train.steps=2", "--config.train.batch_size=4", "--config.compute.compilation_cache="]
  fields += [f"--config.model.generation.{part}_blocks=1" for part in ("encoder", "decoder")]  # to compile
  assert main(["train", config, f"--workdir={tmp_path / 'run'}", *fields]) == 0
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [1, 2]
  assert all(line["loss"] is not None and line["loss_flow"] in (None, 0.0) for line in lines)


def test_a_model_that_reads_latents_answers():
  config = READERS["shared"]
  pipeline = Pipeline(tiny.model(config), tiny.params(config), Tokenizer.load(str(tiny.TOKENIZER)), "plain")
  image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
  assert isinstance(pipeline.understand("What is it?", [image], max_tokens=3), str)
