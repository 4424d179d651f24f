"""The model of a run with `train.init_from`: sizes of the checkpoint, choices of the config."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest
import tiny
from refusals import refused

from jflow.models.config import ModelConfig
from jflow.training import config_files, start_model

STAGE2 = f"{tiny.ROOT}/configs/stage2.py:tiny"


def written(workdir: pathlib.Path, model: ModelConfig = tiny.CONFIG) -> pathlib.Path:
  """A workdir with the config.json of a model, and no weights."""
  (workdir / "checkpoints").mkdir(parents=True)
  (workdir / "config.json").write_text(json.dumps({"model": model.to_dict(), "data": {"template": "plain"}}))
  return workdir


def loaded(init_from: pathlib.Path, workdir: pathlib.Path, *fields: str, named: str = STAGE2) -> ModelConfig:
  start = lambda config, given: start_model.sections_of(config, given, workdir)
  return config_files.load(named, [f"--config.train.init_from={init_from}", *fields], start).model


def test_sizes_are_those_of_the_checkpoint(tmp_path, capsys):
  source = written(tmp_path / "source")
  model, own = loaded(source, tmp_path / "run"), config_files.load(STAGE2).model
  for section in ("understanding_encoder", "generation", "autoencoder"):
    assert getattr(model, section) == getattr(tiny.CONFIG, section) != getattr(own, section)
  language = dataclasses.replace(tiny.CONFIG.language_model, max_length=own.language_model.max_length)  # the run's
  assert model.language_model == language
  head, theirs, mine = (dict(c.objectives)["alignment"] for c in (model, tiny.CONFIG, own))
  assert (head.hidden_dim, head.layer) == (theirs.hidden_dim, mine.layer)
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and str(source) in said and "embed_dim" not in said
  assert loaded(source, tmp_path / "run") == model
  capsys.readouterr()
  loaded(source, tmp_path / "run", "--config.model.language_model.mlp_dim=40")
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and "mlp_dim=40" in said and "embed_dim" not in said


@pytest.mark.parametrize("ours, theirs", [("tune", tiny.JANUS), ("janus/tune", tiny.CONFIG)])
def test_a_checkpoint_of_the_other_way_to_write_is_refused_first(tmp_path, ours, theirs):
  source = written(tmp_path / "source", theirs)
  with refused("model.generation.kind", repr(theirs.generation.kind), str(source)):
    loaded(source, tmp_path / "run", named=ours)


@pytest.mark.parametrize("context, tokens", [(96, 96), (8192, 4096)])
def test_rows_are_as_long_as_the_context_of_a_checkpoint(tmp_path, context, tokens):
  """At most 4,096; the size of the config is the paper's. What a flag names stays, and a run keeps what it has."""
  language = dataclasses.replace(tiny.CONFIG.language_model, max_length=context)
  source = written(tmp_path / "source", dataclasses.replace(tiny.CONFIG, language_model=language))
  start = lambda config, given: start_model.sections_of(config, given, tmp_path / "run")
  flags = [f"--config.train.init_from={source}"]
  config = config_files.load("tune", flags, start)
  assert (config.data.row_tokens, config.model.language_model.max_length) == (tokens, context)
  assert config.data.row_images == tokens // (tiny.CONFIG.patches + 9)
  assert config_files.load("tune", [*flags, "--config.data.row_tokens=64"], start).data.row_tokens == 64
  assert [(c.row_tokens, c.row_images) for c in (config_files.load(f"tune:{n}").data for n in (384, 256))] == [
    (4096, 7),
    (4096, 14),
  ]


def test_a_checkpoint_of_the_same_sizes_is_not_told(tmp_path, capsys):
  own = config_files.load(STAGE2).model
  assert loaded(written(tmp_path / "source", own), tmp_path / "run") == own
  assert capsys.readouterr().err == ""


def test_fields_of_the_command_line_and_choices_of_the_config_stay(tmp_path):
  source = written(tmp_path / "source", dataclasses.replace(tiny.CONFIG, objectives=()))
  model = loaded(source, tmp_path / "run", "--config.model.language_model.mlp_dim=40")
  assert (model.language_model.mlp_dim, model.language_model.embed_dim) == (40, tiny.CONFIG.language_model.embed_dim)
  assert model.objectives == config_files.load(STAGE2).model.objectives  # a head that starts fresh
  without = f"{tiny.ROOT}/configs/ablation.py:B-tiny"
  assert loaded(source, tmp_path / "run", named=without).reader.kind == "shared"
  trained = written(tmp_path / "trained")
  assert loaded(trained, tmp_path / "run", named=f"{tiny.ROOT}/configs/ablation.py:A-tiny").objectives == ()


