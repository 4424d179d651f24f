"""The workdir: one trainer at a time, one config and one tokenizer per run, metrics without repeated steps."""

import errno
import fcntl
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from refusals import refused

from jflow.config import RunConfig
from jflow.data.tokenizer import Tokenizer
from jflow.errors import Stopped
from jflow.objectives.alignment import AlignmentConfig
from jflow.sections import completed, flat
from jflow.training import workdir as workdirs
from jflow.training.goodput import Goodput, summary
from jflow.training.metrics import Lines, read_lines

TOKENIZER = Tokenizer.load(str(tiny.TOKENIZER))


def test_a_second_trainer_is_refused_until_the_first_ends(tmp_path):
  first = workdirs.lock(tmp_path / "run")
  with refused(tmp_path / "run", f"pid {os.getpid()} on"):
    workdirs.lock(tmp_path / "run")
  workdirs.unlock(first)
  workdirs.unlock(workdirs.lock(tmp_path / "run"))


def test_the_lock_of_a_killed_trainer_is_taken_over_and_named(tmp_path, capsys):
  """The kernel frees the lock of a process that ends, however it ends."""
  code = "import pathlib, sys, time; from jflow.training import workdir; held = workdir.lock(pathlib.Path(sys.argv[1]))"
  other = subprocess.Popen(
    [sys.executable, "-c", f"{code}; print('held', flush=True); time.sleep(60)", str(tmp_path)],
    cwd=tiny.ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert other.stdout.readline() == "held\n"
  with refused(f"pid {other.pid}"):
    workdirs.lock(tmp_path)
  other.kill()
  other.communicate()
  workdirs.unlock(workdirs.lock(tmp_path))
  assert f"pid {other.pid} on" in capsys.readouterr().err
  workdirs.unlock(workdirs.lock(tmp_path))
  assert capsys.readouterr().err == ""


def test_a_lock_that_a_dead_host_left_is_waited_for(tmp_path, monkeypatch, capsys):
  """A network disk frees it when the lease ends; whoever is on this host is alive."""
  tries, real = [], fcntl.flock

  def flock(handle, operation):
    tries.append(operation)
    if len(tries) < 4:
      raise BlockingIOError(errno.EWOULDBLOCK, "held")
    real(handle, operation)

  (tmp_path / "lock").write_text("pid 7 on another-node since 2026-01-01 00:00:00\n")
  monkeypatch.setattr(workdirs.time, "sleep", lambda seconds: None)
  monkeypatch.setattr(fcntl, "flock", flock)
  workdirs.unlock(workdirs.lock(tmp_path))
  assert "is held by pid 7 on another-node since 2026-01-01 00:00:00; waiting up to 120 s" in capsys.readouterr().err
  (tmp_path / "lock").write_text("pid 7 on another-node since 2026-01-01 00:00:00\n")
  tries.clear()
  name = os.uname().nodename  # as a pod that has moved to another machine
  (tmp_path / "lock").write_text(f"pid 7 on {name} (00000000) since 2026-01-01 00:00:00\n")
  workdirs.unlock(workdirs.lock(tmp_path))
  assert f"is held by pid 7 on {name} (00000000)" in capsys.readouterr().err
  (tmp_path / "lock").write_text("pid 7 on another-node since 2026-01-01 00:00:00\n")
  tries.clear()
  monkeypatch.setattr(workdirs, "_LEASE", -1)
  with refused("pid 7", "another-node"):
    workdirs.lock(tmp_path)


def test_a_disk_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
  def flock(handle, operation):
    raise OSError(errno.ENOSYS, "Function not implemented")

  monkeypatch.setattr(fcntl, "flock", flock)
  workdirs.unlock(workdirs.lock(tmp_path))
  assert "cannot be locked (Function not implemented): take care that" in capsys.readouterr().err


def test_a_workdir_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with refused("file/run"):
    workdirs.lock(tmp_path / "file" / "run")


def test_a_workdir_in_a_bucket_says_how(tmp_path):
  with refused("bucket/run"):
    workdirs.claim(pathlib.Path("gs://bucket/run"), tiny.configuration(), TOKENIZER)


def test_a_start_that_is_refused_leaves_no_trace_of_a_trainer_that_died(tmp_path, capsys):
  _begin(tmp_path, tiny.configuration())
  for _ in range(2):
    with refused("learning_rate"):
      workdirs.claim(tmp_path, tiny.configuration(optimizer=dict(learning_rate=0.5)), TOKENIZER)
  assert capsys.readouterr().err == ""


def test_a_workdir_that_is_not_shared_is_named(tmp_path):
  with refused(str(tmp_path)):
    workdirs.check_shared(tmp_path)


def _begin(workdir: pathlib.Path, config: RunConfig) -> None:
  workdirs.write_config(workdir, config, TOKENIZER)


def test_a_workdir_with_another_config_names_the_field(tmp_path):
  config = tiny.configuration()
  workdirs.check_same_run(tmp_path, config, TOKENIZER)
  _begin(tmp_path, config)
  workdirs.check_same_run(tmp_path, config, TOKENIZER)
  other = tiny.configuration(optimizer=dict(learning_rate=0.5))
  with refused("optimizer.learning_rate", "0.01", "0.5"):
    workdirs.check_same_run(tmp_path, other, TOKENIZER)
  with refused("model.objectives.alignment.hidden_dim", "16", "8"):
    workdirs.check_same_run(
      tmp_path, config.replace(model=dict(objectives=(("alignment", AlignmentConfig(1, 8)),))), TOKENIZER
    )


def test_every_field_that_differs_is_named(tmp_path):
  _begin(tmp_path, tiny.configuration())
  other = tiny.configuration(optimizer=dict(learning_rate=0.5), train=dict(seed=4))
  with refused("learning_rate=0.01", "0.5", "train.seed=3", "4"):
    workdirs.check_same_run(tmp_path, other, TOKENIZER)


def _rewritten(workdir: pathlib.Path, section: str, change) -> None:
  """Changes the plain values of a section of config.json, as another version of jflow has written it."""
  _begin(workdir, tiny.configuration())
  values = json.loads((workdir / "config.json").read_text())
  change(values[section])
  (workdir / "config.json").write_text(json.dumps(values))


def test_a_run_that_painted_samples_by_fields_of_its_log_goes_on(tmp_path):
  """They were of the pictures in its log alone, so they say nothing about how its checkpoints are sampled."""
  _rewritten(tmp_path, "log", lambda section: section.update(sample_steps=30, sample_guidance=2.0))
  workdirs.check_same_run(tmp_path, tiny.configuration(), TOKENIZER)
  workdirs.check_same_run(tmp_path, tiny.configuration(sampling=dict(guidance=5.0)), TOKENIZER)


@pytest.mark.parametrize("value", [0, 0.0, "", [], False, None])
def test_a_field_that_is_gone_must_have_been_off(tmp_path, value):
  """An update of jflow must not end a run, nor change what it computes."""
  _rewritten(tmp_path, "train", lambda section: section.update(dropped=value))
  workdirs.check_same_run(tmp_path, tiny.configuration(), TOKENIZER)
  _rewritten(tmp_path, "train", lambda section: section.update(dropped=7))
  with refused("train.dropped", "7"):
    workdirs.check_same_run(tmp_path, tiny.configuration(), TOKENIZER)


def test_a_field_that_is_new_is_as_before_it_was_there(tmp_path):
  _rewritten(tmp_path, "optimizer", lambda section: section.pop("muon"))
  workdirs.check_same_run(tmp_path, tiny.configuration(), TOKENIZER)
  with refused("optimizer.muon", "[]", "['a']"):
    workdirs.check_same_run(tmp_path, tiny.configuration(optimizer=dict(muon=("a",))), TOKENIZER)
  _rewritten(tmp_path, "optimizer", lambda section: section.pop("beta1"))
  with refused("optimizer.beta1", "0.9"):
    workdirs.check_same_run(tmp_path, tiny.configuration(), TOKENIZER)


def test_a_run_of_the_first_version_goes_on(tmp_path):
  """Its config.json has none of the fields that came later, and two that are gone."""
  config = tiny.configuration(train=dict(spike_window=128))
  values = config.to_dict()
  values["model"]["contrastive"], values["objective"]["weights"]["contrastive"] = False, 0.0
  for name, _ in flat(completed({}, RunConfig)):
    section, _, field = name.rpartition(".")
    functools.reduce(dict.__getitem__, section.split(".") if section else (), values).pop(field)
  (tmp_path / "config.json").write_text(json.dumps(values))
  shutil.copytree(tiny.TOKENIZER, tmp_path / "tokenizer")
  workdirs.check_same_run(tmp_path, config, TOKENIZER)


def test_what_does_not_change_the_run_may_change(tmp_path):
  _begin(tmp_path, tiny.configuration())
  changed = tiny.configuration(
    train=dict(steps=900, accumulation=2, max_skipped=99),
    data=dict(max_rejected_share=0.5),
    checkpoint=dict(keep=9),
    mesh=dict(data=4),
    distributed=dict(processes=4),
    compute=dict(remat="full", unroll=2, attention="xla"),
  )
  workdirs.check_same_run(tmp_path, changed, TOKENIZER)
  with refused("compute.dtype", "float32", "bfloat16"):
    workdirs.check_same_run(tmp_path, tiny.configuration(compute=dict(dtype="bfloat16")), TOKENIZER)


def test_a_tokenizer_is_known_by_its_files_and_not_by_its_path(tmp_path):
  """A checkout that has moved goes on; another tokenizer at the same path does not."""
  _begin(tmp_path, tiny.configuration())
  moved = tiny.configuration(data=dict(tokenizer="/elsewhere/tokenizer"))
  workdirs.check_same_run(tmp_path, moved, TOKENIZER)
  shutil.copytree(tiny.TOKENIZER, tmp_path / "other")
  file = tmp_path / "other" / "tokenizer_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 7}))
  with refused("tokenizer"):
    workdirs.check_same_run(tmp_path, tiny.configuration(), Tokenizer.load(str(tmp_path / "other")))


def test_metrics_of_steps_that_are_computed_again_are_dropped(tmp_path):
  file = Lines(tmp_path / "metrics.jsonl", 1)
  for step in range(1, 6):
    file.write({"step": step, "loss": float(np.float32(0.1) * step)})
  file.close()
  with open(tmp_path / "metrics.jsonl", "a") as f:
    f.write('{"step": 6, "lo')  # a kill has cut the line
  assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
  Lines(tmp_path / "metrics.jsonl", 4).close()
  assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_the_metrics_stops_the_run_in_one_line(tmp_path):
  import os

  file = Lines(tmp_path / "metrics.jsonl")
  full = os.open("/dev/full", os.O_WRONLY)
  os.dup2(full, file._file)  # every write from here on finds the disk full
  with refused("metrics.jsonl", "No space left", error=Stopped):
    file.write({"step": 1})
  os.close(full)
  file.close()


# --- where the time went ----------------------------------------------------------------------------------


def test_the_parts_of_a_killed_run_add_up_to_the_time_that_passed(tmp_path):
  record = Goodput(tmp_path, time.time())
  for phase, step, seconds in (
    ("setup", None, 0.01),
    ("restore", 0, 0.02),
    ("compile", 1, 0.03),
    ("steps", 4, 0.04),
    ("save", 4, 0.01),
    ("steps", 6, 0.05),
  ):
    time.sleep(seconds)
    record.mark(phase, step)
  record.close()  # killed: steps 5 and 6 are lost, and the time until the next start
  time.sleep(0.06)
  again = Goodput(tmp_path, time.time())
  time.sleep(0.01)
  again.mark("restore", 4)
  time.sleep(0.02)
  again.steps(9, now=True)
  got = summary(tmp_path)
  parts = sum(got[name] for name in ("productive", "save", "restore", "compile", "setup", "sample", "lost"))
  lost = read_lines(tmp_path / "goodput.jsonl")
  assert parts == pytest.approx(got["wall"]) and got["wall"] == pytest.approx(lost[-1]["t"] - lost[0]["t"])
  assert got["starts"] == 2
  assert got["lost"] == pytest.approx(lost[6]["t"] - lost[5]["t"] + lost[7]["t"] - lost[6]["t"], abs=1e-6)
  assert got["productive"] == pytest.approx(lost[4]["t"] - lost[3]["t"] + lost[9]["t"] - lost[8]["t"], abs=1e-6)


def test_steps_are_booked_once_a_second_at_most(tmp_path):
  record = Goodput(tmp_path, time.time())
  for step in range(1, 50):
    record.steps(step)
  record.steps(50, now=True)
  assert [row["step"] for row in read_lines(tmp_path / "goodput.jsonl")] == [None, 50]
