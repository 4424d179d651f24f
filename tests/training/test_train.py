"""Training as a user runs it: killed runs equal uninterrupted ones, stages hand over, bad configs end."""

import dataclasses
import hashlib
import json
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from refusals import refused
from runs import INTERVAL, STEPS, command, command_of, environment, train

from jflow import sharding
from jflow.__main__ import main
from jflow.errors import UserError
from jflow.interop import native, steps
from jflow.training import setup
from jflow.training.metrics import read_lines


def _interrupt(command: list[str], workdir: pathlib.Path, signum: int, when: Callable[[], bool]) -> tuple[int, str]:
  """Starts a run, sends a signal as soon as `when` holds; returns (exit code, stderr)."""
  errors = workdir.with_suffix(".stderr")
  with open(errors, "w") as file:
    process = subprocess.Popen(command, cwd=tiny.ROOT, env=environment(), stderr=file, stdout=file)
    while process.poll() is None and not when():
      time.sleep(0.002)
    process.send_signal(signum)
    code = process.wait()
  return code, errors.read_text()


def _lines(workdir: pathlib.Path) -> int:
  file = workdir / "metrics.jsonl"
  return file.read_bytes().count(b"\n") if file.exists() else 0


def _losses(workdir: pathlib.Path) -> dict[int, str]:
  rows = read_lines(workdir / "metrics.jsonl")
  names = [name for name in rows[0] if name.startswith("loss")] + ["grad_norm"] if rows else []
  return {row["step"]: " ".join(np.float32(row[name]).tobytes().hex() for name in names) for row in rows}


def _parameters(workdir: pathlib.Path, weights: str) -> dict[str, np.ndarray]:
  return flatten_dict(native.load_params(native.resolve(workdir)[1], weights), sep="/")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> pathlib.Path:
  return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def stage1(runs, compilation_cache) -> pathlib.Path:
  train(1, runs / "stage1", compilation_cache, "")
  return runs / "stage1"


@pytest.fixture(scope="module")
def stage2(runs, stage1, compilation_cache) -> pathlib.Path:
  train(2, runs / "stage2", compilation_cache, stage1)
  return runs / "stage2"


@pytest.fixture(scope="module")
def stage3(runs, stage2, compilation_cache) -> pathlib.Path:
  window = ("--config.profile.start=1", "--config.profile.steps=1")
  train(3, runs / "stage3", compilation_cache, stage2, *window)
  return runs / "stage3"


# When each stage is killed: at a random step, inside a save, just after one, or at the hand-over, before the first
# step, while the weights of the stage before are taken.
KILLS = (
  ("step", "save", "saved"),
  ("hand-over", "step", "save", "saved", "step"),
  ("hand-over", "step", "save", "saved"),
)


