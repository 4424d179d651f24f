"""How a checkpoint says that it is sampled: from a run's config to all that paints, unless a call says more."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from refusals import refused
from serving import NAME

import jflow
from jflow.__main__ import main
from jflow.evaluation import runner
from jflow.evaluation.benchmarks import mjhq
from jflow.evaluation.settings import Settings
from jflow.generation import flow
from jflow.interop import checkpoints, packed
from jflow.serving import schemas
from jflow.serving.fields import ApiError
from jflow.training import config_files, start_model

OWN = {"guidance": 4.0, "steps": 3}
STAGE2 = f"{tiny.ROOT}/configs/stage2.py:tiny"


@pytest.fixture
def own(tmp_path, tiny_checkpoint) -> pathlib.Path:
  """The tiny model, whose config.json sets how it is sampled."""
  run = tmp_path / "own"
  shutil.copytree(tiny_checkpoint, run)
  sets(run, OWN)
  return run


def sets(run: pathlib.Path, sampling: object) -> None:
  body = json.loads((run / "config.json").read_text())
  (run / "config.json").write_text(json.dumps(body | {"sampling": sampling}))


def test_pictures_are_painted_as_the_checkpoint_says_unless_a_call_says_more(own):
  model, prompt = jflow.load(own), ["a red circle"]
  painted = lambda **given: np.asarray(model.generate(prompt, **given)[0])
  np.testing.assert_array_equal(painted(), painted(**OWN))
  np.testing.assert_array_equal(painted(guidance=None, steps=4), painted(guidance=4.0, steps=4))
  assert (painted() != painted(guidance=1.0)).any()
  assert model.settings() == flow.FAMILY.settings(**OWN) and model.settings(guidance=1.5).guidance == 1.5


def test_it_travels_with_the_weights(own, tmp_path):
  converted, flat = tmp_path / "converted", tmp_path / "packed"
  assert main(["convert", f"--input={own}", f"--output={converted}", "--to=jflow"]) == 0
  flat.mkdir()
  found = checkpoints.describe(own, tokenizer=True)
  params = flatten_dict(found.read_params(), sep="/")
  dtype = np.dtype(np.float32)
  packed.save(flat, found.config, found.template, params, found.tokenizer, found.has_vae, dtype, found.sampling)
  for out in (converted, flat):
    assert checkpoints.sampling_of(out) == checkpoints.describe(out).sampling == OWN


def test_a_published_layout_has_no_place_for_it(own, tmp_path, capsys):
  assert main(["convert", f"--input={own}", f"--output={tmp_path / 'out'}", "--to=official"]) == 0
  assert "left out: the sampling settings of this model (guidance=4.0, steps=3)" in capsys.readouterr().err
  assert checkpoints.sampling_of(tmp_path / "out") == {}


@pytest.mark.parametrize(
  "sampling, named",
  [
    ([], "sampling"),
    ({"guidance": 0.5}, "sampling.guidance"),
    ({"temperature": 1.0}, "sampling.temperature"),
    ({"steps": "3"}, "sampling.steps"),
    ({"solver": None}, "sampling.solver=null"),
    ({"x" * 10_000: 1}, "sampling.xxx"),
  ],
)
def test_what_it_cannot_say_is_refused_by_its_file(own, sampling, named):
  sets(own, sampling)
  with refused(str(own / "config.json"), named) as found:
    checkpoints.describe(own)
  assert len(str(found.value)) < 600


def test_a_run_keeps_what_its_config_does_not_set(own, tmp_path):
  def loaded(*fields: str, named: str = STAGE2, workdir: pathlib.Path = tmp_path / "run"):
    start = lambda config, given: start_model.sections_of(config, given, workdir)
    return config_files.load(named, [f"--config.train.init_from={own}", *fields], start).sampling

  assert loaded() == OWN
  assert loaded("--config.sampling.guidance=2.5") == OWN | {"guidance": 2.5}
  assert loaded("--config.sampling={'solver': 'heun'}") == {"solver": "heun"}
  assert loaded("--config.sampling={}") == {}
  begun = tmp_path / "begun"
  shutil.copytree(own, begun)
  sets(begun, {"guidance": 7.0})
  assert loaded(workdir=begun) == {"guidance": 7.0}
  parts = "--config.train.init_dropped=('generation_encoder','generation_decoder','vae')"
  patch = "--config.model.understanding_encoder.patch_size=8"  # of which an image has as many as codes
  assert loaded(parts, patch, named="janus/tune:tiny") == {}  # settings of flow say nothing about codes


@pytest.mark.parametrize(
  "field, said",
  [
    ("sampling.guidence=3", "did you mean sampling.guidance"),
    ("sampling.foo=3", "sampling has "),
    ("temperature=3", "did you mean sampling.temperature"),
    ("sampling.steps=x", "whole number"),
    ("sampling=3", "must be a dict, {} for none, got"),
    ("sampling=None", "must be a dict, {} for none, got"),
  ],
)
def test_a_field_that_no_family_has_is_refused(field, said):
  with refused(f"--config.{field}", said):
    config_files.load(STAGE2, [f"--config.{field}"])


@pytest.mark.parametrize("old", ["log.sample_guidance=3.5", "sampling.guidance=3.5"])
def test_its_name_in_earlier_versions_still_sets_it(old):
  assert config_files.load(STAGE2, [f"--config.{old}"]).sampling == {"guidance": 3.5}


@pytest.mark.parametrize("flag", ["--temperature=1", "--solver=heun"])
def test_a_flag_that_the_checkpoint_does_not_take_is_refused_before_anything_is_made(own, tmp_path, flag, capsys):
  sets(own, {"precision": "release"})
  for weights in own.rglob("d/*"):
    weights.unlink()
  asked = ["generate", f"--checkpoint={own}", "--prompt=a", f"--output={tmp_path / 'pictures'}", flag]
  assert main(asked) == 2 and not (tmp_path / "pictures").exists()
  assert ("precision='exact'" if "heun" in flag else "temperature=1.0 is not a setting") in capsys.readouterr().err


def test_an_evaluation_takes_it_behind_the_benchmarks_own():
  def chosen(kind: type, **given: float):
    asked = Settings(kind.name, "checkpoint", pathlib.Path("out"), sampling=given)
    return runner.sampling_of(kind, asked, flow.FAMILY, OWN)

  assert chosen(mjhq.Mjhq) == flow.FAMILY.settings(**OWN)
  assert chosen(mjhq.Mjhq10k) == flow.FAMILY.settings(guidance=7.5, steps=3)
  assert chosen(mjhq.Mjhq10k, guidance=1.0) == flow.FAMILY.settings(guidance=1.0, steps=3)


def test_a_request_without_settings_takes_it():
  asked = schemas.ImageRequests(flow.FAMILY, NAME, 16, usual={"": flow.FAMILY.settings(**OWN, interval=(0, 0.9))})
  made = lambda **given: asked.parse({"prompt": "a", **given}).settings
  assert made() == made(steps=None) == flow.FAMILY.settings(**OWN, interval=(0, 0.9))
  assert made(steps=5) == flow.FAMILY.settings(guidance=4.0, steps=5, interval=(0, 0.9))


def test_a_server_takes_a_model_s_own_setting_beyond_its_limits():
  usual = {"": flow.FAMILY.settings(steps=500), "few": flow.FAMILY.settings(steps=2)}
  requests = schemas.ImageRequests(flow.FAMILY, NAME, 16, usual=usual)
  steps = lambda **given: requests.parse({"prompt": "a", **given}).settings.steps
  assert (steps(), steps(model="few"), steps(steps=500)) == (500, 2, 500)
  with pytest.raises(ApiError, match="steps must be .*500"):
    steps(steps=501)


@pytest.mark.parametrize("more", [dict(sampling={"steps": 3}), dict(pictures=3)])
def test_questions_alone_take_no_settings_of_pictures_and_say_none(tmp_path, more):
  with refused(f"--{'steps' if 'sampling' in more else 'pictures'}", "--only=questions"):
    runner.opened(Settings("shapes", "checkpoint", tmp_path, only="questions", **more))
  benchmark = runner.opened(Settings("shapes", "checkpoint", tmp_path, only="questions", limit=2))
  tasks = benchmark.tasks()
  notes = benchmark.score({task.key: {"key": task.key, "answer": "no"} for task in tasks}).notes
  assert [note.split(":")[0] for note in notes] == ["Questions"]
  assert runner._on_settings(benchmark, flow.FAMILY, None) == ["Not the benchmark's settings: --limit=2."]


def test_a_report_says_what_the_checkpoint_and_what_a_call_sets(tmp_path):
  def notes(kind: type, own: dict, **given: float) -> list[str]:
    asked = Settings(kind.name, "checkpoint", tmp_path, data=tmp_path, sampling=given)
    benchmark = kind.__new__(kind)
    benchmark.settings, benchmark.pictures = asked, kind.pictures
    return runner._on_settings(benchmark, flow.FAMILY, runner.sampling_of(kind, asked, flow.FAMILY, own))

  itself = "Painted as the checkpoint itself says: "
  paper = " The paper's scores stand for the recipe."
  assert notes(mjhq.Mjhq, {}) == []
  assert notes(mjhq.Mjhq, OWN) == [f"{itself}guidance 4.0, steps 3.{paper}"]
  assert notes(mjhq.Mjhq10k, OWN) == [f"{itself}steps 3.{paper}"]  # the benchmark has a guidance
  assert notes(mjhq.Mjhq, OWN, guidance=2.0, steps=30) == []  # the benchmark's
  assert notes(mjhq.Mjhq, OWN, guidance=4.0) == [
    f"{itself}steps 3.",
    f"Not the benchmark's settings: --guidance=4.0.{paper}",
  ]
