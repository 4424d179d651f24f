"""Several processes are one run: same losses, same decisions, and all end when one fails.

All but the first test train a toy (tests/hosts_worker.py): what is tested is the loop, its hosts and checkpoints.
"""

import json
import pathlib
import signal

import numpy as np
import pytest
from jobs import TRAIN, WORKER, Job
from refusals import refused
from runs import SMALL

from jflow.data.store import prepare
from jflow.interop import native
from jflow.interop.steps import damage
from jflow.training.metrics import read_lines

# Four steps of stage 1 from the fits on; one block of each kind compiles sooner.
REAL = (
  "--config=configs/stage1.py:tiny",
  *SMALL,
  "--config.world.fit_labels=32",
  "--config.train.steps=4",
  "--config.checkpoint.interval=2",
  "--config.mesh.data=2",
  "--config.mesh.fsdp=2",
)


def losses(workdir: pathlib.Path) -> np.ndarray:
  """f64[steps, 2]: step and loss of each line."""
  return np.array([(row["step"], row["loss"]) for row in read_lines(workdir / "metrics.jsonl")])


@pytest.mark.soak  # the toy's runs below, and one process over 16 devices in test_mesh.py, are the same law in parts
def test_two_processes_of_two_devices_train_as_one_of_four(tmp_path, compilation_cache):
  """The whole program over real `jax.distributed`, from the fits before the first step on."""
  fields = (*REAL, f"--config.compute.compilation_cache={compilation_cache}")
  one, two = tmp_path / "one", tmp_path / "two"
  with Job(tmp_path, TRAIN, *fields, f"--workdir={one}", processes=1, devices=4) as job:
    assert job.codes(500) == [0], job.said(0)
  with Job(tmp_path, TRAIN, *fields, f"--workdir={two}", processes=2, devices=2) as job:
    assert job.codes(500) == [0, 0], job.said(0) + job.said(1)
    assert "fitting SigLIP to 32 labelled pictures" in job.said(0) and "step 4/4" in job.said(0)
    assert "step " not in job.said(1) and "jflow: " not in job.said(1)  # one process speaks
  ours, theirs = (read_lines(run / "metrics.jsonl") for run in (two, one))
  assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [1, 2, 3, 4]
  for name in ("loss", "loss_text", "loss_flow", "loss_alignment", "grad_norm", "fill"):
    np.testing.assert_allclose([row[name] for row in ours], [row[name] for row in theirs], rtol=1e-5)
  manifest = json.loads((two / "checkpoints" / "4" / "manifest.json").read_text())
  assert any("process_1" in name for name in manifest["files"])
  assert damage(two / "checkpoints" / "4") is None
  assert manifest["config"]["mesh"] == {"data": 2, "fsdp": 2, "model": 1} and manifest["commit"]
  kernels = [native.load_params(run / "checkpoints" / "4")["generation_projector"]["kernel"] for run in (two, one)]
  np.testing.assert_allclose(*kernels, rtol=1e-4, atol=1e-6)


def toy(
  tmp_path, name: str, *fault: object, processes: int = 2, devices: int = 1, steps: int = 40, fields=(), heartbeat=6
) -> Job:
  """A run of the toy over all devices."""
  (tmp_path / f"{name}.logs").mkdir(exist_ok=True)
  every = (
    f"--workdir={tmp_path / name}",
    f"--config.mesh.fsdp={processes * devices}",
    "--config.checkpoint.interval=5",
    f"--config.train.steps={steps}",
    "--config.compute.compilation_cache=",
    *fields,
  )
  return Job(
    tmp_path / f"{name}.logs",
    (*WORKER, *map(str, fault), "--"),
    *every,
    processes=processes,
    devices=devices,
    heartbeat=heartbeat,
  )


def test_a_process_that_ends_late_is_waited_for(tmp_path):
  """Process 0 may seal a checkpoint or paint long after the others are done, longer than a heartbeat."""
  code = (
    "import sys, time\nfrom jflow.config import DistributedConfig\nfrom jflow.training import hosts\n"
    "values = dict(part.removeprefix('--config.distributed.').split('=') for part in sys.argv[1:])\n"
    "hosts.start(DistributedConfig(cluster='', coordinator=values['coordinator'], processes=2, start_seconds=60,"
    " process_id=int(values['process_id']), heartbeat_seconds=2))\n"
    "hosts.any_of(False)\ntime.sleep(8 * hosts.is_first())"
  )
  with Job(tmp_path, ("-c", code)) as job:
    assert job.codes() == [0, 0], job.said(0) + job.said(1)


