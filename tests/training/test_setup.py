"""Laws of the checks before a run: every mistake in a config is one line that names its field."""

import json
import shutil

import pytest
import tiny
from refusals import refused

from configs import stage0, stage1, stage2, stage3
from jflow.config import RunConfig
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.models.config import ModelConfig
from jflow.training import config_files, setup


@pytest.mark.parametrize("size", ["tiny", "shapes", "384", "256"])
@pytest.mark.parametrize("stage", [stage0, stage1, stage2, stage3], ids=lambda stage: stage.__name__[-6:])
def test_the_stages_pass(stage, size):
  config = stage.get_config(size)
  config.train.steps = config.train.steps or 1  # stage 0 has no length beyond the built-in world
  config.data.tokenizer = str(tiny.TOKENIZER)
  typed = RunConfig.from_dict(config.to_dict(), ModelConfig.from_dict)
  setup.check(typed)
  assert typed.model.image_size in (32, 48, 384, 256)


def test_a_run_that_has_begun_takes_its_own_tokenizer(tmp_path):
  """Not that of the checkpoint it began from, which may be gone; one that is not the run's is not taken."""
  config = tiny.configuration(train=dict(init_from=str(tmp_path / "gone")), data=dict(tokenizer=""))
  kept, step = tmp_path / "run" / "tokenizer", tmp_path / "run" / "checkpoints" / "1"
  step.mkdir(parents=True)
  shutil.copytree(tiny.TOKENIZER, kept)
  with refused("gone"):  # nothing is saved yet
    setup.with_tokenizer(config, tmp_path / "run")
  (step / "manifest.json").write_text(json.dumps({"tokenizer": Tokenizer.load(str(kept)).fingerprint}))
  assert setup.with_tokenizer(config, tmp_path / "run").data.tokenizer == str(kept)
  (step / "manifest.json").write_text(json.dumps({"tokenizer": "another"}))
  with refused("gone"):
    setup.with_tokenizer(config, tmp_path / "run")