@pytest.mark.parametrize(
  "section", ["alignment={'layer': 1, 'hidden_dim': 5}", "={'alignment': {'layer': 1, 'hidden_dim': 5}}"]
)
def test_a_section_of_the_command_line_stays_whole(tmp_path, section):
  dot = "" if section.startswith("=") else "."
  model = loaded(written(tmp_path / "source"), tmp_path / "run", f"--config.model.objectives{dot}{section}")
  assert dataclasses.asdict(model.objective("alignment")) == {"layer": 1, "hidden_dim": 5}


@pytest.mark.parametrize(
  "change, field",
  [
    ("c['language_model']['layers'] = 8", "model.language_model.layers"),
    ("c['generation']['chanels'] = 8", "model.generation.chanels"),
    ("c['generation'] = None", "model.generation"),
    ("del c['autoencoder']", "model.autoencoder"),
    ("c['objectives'] = None", "model.objectives"),
    ("c['objectives'] = {'alignment': 3}", "model.objectives.alignment"),
    ("c.clear()", "model."),
  ],
)
def test_a_fault_of_the_config_does_not_vanish_behind_the_checkpoint(tmp_path, change, field):
  text = f"def get_config():\n  c = stage2.get_config('tiny').to_dict()\n  whole, c = c, c['model']\n  {change}\n"
  (tmp_path / "x.py").write_text(f"from configs import stage2\n\n{text}  return whole\n")
  with refused(field):
    loaded(written(tmp_path / "source"), tmp_path / "run", named=str(tmp_path / "x.py"))


@pytest.mark.parametrize("given", ["generation='x'", "objectives={'alignment': 3}", "objectives.alignment=3"])
def test_a_section_of_the_command_line_is_one(tmp_path, given):
  with refused("model." + given.partition("=")[0]):
    loaded(written(tmp_path / "source"), tmp_path / "run", f"--config.model.{given}")


def test_each_part_has_the_sizes_of_its_own_checkpoint(tmp_path):
  vision = dataclasses.replace(tiny.CONFIG.understanding_encoder, embed_dim=48, gelu="tanh")
  other = written(tmp_path / "other", dataclasses.replace(tiny.CONFIG, understanding_encoder=vision))
  parts = f"--config.train.init_parts=(('understanding_encoder', '{other}'),)"
  model = loaded(written(tmp_path / "source"), tmp_path / "run", parts)
  assert model.understanding_encoder == vision and model.generation == tiny.CONFIG.generation


def test_a_run_that_has_begun_keeps_its_model(tmp_path):
  """Also where the checkpoint it began from is gone, or is another one by now."""
  run = written(tmp_path / "run")
  assert loaded(tmp_path / "gone", run).generation == tiny.CONFIG.generation
  with refused("gone"):
    loaded(tmp_path / "gone", tmp_path / "another")


def test_no_device_is_touched_before_processes_have_met(tmp_path):
  source = written(tmp_path / "source")
  code = f"""
import functools, pathlib
from jflow.training import config_files, start_model
start = lambda config, given: start_model.sections_of(config, given, pathlib.Path("run"))
config_files.load({STAGE2!r}, ["--config.train.init_from={source}"], start)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
  environment = os.environ | {"PYTHONPATH": str(tiny.ROOT), "JAX_PLATFORMS": "cpu"}
  subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def test_a_section_of_the_model_is_that_of_the_checkpoint_of_its_part():
  """Of either way to write: the codes' tokenizer as the VAE."""
  named = (("vq", "tokenizer"), ("understanding_encoder", "siglip"))
  train = tiny.configuration(train=dict(init_from="model", init_parts=named)).train
  sections = ("autoencoder", "understanding_encoder", "generation", "language_model", "reader")
  assert [start_model.origin(train, section) for section in sections] == ["tokenizer", "siglip", *["model"] * 3]
