"""Checkpoints: exact restore, damage is found and never used, one trainer per workdir, one config per run."""

import errno
import gc
import json
import os
import pathlib
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from orbax.checkpoint import v1 as ocp
from refusals import refused

from jflow.data.tokenizer import Tokenizer
from jflow.errors import Stopped
from jflow.interop import native, steps
from jflow.training import checkpoint
from jflow.training.checkpoint import Checkpointer
from jflow.training.state import TrainState

OPTIMIZER = optax.adamw(1e-2)


def _state(step: int = 0, seed: int = 0) -> TrainState:
  rng = np.random.default_rng([seed, step])
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  state = TrainState.create(
    {"head": {"kernel": normal(7, 5)}, "scale": normal(3)},
    {"tower": normal(4, 4).astype(jnp.bfloat16)},
    OPTIMIZER,
  )
  moved = jax.tree.map(lambda x: x + 1 if x.dtype == jnp.int32 else normal(*x.shape), (state.ema, state.optimizer))
  return state.replace(
    ema=moved[0],
    optimizer=moved[1],
    step=jnp.asarray(step, jnp.int32),
    skipped=jnp.asarray(step + 5, jnp.int32),
    skipped_in_a_row=jnp.asarray(2, jnp.int32),
  )


def _abstract(state: TrainState) -> TrainState:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _assert_same(a: TrainState, b: TrainState) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


def _save(directory: pathlib.Path, *steps: int, keep: int = 10) -> None:
  checkpointer = Checkpointer(directory, keep, {"versions": {"jax": jax.__version__}})
  for step in steps:
    checkpointer.save(_state(step))
  checkpointer.wait()