@pytest.mark.parametrize(
  "field, value",
  [
    ("train.steps", 0),
    ("train.batch_size", -4),
    ("train.accumulation", 0),
    ("train.accumulation", 3),
    ("train.seed", -1),
    ("train.ema", 1.0),
    ("train.max_skipped", 0),
    ("train.init_weights", "best"),
    ("train.init_parts", ("vae",)),
    ("train.init_parts", (("vae", "DIR"),)),  # without train.init_from
    ("world.fit_labels", -1),
    ("optimizer.learning_rate", 0.0),
    ("optimizer.learning_rate", float("nan")),
    ("optimizer.clip_norm", 0.0),
    ("optimizer.epsilon", 0.0),
    ("optimizer.warmup_steps", -1),
    ("optimizer.weight_decay", -0.1),
    ("optimizer.beta2", 1.0),
    ("optimizer.cooldown_start", -1),
    ("optimizer.cooldown_steps", 2),  # the rate of the last steps would be 0
    ("objective.draws", dict(time_mean=0.0)),
    ("objective.draws", dict(shift=1.0)),
    ("objective.weights", dict(alignment=0.0, flow=0.0, text=0.0)),
    ("data.template", "poem"),
    ("data.crop", "left"),
    ("data.row_tokens", 129),
    ("data.row_images", 0),
    ("data.tokenizer", ""),
    ("compute.dtype", "float16"),
    ("compute.remat", "some"),
    ("compute.matmul", "int8"),
    ("compute.unroll", 0),
    ("mesh.data", 0),
    ("checkpoint.interval", 0),
    ("checkpoint.keep", 0),
    ("checkpoint.keep_every", -1),
    ("train.spike_sigmas", -1.0),
    ("train.spike_window", 1),
    ("train.watchdog_seconds", -5.0),
    ("distributed.cluster", "kubernetes"),
    ("distributed.processes", 0),
    ("distributed.process_id", 1),
    ("distributed.heartbeat_seconds", 0),
    ("log.sample_every", -1),
    ("sampling.steps", 0),
    ("sampling.guidance", 0.5),
    ("sampling.temperature", 0.5),  # of codes
    ("sampling.solver", True),
    ("log.sample_prompts", ("", "a ring")),
  ],
)
def test_a_bad_value_is_one_line_that_names_its_field(field, value):
  section, _, name = field.partition(".")
  with pytest.raises(UserError) as error:
    setup.check(tiny.configuration(**{section: {name: value}}))
  assert f"config.{field}" in str(error.value) and repr(value) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  "sections, named",
  [
    (dict(objective=dict(draws=dict(time_mean=0.0, time_std=0.0))), ("objective.draws.time_std", "above 0", "0.0")),
    (dict(distributed=dict(processes=4, process_id=2)), ("distributed.coordinator", "HOST:PORT", "''")),
    (
      dict(distributed=dict(processes=4, process_id=2, coordinator="head")),
      ("distributed.coordinator", "HOST:PORT", "'head'"),
    ),
    (
      dict(train=dict(accumulation=2), mesh=dict(data=2, fsdp=2)),
      ("train.batch_size", "mesh.data x mesh.fsdp=4", "got 4"),
    ),
    (dict(mesh=dict(data=3)), ("train.batch_size", "mesh.data x mesh.fsdp=3", "got 4")),
    (dict(objective=dict(weights=dict(text=1.0, repa=1.0))), ("objective.weights.repa", "text, flow", "1.0")),
    (dict(model=dict(objectives=())), ("objective.weights.alignment", "text, flow", "1.0")),
    (dict(objective=dict(logged=("flow", "repa"))), ("objective.logged", "text, flow", "'repa'")),
    (dict(model=dict(hight=3)), ("model.hight",)),
    (dict(train=dict(init_from="DIR"), world=dict(fit_labels=16)), ("world.fit_labels", "train.init_from", "16")),
    (dict(objective=dict(weights=dict(text=1.0, flow=-1.0))), ("objective.weights.flow", "-1.0")),
  ],
)
def test_fields_that_do_not_go_together_are_one_line_that_names_them(sections, named):
  with pytest.raises(UserError) as error:
    setup.check(tiny.configuration(**sections))
  assert all(one in str(error.value) for one in named) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize("more", [dict(processes=4, process_id=2, coordinator="head:1234"), dict(cluster="auto")])
def test_processes_with_an_address_or_a_cluster_pass(more):
  setup.check(tiny.configuration(distributed=more))


@pytest.mark.smoke
def test_the_config_of_the_tests_is_fine():
  setup.check(tiny.configuration())
  assert tiny.configuration().model == tiny.CONFIG


def test_the_size_of_the_alignment_head_has_its_old_name_too():
  config = config_files.load("configs/stage1.py:tiny", ["--config.model.alignment_width=48"])
  assert config.model.objective("alignment").hidden_dim == 48


@pytest.mark.parametrize(
  "argument, named",
  [
    ("--config.train.stepps=3", "(--config.train.stepps=3)"),
    ("--config.nothing=3", "nothing"),
    ("--config.optimizer.learning_rate=fast", "learning_rate"),
    ("--config.train.batch_size=2.5", "batch_size"),
    ("--config.mesh.date=2", "(--config.mesh.date=2)"),
    ("--config.checkpoint=5", "checkpoint"),
    ("--confg.train.steps=3", "confg.train.steps"),
    ("--config.log.tensorboard=perhaps", "tensorboard"),
    ("--config.model.autoencoder.patch_size=4", "config.model.autoencoder.patch_size"),  # of another kind
    ("--config.model.alignment_width=x", "config.model.alignment_width"),
  ],
)
def test_a_mistyped_argument_is_one_line_that_names_it(argument, named):
  with pytest.raises(UserError) as error:
    config_files.load("configs/stage1.py:tiny", [argument])
  assert named in str(error.value) and "\n" not in str(error.value) and "Traceback" not in str(error.value)