def rejected(workdir: pathlib.Path) -> list[dict[str, int]]:
  """Records left out, by reason, in each of the first four steps."""
  return [row["rejected"] for row in read_lines(workdir / "metrics.jsonl")[:4]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> pathlib.Path:
  """The toy's run that nothing disturbs, on one process."""
  directory = tmp_path_factory.mktemp("whole")
  with toy(directory, "run", processes=1) as job:
    assert job.codes() == [0], job.said(0)
  return directory / "run"


@pytest.fixture(scope="module")
def whole(alone) -> np.ndarray:
  """The losses of that run."""
  return losses(alone)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path, alone, whole):
  """2 processes, then 1, then 2 of 2 devices: no step twice, none missing, the same losses.

  Records that another process left out are counted.
  """
  for steps, processes, devices in ((12, 2, 1), (23, 1, 1), (40, 2, 2)):
    with toy(tmp_path, "run", processes=processes, devices=devices, steps=steps) as job:
      assert job.codes() == [0] * processes, job.said(0)
  np.testing.assert_allclose(losses(tmp_path / "run"), whole, rtol=1e-5)
  assert rejected(tmp_path / "run") == [{}, {}, {"other_processes": 1}, {}]
  assert rejected(alone) == [{}, {}, {"checksum": 1}, {}]