def _restore(directory: pathlib.Path, keep: int = 10) -> TrainState | None:
  return Checkpointer(directory, keep, {}).restore(_abstract(_state()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
  """A run with steps 2 and 4. Tests that harm it take a copy."""
  directory = tmp_path_factory.mktemp("run") / "checkpoints"
  _save(directory, 2, 4)
  (directory.parent / "config.json").write_text(json.dumps({"model": {"width": 1}, "data": {"template": "plain"}}))
  return directory


@pytest.fixture
def copy(saved, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(saved.parent, tmp_path / "run")) / "checkpoints"


def _files(step_dir: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in step_dir.rglob("*") if p.is_file())


def _largest(step_dir: pathlib.Path) -> pathlib.Path:
  return max((f for f in _files(step_dir) if f.name != steps.MANIFEST), key=lambda f: f.stat().st_size)


@pytest.mark.smoke
def test_every_leaf_comes_back_bit_for_bit(saved):
  _assert_same(_restore(saved), _state(4))


def test_saving_goes_on_while_the_next_step_takes_the_buffers(tmp_path):
  """The step donates its state: what is being written must not change under the writer's hands."""
  advance = jax.jit(lambda s: jax.tree.map(lambda x: x * 3 + 1, s), donate_argnums=0)
  trained = {"big": jnp.arange(2_000_000, dtype=jnp.float32)}
  state = TrainState.create(trained, {}, optax.identity()).replace(step=jnp.asarray(1, jnp.int32))
  want = jax.tree.map(np.array, state)
  checkpointer = Checkpointer(tmp_path, 1, {})
  checkpointer.save(state)
  for _ in range(3):
    state = advance(state)
  checkpointer.wait()
  _assert_same(Checkpointer(tmp_path, 1, {}).restore(_abstract(state)), want)


def test_nothing_saved_is_a_fresh_start(tmp_path):
  assert _restore(tmp_path / "checkpoints") is None


def test_a_flipped_bit_is_found_wherever_it_is(copy):
  rng = np.random.default_rng(0)
  for number in range(64):
    files = [f for f in _files(copy / "4") if f.name != steps.MANIFEST and f.stat().st_size]
    file = files[number % len(files)]
    good = file.read_bytes()
    bad = bytearray(good)
    bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
    file.write_bytes(bad)
    why = steps.damage(copy / "4")
    assert why and str(file.relative_to(copy / "4")) in why
    file.write_bytes(good)
  assert steps.damage(copy / "4") is None


def test_a_flipped_bit_of_the_manifest_is_found_or_harmless(copy):
  """Flips in the manifest's own metadata change nothing that is restored; no flip may raise."""
  file = copy / "4" / steps.MANIFEST
  good = file.read_bytes()
  harmless = json.loads(good)["files"]
  rng = np.random.default_rng(1)
  found = 0
  for place in rng.choice(len(good), 150, replace=False):
    bad = bytearray(good)
    bad[place] ^= 1 << rng.integers(8)
    file.write_bytes(bad)
    if steps.damage(copy / "4"):
      found += 1
    else:
      assert json.loads(bytes(bad))["files"] == harmless
  assert found > 100


def test_a_cut_or_missing_file_is_found(copy):
  for file in _files(copy / "4"):
    good, name = file.read_bytes(), str(file.relative_to(copy / "4"))
    if good:
      file.write_bytes(good[: len(good) // 2])
      assert name in steps.damage(copy / "4")
    file.unlink()
    assert name in steps.damage(copy / "4")
    file.write_bytes(good)
  assert steps.damage(copy / "4") is None


@pytest.mark.parametrize(
  "text", ["[]", "{}", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {"bytes": 1}}}', "null"]
)
def test_a_manifest_that_says_something_else_is_unreadable(copy, text):
  (copy / "4" / steps.MANIFEST).write_text(text)
  assert steps.damage(copy / "4") == "manifest.json is unreadable"


def test_a_damaged_step_is_passed_over_and_named(copy, capsys):
  largest = _largest(copy / "4")
  largest.write_bytes(largest.read_bytes()[:-1] + b"\x00\x00")
  _assert_same(_restore(copy), _state(2))
  assert f"{copy / '4'} is not used: {largest.relative_to(copy / '4')}" in capsys.readouterr().err


def test_a_save_that_did_not_finish_is_passed_over(copy):
  (copy / "4" / steps.MANIFEST).unlink()
  (copy / "6.orbax-checkpoint-tmp").mkdir()
  _assert_same(_restore(copy), _state(2))
  assert not list(copy.glob("*tmp*"))


def test_a_first_save_that_did_not_finish_is_no_run_to_go_on_from(tmp_path):
  directory = tmp_path / "checkpoints"
  assert _restore(directory) is None
  assert steps.make_room(directory, 2) is None  # killed before its manifest was written
  shutil.copytree(_half(tmp_path), directory / "2")
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
  assert _restore(directory) is None
  _save(directory, 2)
  _assert_same(_restore(directory), _state(2))
  assert sorted(p.name for p in directory.iterdir()) == ["2"] and not (tmp_path / "unsaved").exists()


def _half(folder: pathlib.Path) -> pathlib.Path:
  (folder / "half" / "trained").mkdir(parents=True)
  (folder / "half" / "trained" / "data").write_text("half")
  return folder / "half"


def test_with_no_intact_step_the_run_does_not_start_over(copy):
  """A silent start from scratch would overwrite what a person may still rescue."""
  for step in ("2", "4"):
    _largest(copy / step).unlink()
  with refused(str(copy)):
    _restore(copy)


def test_a_damaged_step_is_written_again(copy):
  _largest(copy / "4").unlink()
  _save(copy, 4)
  _assert_same(_restore(copy), _state(4))


def test_only_the_newest_steps_are_kept(tmp_path):
  _save(tmp_path, 1, 2, 3, 4, keep=2)
  assert steps.steps_of(tmp_path) == [4, 3]


def test_what_a_kill_left_of_a_save_goes_with_the_old_steps(tmp_path):
  """And nothing else: a folder that no save has marked may be whole but for its manifest, or another program's."""
  directory = tmp_path / "checkpoints"
  _save(directory, 4)
  for step in (1, 3, 7):
    if step != 1:
      steps.make_room(directory, step)
    shutil.copytree(_half(tmp_path / str(step)), directory / str(step))
  _save(directory, 6)
  assert steps.steps_of(directory) == [7, 6, 4, 1]  # 7 may be another process's, and is passed over
  assert (directory / "1" / "trained" / "data").read_text() == "half"


def test_a_damaged_later_step_does_not_push_out_a_good_one(copy):
  """After a fall back from 4 to 2, step 3 is the one to keep."""
  _largest(copy / "4").unlink()
  _save(copy, 3, keep=1)
  _assert_same(_restore(copy), _state(3))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax, which drops a future
def test_a_checkpoint_of_another_model_is_refused(saved):
  other = _state()
  other = other.replace(trained={"head": {"kernel": jnp.zeros((9, 5))}, "scale": jnp.zeros(3)})
  with refused("model"):
    Checkpointer(saved, 10, {}).restore(_abstract(other))
  gc.collect()


def test_a_slow_disk_does_not_hold_the_loop(tmp_path, monkeypatch):
  """`save` comes back while the disk is still at work; the save counts as done only with its manifest."""
  disk = threading.Event()
  seal = native.seal
  monkeypatch.setattr(checkpoint, "seal", lambda *args: disk.wait(60) and seal(*args))
  checkpointer = Checkpointer(tmp_path, 10, {})
  checkpointer.save(_state(2))
  checkpointer.check()  # nothing to raise, nothing to wait for
  assert native.newest_valid(tmp_path) is None
  disk.set()
  checkpointer.wait()
  _assert_same(_restore(tmp_path), _state(2))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_fails_under_the_manifest_stops_the_run_at_the_next_step(copy, monkeypatch, code):
  def failing(*args):
    raise OSError(code, os.strerror(code))

  checkpointer = Checkpointer(copy, 10, {})
  monkeypatch.setattr(checkpoint, "seal", failing)
  checkpointer.save(_state(6))
  checkpointer._thread.join()
  with refused("step 6", os.strerror(code), copy / "4", error=Stopped):
    checkpointer.check()
  monkeypatch.undo()
  _assert_same(_restore(copy), _state(4))


def test_the_processes_hashes_together_are_the_manifest(tmp_path):
  """Each process hashes the files with its number; process 0 waits for the others and writes last."""
  step_dir = tmp_path / "8"
  for name in (
    "_METADATA",
    "ema/ocdbt.process_0/d/a",
    "ema/ocdbt.process_1/d/b",
    "ema/array_metadatas/process_1",
  ):
    (step_dir / name).parent.mkdir(parents=True, exist_ok=True)
    (step_dir / name).write_text(name)
  first = threading.Thread(target=native.seal, args=(step_dir, {"step": 8}, 0, 2))
  first.start()
  assert steps.damage(step_dir)
  native.seal(step_dir, {"step": 8}, 1, 2)
  first.join()
  assert steps.damage(step_dir) is None and len(_files(step_dir)) == 5
  (step_dir / "ema/ocdbt.process_1/d/b").write_text("c" * len("ema/ocdbt.process_1/d/b"))
  assert sum(steps.damage(step_dir, part, 3) is not None for part in range(3)) == 1  # one process notices


def test_steps_that_are_kept_for_good_stay(tmp_path):
  checkpointer = Checkpointer(tmp_path, 1, {}, keep_every=4)
  for step in (2, 4, 6, 8, 10, 12):
    checkpointer.save(_state(step))
  checkpointer.wait()
  assert steps.steps_of(tmp_path) == [12, 8, 4]


@pytest.fixture(scope="module")
def saved_four(tmp_path_factory) -> pathlib.Path:
  directory = tmp_path_factory.mktemp("four") / "checkpoints"
  _save(directory, 1, 2, 3, 4)
  return directory


@pytest.fixture
def four(saved_four, tmp_path) -> pathlib.Path:
  """Steps 1 to 4."""
  return pathlib.Path(shutil.copytree(saved_four, tmp_path / "checkpoints"))


def _contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_of_an_old_step_that_is_a_link_only_the_link_goes(four, tmp_path, capsys):
  kept = tmp_path / "kept"
  kept.mkdir()
  (four / "1").rename(kept / "1")
  (four / "1").symlink_to(kept / "1")
  (four / "2").rename(four / "best")  # a link to a neighbour
  (four / "2").symlink_to("best")
  data = _largest(four / "3")  # a link inside a step
  data.rename(kept / "data")
  data.symlink_to(kept / "data")
  os.link(_largest(four / "4"), kept / "linked")
  before = _contents(kept), _contents(four / "best")
  _save(four, 5, 6, keep=2)
  assert sorted(p.name for p in four.iterdir()) == ["5", "6", "best"]
  assert (_contents(kept), _contents(four / "best")) == before and steps.damage(kept / "1") is None
  assert f"the link {four / '1'} is removed" in capsys.readouterr().err


def test_a_folder_of_checkpoints_may_lie_elsewhere(four, tmp_path):
  four.rename(tmp_path / "disk")
  four.symlink_to(tmp_path / "disk")
  _save(four, 5, keep=2)
  assert steps.steps_of(tmp_path / "disk") == [5, 4]


@pytest.mark.parametrize("fault", ["a step that cannot be deleted", "a mount point"])
def test_an_old_step_that_stays_stops_no_run_and_is_said_once(four, monkeypatch, capsys, fault):
  def failing(path):
    raise OSError(errno.EACCES, "Permission denied")

  if fault == "a mount point":
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("/1"))
  else:
    monkeypatch.setattr(steps.files, "remove", failing)
  before = _contents(four / "1")
  checkpointer = Checkpointer(four, 2, {})
  for step in (5, 6):
    checkpointer.save(_state(step))
  checkpointer.wait()
  assert capsys.readouterr().err.count(f"the old step {four / '1'} ") == 1
  _assert_same(_restore(four), _state(6))
  if fault == "a mount point":
    assert _contents(four / "1") == before
  else:
    monkeypatch.undo()
    _save(four, 7, keep=2)  # what could not be deleted goes when it can be
    assert sorted(p.name for p in four.iterdir()) == ["6", "7"]


@pytest.mark.parametrize("what", ["link", "dangling link", "file", "folder"])
def test_what_stands_in_the_place_of_a_step_to_save_is_kept(four, tmp_path, what):
  (tmp_path / "kept").mkdir()
  (tmp_path / "kept" / "notes").write_text("mine")
  place = four / "5"
  if what == "link":
    place.symlink_to(tmp_path / "kept")
  elif what == "dangling link":
    place.symlink_to("nowhere")
  elif what == "file":
    place.write_text("mine")
  else:
    (tmp_path / "kept").rename(place)
  _save(four, 5)
  _assert_same(_restore(four), _state(5))
  aside = four / "5.replaced"
  assert os.path.lexists(aside) and not (four / "5").is_symlink()
  if what in ("link", "folder"):
    assert (aside / "notes").read_text() == "mine"


def test_a_full_disk_stops_the_run_and_names_what_is_left(copy, monkeypatch):
  full = OSError(errno.ENOSPC, "No space left on device")

  class Failing:
    def result(self):
      raise full

  checkpointer = Checkpointer(copy, 10, {})
  monkeypatch.setattr(ocp, "save_checkpointables_async", lambda *a, **k: Failing())
  checkpointer.save(_state(6))
  with refused("step 6", "No space left", copy / "4", error=Stopped):
    checkpointer.wait()
  checkpointer.wait()  # said once

  def at_once(*args, **kwargs):
    raise full

  monkeypatch.setattr(ocp, "save_checkpointables_async", at_once)
  with refused("No space left", error=Stopped):
    checkpointer.save(_state(8))


# --- finding and loading ----------------------------------------------------------------------------------


def test_resolve_takes_a_workdir_its_folder_or_one_step(saved):
  workdir = saved.parent
  assert native.resolve(workdir) == native.resolve(saved) == (workdir, saved / "4")
  assert native.resolve(saved / "2") == (workdir, saved / "2")


def test_resolve_says_what_is_wrong(copy):
  def wrong(path: pathlib.Path, *named: object) -> None:
    with refused(*named):
      native.resolve(path)

  wrong(copy.parent / "nowhere", copy.parent / "nowhere")
  wrong(copy.parent.parent, copy.parent.parent, "checkpoints/")
  wrong(copy / "7", copy / "7")
  (copy / "4" / steps.MANIFEST).unlink()
  wrong(copy / "4", copy / "4")
  shutil.rmtree(copy / "2")
  wrong(copy.parent, copy.parent)
  (copy.parent / "config.json").unlink()
  wrong(copy.parent, "config.json")


def test_load_params_gives_the_averaged_or_the_raw_weights(saved):
  state = _state(4)
  for weights, trained in (("ema", state.ema), ("raw", state.trained)):
    params = native.load_params(native.resolve(saved.parent)[1], weights)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, {**trained, **state.frozen}))