@pytest.mark.parametrize(
  "kills", [pytest.param((("save",),), id="once"), pytest.param(KILLS, id="matrix", marks=pytest.mark.kill)]
)
def test_stages_that_are_killed_again_and_again_equal_those_that_are_not(kills, runs, compilation_cache, request):
  """The matrix: twelve SIGKILLs over three stages and both hand-overs, then SIGTERM.

  No loss and no weight may differ by a bit.
  """
  rng, before, killed, differing = np.random.default_rng(0), "", 0, 0
  for stage, kinds in enumerate(kills, 1):
    whole = request.getfixturevalue(f"stage{stage}")
    workdir = runs / f"interrupted{stage}_of_{len(kills)}"
    command = command_of(stage, workdir, compilation_cache, before)
    for kind in kinds:
      _kill(command, workdir, kind, int(rng.integers(1, INTERVAL + 2)))
      killed += 1
    if stage == 3:
      _stop(command, workdir)
    done = subprocess.run(command, cwd=tiny.ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses, wanted = _losses(workdir), _losses(whole)
    assert list(losses) == list(range(1, STEPS + 1))  # every step once
    differing += sum(losses[step] != wanted[step] for step in wanted)
    for weights in ("ema", "raw"):
      ours, theirs = _parameters(workdir, weights), _parameters(whole, weights)
      assert ours.keys() == theirs.keys()
      assert all(ours[path].tobytes() == theirs[path].tobytes() for path in ours)
    if stage < 3:
      oldest = min(steps.sealed_steps(workdir / "checkpoints"))
      assert oldest < STEPS and _frozen(workdir, oldest) == _frozen(workdir, STEPS)
      assert stage == 1 or _frozen(workdir, STEPS) == _frozen(before, STEPS)
    before = workdir
  print(f"kills survived {killed}/{sum(map(len, kills))}, differing losses {differing}")
  assert killed == sum(map(len, kills)) and differing == 0


CODES = ("--config.train.batch_size=4", "--config.data.shapes.size=60", f"--config.checkpoint.interval={INTERVAL}")
ONE_LAYER = (f"--config.checkpoint.interval={INTERVAL}", "--config.model.language_model.num_layers=1")


@pytest.mark.kill
@pytest.mark.parametrize(
  "config, fields",
  [
    ("janus/stage2:tiny", CODES),
    ("grpo:tiny", (*ONE_LAYER, "--config.rl.kl=0.1")),  # with a copy of the model of step 0
    ("janus/grpo:tiny", ONE_LAYER),
    ("dpo:tiny", ONE_LAYER),
  ],
)
def test_a_killed_run_of_another_kind_equals_one_that_is_not(config, fields, runs, compilation_cache):
  """Codes of a step, groups, their noise and scores: no number of the log and no weight may differ by a bit."""
  of = lambda workdir: command(config, workdir, compilation_cache, *fields)
  name = config.replace("/", "_").replace(":", "_")
  whole, killed = runs / name, runs / f"killed_{name}"
  subprocess.run(of(whole), cwd=tiny.ROOT, env=environment(), check=True, capture_output=True)
  _kill(of(killed), killed, "save", 0)
  subprocess.run(of(killed), cwd=tiny.ROOT, env=environment(), check=True, capture_output=True)
  rows, again = (read_lines(workdir / "metrics.jsonl") for workdir in (whole, killed))
  timed = ("tokens_per_second", "mfu")
  numbers = lambda rows: [{key: x for key, x in row.items() if key not in timed} for row in rows]
  assert numbers(rows) == numbers(again) and [row["step"] for row in rows] == list(range(1, STEPS + 1))
  if config == "janus/stage2:tiny":
    assert {name for name in rows[0] if name.startswith("loss")} == {"loss", "loss_text", "loss_codes"}
    assert rows[-1]["loss_codes"] < rows[0]["loss_codes"]
  ours, theirs = _parameters(killed, "raw"), _parameters(whole, "raw")
  assert ours.keys() == theirs.keys() and all(ours[path].tobytes() == x.tobytes() for path, x in theirs.items())


def _kill(command: list[str], workdir: pathlib.Path, kind: str, after: int) -> None:
  """Starts a run and kills it at a moment of a kind; checks where it went on and what it has left behind."""
  at = _newest(workdir)
  moments = {
    "step": lambda: _stepping(workdir, at) and _lines(workdir) >= at + after,
    "save": lambda: _stepping(workdir, at) and any("tmp" in p.name for p in (workdir / "checkpoints").glob("*")),
    "saved": lambda: max(steps.sealed_steps(workdir / "checkpoints"), default=0) > at,  # so that it gets on
    "hand-over": (workdir / "config.json").exists,
  }
  code, text = _interrupt(command, workdir, signal.SIGKILL, moments[kind])
  assert code == -signal.SIGKILL, text
  assert at == 0 or f"going on from step {at} " in text
  if kind == "hand-over":
    assert not steps.sealed_steps(workdir / "checkpoints") and not _lines(workdir)
  assert _newest(workdir) >= _lines(workdir) - 2 * INTERVAL  # no more is lost than since the save before


def _stop(command: list[str], workdir: pathlib.Path) -> None:
  """Starts a run and asks it to end by SIGTERM after its first step: it saves, and says so."""
  at = _newest(workdir)
  code, text = _interrupt(command, workdir, signal.SIGTERM, lambda: _stepping(workdir, at))
  assert code == 128 + signal.SIGTERM, text
  stopped = _newest(workdir)
  assert f"stopped at step {stopped}; the same command goes on" in text and "Traceback" not in text
  assert list(_losses(workdir)) == list(range(1, stopped + 1))  # what is saved is what was logged


def _newest(workdir: pathlib.Path) -> int:
  return (native.newest_valid(workdir / "checkpoints") if workdir.exists() else 0) or 0


def _stepping(workdir: pathlib.Path, restored: int) -> bool:
  """Whether the run has said that its first step after the restored one is done."""
  return f"step {restored + 1}/{STEPS} " in workdir.with_suffix(".stderr").read_text()


def _frozen(workdir: pathlib.Path, step: int) -> str:
  """sha256 over what stages 1 and 2 both leave as it is: SigLIP and the VAE."""
  params = flatten_dict(native.load_params(workdir / "checkpoints" / str(step), "raw"), sep="/")
  frozen = sorted(path for path in params if path.startswith(("understanding_encoder/", "vae/")))
  return hashlib.sha256(b"".join(params[path].tobytes() for path in frozen)).hexdigest()


def test_frozen_parts_are_handed_over_bit_for_bit_and_the_others_learn(stage1, stage2, stage3):
  one, two, three = (_parameters(workdir, "raw") for workdir in (stage1, stage2, stage3))
  same = lambda a, b, part: {a[p].tobytes() == b[p].tobytes() for p in b if p.startswith(part) and p in a}
  for part in ("understanding_encoder/", "vae/"):
    assert same(one, two, part) == {True}
  assert same(two, three, "vae/") == {True}
  assert same(two, three, "understanding_encoder/head/") == {True}
  assert False in same(one, two, "language_model/layers/")
  assert False in same(two, three, "understanding_encoder/")
  assert False in same(two, three, "generation_decoder/")


def test_what_is_frozen_has_no_optimizer_state_on_disk(stage1):
  """Stage 1 trains the new parts only: two moments of these, and none of the language model."""
  trained = json.loads((stage1 / "config.json").read_text())["optimizer"]["trained"]
  sizes = {p: x.nbytes for p, x in _parameters(stage1, "raw").items() if p.startswith(tuple(trained))}
  from orbax.checkpoint import v1 as ocp

  _, step_dir = native.resolve(stage1)
  progress = ocp.checkpointables_metadata(step_dir.absolute()).metadata["progress"]
  leaves = jax.tree.leaves(progress["optimizer"], is_leaf=lambda m: hasattr(m, "dtype"))
  moments = sum(int(np.prod(m.shape)) * 4 for m in leaves if m.shape)
  scalars = sum(2 * 4 for p, x in _parameters(stage1, "raw").items() if p in sizes and not x.shape)
  assert moments == 2 * sum(sizes.values()) - scalars


def test_a_complete_run_stays_as_it_is(stage3, stage2, compilation_cache, capsys):
  before = (stage3 / "metrics.jsonl").read_bytes()
  assert main(command_of(3, stage3, compilation_cache, stage2)[3:]) == 0
  assert f"is complete at step {STEPS}" in capsys.readouterr().err
  assert (stage3 / "metrics.jsonl").read_bytes() == before


def test_a_damaged_run_goes_on_without_loss_or_is_refused(runs, stage3, stage2, compilation_cache, capsys):
  """As a user meets it: a step that was moved away, a line that was spoiled; then all manifests are gone."""
  harmed = runs / "harmed"
  shutil.copytree(stage3, harmed)
  shutil.rmtree(harmed / "checkpoints" / str(STEPS))
  oldest = min(steps.sealed_steps(harmed / "checkpoints"))
  kept = shutil.move(harmed / "checkpoints" / str(oldest), runs / "kept")
  (harmed / "checkpoints" / str(oldest)).symlink_to(kept)
  text = (harmed / "metrics.jsonl").read_bytes().split(b"\n")
  text[3] = text[3].replace(b":", b";", 1)
  (harmed / "metrics.jsonl").write_bytes(b"\n".join(text) + b'{"step": 25, "x": "\xff\xfe')
  one_more = f"--config.train.steps={STEPS + INTERVAL}"  # so that the linked step is an old one
  done = train(3, harmed, compilation_cache, stage2, one_more)
  assert "metrics.jsonl: line 4 is damaged" in done.stderr and "Traceback" not in done.stderr
  losses, whole = _losses(harmed), _losses(stage3)
  assert list(losses) == [step for step in range(1, STEPS + INTERVAL + 1) if step != 4]
  assert all(losses[step] == whole[step] for step in whole if step != 4)
  assert (harmed / "metrics.jsonl.damaged").read_bytes().startswith(b"\n".join(text))
  assert steps.damage(pathlib.Path(kept)) is None
  for manifest in harmed.glob("checkpoints/*/manifest.json"):
    manifest.unlink()
  before = {path: path.read_bytes() for path in harmed.rglob("*") if path.is_file()}
  assert main(command_of(3, harmed, compilation_cache, stage2, one_more)[3:]) == 2
  assert str(harmed) in (said := capsys.readouterr().err) and said.count("\n") == 1
  assert {path: path.read_bytes() for path in harmed.rglob("*") if path.is_file()} == before


def test_a_run_goes_on_with_smaller_microbatches_and_less_memory(runs, stage2, stage1, compilation_cache):
  """As on half of the devices: the same batches and draws, so the same losses to rounding."""
  smaller = runs / "smaller"
  shutil.copytree(stage2, smaller)
  shutil.rmtree(smaller / "checkpoints" / str(STEPS))
  fields = ("train.accumulation=2", "compute.remat=full", "compute.unroll=2")
  train(2, smaller, compilation_cache, stage1, *(f"--config.{field}" for field in fields))
  losses = lambda workdir: [row["loss"] for row in read_lines(workdir / "metrics.jsonl")]
  assert len(losses(smaller)) == STEPS
  assert losses(smaller)[:-INTERVAL] == losses(stage2)[:-INTERVAL]
  np.testing.assert_allclose(losses(smaller)[-INTERVAL:], losses(stage2)[-INTERVAL:], rtol=1e-4)


def test_a_window_of_steps_is_traced(stage3, stage2):
  (trace,) = (stage3 / "profile").rglob("*.xplane.pb")
  assert b"train_step" in trace.read_bytes()
  assert not (stage2 / "profile").exists()


# --- the parameters of step 0 -----------------------------------------------------------------------------


def _start(source: dict, tmp_path: pathlib.Path, model=tiny.CONFIG, **train) -> dict[str, np.ndarray]:
  native.save_params(tmp_path / "source", source, {"model": model.to_dict(), "data": {"template": "plain"}}, None)
  config = tiny.configuration(train=dict(init_from=str(tmp_path / "source")) | train)
  params = setup.start_params(config, tiny.model(), sharding.make_mesh(1, 1, 1), None)
  return flatten_dict(jax.tree.map(np.asarray, params), sep="/")


def test_a_stage_starts_from_the_parameters_it_is_given(tmp_path):
  source = dict(tiny.params())
  source["latent_encoder"] = {"bias": np.zeros(())}
  head = source.pop("alignment_head")
  got = _start(source, tmp_path, init_fresh=("alignment_head",), init_dropped=("latent_encoder",))
  want = flatten_dict(tiny.params(), sep="/")
  assert got.keys() == want.keys()
  assert all(np.array_equal(got[p], want[p]) for p in want if not p.startswith("alignment_head/"))
  assert not np.array_equal(got["alignment_head/linear_1/kernel"], head["linear_1"]["kernel"])


def test_a_part_can_come_from_another_checkpoint(tmp_path):
  other = jax.tree.map(lambda x: np.asarray(x) + 1, tiny.params())
  about = {"model": tiny.CONFIG.to_dict(), "data": {"template": "plain"}}
  native.save_params(tmp_path / "other", other, about, None)
  parts = tuple((part, str(tmp_path / "other")) for part in ("understanding_encoder", "understanding_start"))
  got = _start(tiny.params(), tmp_path, init_parts=parts)
  for path, want in flatten_dict(tiny.params(), sep="/").items():
    moved = path.startswith(("understanding_encoder/", "understanding_start"))
    np.testing.assert_array_equal(got[path], want + moved, err_msg=path)
  with refused("init_parts", "other", "siglip"):
    _start(tiny.params(), tmp_path / "none", init_parts=(("siglip", str(tmp_path / "other")),))


def test_a_field_that_no_shape_shows_is_named(tmp_path, capsys):
  """SigLIP of Hugging Face has the tanh GELU, configs/ the exact one: all shapes agree, the numbers do not."""
  _start(tiny.params(), tmp_path / "same")
  assert capsys.readouterr().err == ""
  vision = tiny.CONFIG.understanding_encoder
  other = {"erf": "tanh", "tanh": "erf"}[vision.gelu]
  model = dataclasses.replace(tiny.CONFIG, understanding_encoder=dataclasses.replace(vision, gelu=other))
  _start(tiny.params(), tmp_path / "other", model=model)
  said = capsys.readouterr().err
  assert said.count("\n") == 1
  assert f"model.understanding_encoder.gelu='{other}', this run has '{vision.gelu}'" in said


def test_what_no_shape_shows_is_asked_of_the_checkpoint_that_a_part_comes_from(tmp_path, capsys):
  vision = tiny.CONFIG.understanding_encoder
  gelu = {"erf": "tanh", "tanh": "erf"}[vision.gelu]
  other = dataclasses.replace(tiny.CONFIG, understanding_encoder=dataclasses.replace(vision, gelu=gelu))
  source = dict(tiny.params())
  source["understanding_encoder"] = source["understanding_encoder"] | {"patch_embed": {"kernel": np.zeros((3, 4))}}
  for name, model, params in (("other", other, tiny.params()), ("odd", tiny.CONFIG, source)):
    native.save_params(tmp_path / name, params, {"model": model.to_dict(), "data": {"template": "plain"}}, None)
  part = lambda name: (("understanding_encoder", str(tmp_path / name)),)
  _start(tiny.params(), tmp_path / "a", init_parts=part("other"))
  assert f"{tmp_path / 'other'} was made with model.understanding_encoder.gelu='{gelu}'" in capsys.readouterr().err
  _start(tiny.params(), tmp_path / "b", model=other, init_parts=part("other"))
  assert capsys.readouterr().err.count("\n") == 1  # once, and not of the part that is replaced
  with refused("odd", "understanding_encoder/patch_embed/bias"):
    _start(tiny.params(), tmp_path / "c", init_parts=part("odd"))


def test_parameters_of_another_model_are_refused_by_name(tmp_path):
  source = dict(tiny.params())
  head = source.pop("alignment_head")
  with refused("alignment_head/linear_1/bias", "init_fresh"):
    _start(source, tmp_path / "lacks")
  source |= {"alignment_head": head, "other": {"kernel": np.zeros(3)}}
  with refused("other/kernel", "init_dropped"):
    _start(source, tmp_path / "holds")
  source.pop("other")
  source["understanding_start"] = np.zeros(5, np.float32)
  with refused("understanding_start", "(5,)", "(32,)"):
    _start(source, tmp_path / "shape")


def test_a_checkpoint_of_other_sizes_names_every_field_to_set(tmp_path):
  language = dataclasses.replace(tiny.CONFIG.language_model, mlp_dim=24, rope_theta=130_000.0)
  other = dataclasses.replace(tiny.CONFIG, language_model=language)
  with pytest.raises(UserError) as refused:
    _start(tiny.params(other), tmp_path, model=other)
  fields = str(refused.value).split("it was made with ")[1].split()
  assert fields == ["--config.model.language_model.mlp_dim=24", "--config.model.language_model.rope_theta=130000.0"]