def test_in_blocks_two_processes_train_as_one(tmp_path):
  """Bit for bit, where the devices are as many."""
  lines = [{"text": f"n{i} said. " * (5 + i * 7 % 40)} for i in range(300)]
  (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
  prepare.prepare("text", str(tmp_path / "set"), "text", str(tmp_path / "in.jsonl"), part_records=10)
  blocks = dict(order="blocks", block_records=20, block_window=2, block_lanes=2, workers=0, mixture="((0,(0,0,1)),)")
  sources = dict(understanding=(), generation=(), text=((str(tmp_path / "set"), 1.0),))
  fields = [f"--config.data.{name}={value}" for name, value in blocks.items()]
  fields += [f"--config.data.sources.{name}={value}" for name, value in sources.items()]
  made = []
  for name, processes in (("one", 1), ("two", 2)):
    with toy(tmp_path, name, processes=processes, devices=2 // processes, steps=12, fields=fields) as job:
      assert job.codes() == [0] * processes, job.said(0)
    made.append(losses(tmp_path / name))
  assert len(made[0]) == 12
  np.testing.assert_array_equal(*made)


@pytest.mark.parametrize("interval", [1, pytest.param(5000, marks=pytest.mark.soak)])
def test_a_signal_to_any_process_stops_all_after_the_same_step(tmp_path, whole, interval):
  """Also where every step waits for its numbers before it is saved."""
  run = tmp_path / "run"
  with toy(tmp_path, "run", steps=2000, fields=(f"--config.checkpoint.interval={interval}",)) as job:
    job.wait_for(lambda: len(read_lines(run / "metrics.jsonl")) > 20)
    job.send(1)  # not the one that writes
    job.wait_for(lambda: "saving before exit" in job.said(1))
    job.send(0)  # and again, to another and to the same: it changes nothing
    job.send(1)
    assert job.codes() == [143, 143], job.said(0) + job.said(1)
    assert "the same command goes on from there" in job.said(0)
  steps = losses(run)[:, 0]
  assert native.newest_valid(run / "checkpoints") == steps[-1] == len(steps)
  with toy(tmp_path, "run", steps=int(steps[-1]) + 3, processes=1) as job:
    assert job.codes() == [0]
  np.testing.assert_array_equal(losses(run)[:, 0], np.arange(1, steps[-1] + 4))  # no step lost, none repeated


@pytest.mark.parametrize(
  "fault, process",
  [
    ("raise", 1),
    ("kill", 0),
    ("freeze", 1),
    *(pytest.param(fault, at, marks=pytest.mark.soak) for fault, at in (("raise", 0), ("kill", 1), ("freeze", 0))),
  ],
)
def test_a_process_that_fails_ends_the_whole_job(tmp_path, whole, fault, process):
  """Whatever happens to either process, the other ends too, with a code that is not 0, within a minute."""
  with toy(tmp_path, "run", fault, 8, process, heartbeat=2) as job:
    job.wait_for(lambda: any(p.poll() is not None for p in job.processes))  # to start takes as long as it takes
    assert job.processes[1 - process].wait(60) != 0
    if fault != "freeze":  # only the kernel or the cluster's engine ends a process that stands still
      assert job.processes[process].wait(60) == {"raise": 1, "kill": -signal.SIGKILL}[fault]
    if fault == "raise":
      assert f"process {process} ends by this error" in job.said(process)
      assert "a fault was asked for" in job.said(process)
  if (fault, process) in (("raise", 1), ("kill", 1)):  # the run goes on from its last whole checkpoint
    with toy(tmp_path, "run", processes=1) as job:
      assert job.codes() == [0], job.said(0)
    np.testing.assert_allclose(losses(tmp_path / "run"), whole, rtol=1e-5)


def test_the_watchdog_ends_a_stalled_job_and_prints_where_it_stood(tmp_path):
  """The stalled process lives and its heartbeats go on: only the missing step tells."""
  with toy(tmp_path, "run", "sleep", 8, 1, fields=("--config.train.watchdog_seconds=4",)) as job:
    assert all(job.codes(60))
    said = [job.said(0), job.said(1)]
  assert any("no step for 4 s (train.watchdog_seconds=4) after step" in text for text in said)
  assert any("most recent call first" in text for text in said), said


def test_the_watchdog_ends_a_process_whose_interpreter_is_held(tmp_path):
  """Not even another thread of Python gets to run: the watchdog's second half is C."""
  fields = ("--config.train.watchdog_seconds=2",)
  with toy(tmp_path, "run", "hold", 8, 0, fields=fields, processes=1) as job:
    assert job.codes(60) == [1]
    assert "tests/tools/faults.py" in job.said(0) and "most recent call first" in job.said(0)


def test_a_taken_workdir_ends_all_processes_and_one_says_why(tmp_path):
  from jflow.training import workdir as workdirs

  held = workdirs.lock(tmp_path / "run")
  with toy(tmp_path, "run") as job:
    assert job.codes() == [2, 2]
    assert "is in use by another trainer (pid" in job.said(0) and job.said(0).count("\n") == 0
    assert job.said(1) == ""
  workdirs.unlock(held)


def test_processes_that_never_come_are_one_line(tmp_path):
  fields = ("--config.distributed.processes=3", "--config.distributed.start_seconds=3")
  program = (
    *WORKER,
    "--",
    f"--workdir={tmp_path / 'run'}",
    *fields,
    "--config.distributed.coordinator=127.0.0.1:1",
  )
  (tmp_path / "logs").mkdir()
  with Job(tmp_path / "logs", program, "--config.distributed.process_id=1", processes=1) as job:
    assert job.codes(60)[0] not in (0, None)
    assert "did not come together" in job.said(0) or "DEADLINE_EXCEEDED" in job.said(0)


def test_a_task_of_a_slurm_step_that_was_not_told_so_is_refused(monkeypatch):
  import tiny

  from jflow.training import hosts

  monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
  monkeypatch.setenv("SLURM_PROCID", "3")
  with refused("3 of 8", "--config.distributed.cluster=auto"):
    hosts.start(tiny.configuration().distributed)


# --- one process ------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path, whole):
  with toy(tmp_path, "run", "full", 13, 0, processes=1) as job:
    assert job.codes() == [1], job.said(0)
    assert "Traceback" not in job.said(0)
    last = job.said(0).splitlines()[-1]
    assert last.startswith("jflow: ") and ("cannot be written" in last or "could not be written" in last)
  # The save of step 10 may have been under way.
  assert native.newest_valid(tmp_path / "run" / "checkpoints") in (5, 10)
  with toy(tmp_path, "run", processes=1) as job:
    assert job.codes() == [0], job.said(0)
  np.testing.assert_array_equal(losses(tmp_path / "run"), whole)


def test_the_record_of_a_killed_run_adds_up(tmp_path):
  """G1: productive + save + restore + compile + setup + lost is the time from the first start to the last end."""
  from jflow.training.goodput import summary

  for fault in (("kill", 13, 0), ()):
    with toy(tmp_path, "run", *fault, processes=1) as job:
      assert job.codes() == [-signal.SIGKILL if fault else 0]
  got = summary(tmp_path / "run")
  lines = read_lines(tmp_path / "run" / "goodput.jsonl")
  parts = sum(got[name] for name in ("productive", "save", "restore", "compile", "setup", "sample", "lost"))
  assert parts == pytest.approx(lines[-1]["t"] - lines[0]["t"], rel=0.01)
  assert got["starts"] == 2 and got["lost"] > 0 and 0 < got["goodput"] < 1
  assert json.loads((tmp_path / "run" / "goodput.json").read_text())["wall"] == pytest.approx(got["wall"], abs=0.01)