def test_a_converted_checkpoint_comes_back_and_has_no_raw_weights(tmp_path):
  params = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}}
  config = {"model": {"width": 1}, "data": {"template": "chat"}}
  workdir = tmp_path / "converted"
  native.save_params(workdir, params, config, Tokenizer.load(tiny.TOKENIZER))
  assert np.array_equal(native.load_params(native.resolve(workdir)[1])["a"]["b"], params["a"]["b"])
  assert native.read_config(workdir) == config
  assert Tokenizer.load(workdir / "tokenizer").vocabulary_size > 0
  with refused("raw"):
    native.load_params(native.resolve(workdir)[1], "raw")


@pytest.mark.parametrize(
  "text, field",
  [
    ("{", "cannot be read"),
    ("[]", "cannot be read"),
    pytest.param("[" * 5000, "cannot be read", id="deep"),
    pytest.param('{"a":' * 200 + "1" + "}" * 200, "cannot be read", id="nested"),
    ('{"model": 1, "data": {"template": "x"}}', "no field model"),
    ('{"data": {"template": "x"}}', "no field model"),
    ('{"model": {"w": 1}}', "no field data.template"),
  ],
)
def test_a_wrong_config_file_is_named(tmp_path, text, field):
  (tmp_path / "config.json").write_text(text)
  with refused("config.json", field):
    native.read_config(tmp_path)
