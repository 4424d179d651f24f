"""The start of Janus from the parts of a JanusFlow: a VQ from elsewhere, never a random one, and the words of its
turns."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from refusals import refused

from configs.janus import recipe
from jflow import sharding
from jflow.interop import native
from jflow.models.config import ModelConfig
from jflow.training import config_files, fresh, setup, start_model

TAKEN = ("language_model", "understanding_encoder")
NEW = ("understanding_projector", "generation_projector", "generation_head")


def saved(folder, model: ModelConfig, template: str = "plain", add: float = 0.0) -> str:
  params = jax.tree.map(lambda x: np.asarray(x) + np.float32(add), tiny.params(model))
  native.save_params(folder, params, {"model": model.to_dict(), "data": {"template": template}}, None)
  return str(folder)


def start(model: ModelConfig = tiny.JANUS, template: str = "plain", **train) -> dict[str, np.ndarray]:
  make = tiny.janus if model.generation.kind == "codes" else tiny.configuration
  config = make(train=train, data=dict(template=template)).replace(model=model)
  params = setup.start_params(config, tiny.model(model), sharding.make_mesh(1, 1, 1), lambda: None)
  return flatten_dict(jax.tree.map(np.asarray, params), sep="/")


FROM_PARTS = dict(init_dropped=recipe.JANUSFLOW, init_fresh=recipe.NEW_PARTS)


def test_the_first_stage_names_what_the_two_ways_do_not_share():
  """From the parts, whatever their heads; a later stage starts from the whole of the one before."""
  config = config_files.load("janus/stage1:tiny").train
  flow, codes = (set(tiny.shapes(model)) for model in (tiny.CONFIG, tiny.JANUS))
  assert flow - codes <= set(config.init_dropped) <= flow and not set(config.init_dropped) & set(TAKEN)
  assert codes - flow - {"vq"} <= set(config.init_fresh) <= codes - {"vq", *TAKEN}
  assert not any(config_files.load(f"janus/stage{n}:tiny").train.init_fresh for n in (2, 3))


def test_each_part_starts_where_it_is_said_to(tmp_path, capsys):
  parts, other = saved(tmp_path / "parts", tiny.CONFIG), saved(tmp_path / "janus", tiny.JANUS, add=1.0)
  got = start(init_from=parts, init_parts=(("vq", other),), **FROM_PARTS)
  flow, codes = (flatten_dict(tiny.params(model), sep="/") for model in (tiny.CONFIG, tiny.JANUS))
  assert got.keys() == codes.keys()
  for path, x in got.items():
    if path.startswith(TAKEN):
      np.testing.assert_array_equal(x, flow[path], err_msg=path)
    elif path.startswith("vq/"):
      np.testing.assert_array_equal(x, codes[path] + np.float32(1), err_msg=path)
  assert all(any(path.startswith(part) for path in got) for part in NEW)
  assert "compute something else" not in capsys.readouterr().err  # no weight of another reader or writer is taken


@pytest.mark.parametrize("new", [(), ("vq",)])
def test_a_tokenizer_that_nothing_brings_is_refused(tmp_path, new):
  parts = saved(tmp_path / "parts", tiny.CONFIG)
  with refused("vq", "init_parts", "optimizer.frozen"):
    start(init_from=parts, init_dropped=recipe.JANUSFLOW, init_fresh=recipe.NEW_PARTS + new)


@pytest.mark.parametrize("size, random", [(16, True), (256, False)])
def test_a_published_size_never_writes_by_random_codes(size, random):
  """16 codes each: only a model below the smallest published size may have a tokenizer of no use."""
  vision = dataclasses.replace(tiny.JANUS.understanding_encoder, image_size=size, patch_size=size // 4)
  levels = (1,) * (size // 4).bit_length()
  codec = dataclasses.replace(tiny.JANUS.autoencoder, multipliers=levels)
  model = dataclasses.replace(tiny.JANUS, understanding_encoder=vision, autoencoder=codec)
  if random:
    assert np.std(start(model)["vq/codebook"]) > 0
    return
  with refused("vq", "init_from"):
    start(model)


def test_a_fitted_autoencoder_is_none_of_chance(monkeypatch):
  """At any size: the check goes by what `fresh.fit` returns."""
  monkeypatch.setattr(setup, "_PUBLISHED", tiny.JANUS.image_size)
  fitted = jax.tree.map(np.asarray, tiny.params(tiny.JANUS)["vq"])
  with refused("vq"):
    start()
  monkeypatch.setattr(fresh, "fit", lambda *_: {"vq": fitted})
  np.testing.assert_array_equal(start()["vq/codebook"], fitted["codebook"])


def test_sizes_of_the_tokenizer_are_those_of_its_own_checkpoint(tmp_path):
  """Also where the other parts come from a model that writes in another way."""
  parts, other = saved(tmp_path / "parts", tiny.CONFIG), saved(tmp_path / "janus", tiny.JANUS)
  flags = [f"--config.train.init_from={parts}", f"--config.train.init_parts=(('vq','{other}'),)"]
  begin = lambda config, given: start_model.sections_of(config, given, tmp_path / "run")
  model = config_files.load("janus/stage1:tiny", flags, begin).model
  assert model.autoencoder == tiny.JANUS.autoencoder and model.language_model.embed_dim == 32
  assert model.generation.kind == "codes" and model.reader == tiny.JANUS.reader


@pytest.mark.parametrize("model", [tiny.CONFIG, tiny.JANUS], ids=["flow", "codes"])
@pytest.mark.parametrize(
  "theirs, ours, fits",
  [
    ("pro", "chat", False),
    ("chat", "pro", False),
    ("pro", "pro", True),
    ("plain", "chat", True),
    ("pro", "plain", True),
  ],
)
def test_the_role_words_are_those_that_the_model_knows(tmp_path, model, theirs, ours, fits):
  source = saved(tmp_path / "source", model, theirs)
  if fits:
    start(model, ours, init_from=source)
    return
  with refused("data.template", repr(theirs), repr(ours), source):
    start(model, ours, init_from=source)
