"""Loader processes: they end with the run, however it ends, and a run whose loader ends says so in one line."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from loading import Numbers, Work

from jflow.data import processes
from jflow.errors import Stopped, UserError
from jflow.interop import native, steps
from jflow.training.metrics import read_lines

ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
QUICK = (  # as little to compile and to plan as can be
  "--config.train.batch_size=4",
  "--config.world.fit_images=8",
  "--config.data.shapes.size=40",
  "--config.model.autoencoder.kind=patch_pca",
  "--config.model.autoencoder.block_channels=()",
  "--config.model.autoencoder.patch_size=4",
  "--config.model.autoencoder.window=4",
  "--config.model.generation.encoder_blocks=1",
  "--config.model.generation.decoder_blocks=1",
)


def _alive(pid: int) -> bool:
  with contextlib.suppress(OSError):
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
  return False


def _gone(pids: list[int], seconds: float = 20) -> list[int]:
  """Which of the processes are still there after so long at most."""
  until = time.monotonic() + seconds
  while (left := [pid for pid in pids if _alive(pid)]) and time.monotonic() < until:
    time.sleep(0.05)
  return left


def _children(pid: int) -> list[int]:
  found = []
  for folder in pathlib.Path("/proc").iterdir():
    with contextlib.suppress(OSError, ValueError):
      if (folder / "stat").read_text().rsplit(")", 1)[1].split()[1] == str(pid):
        found.append(int(folder.name))
  return found


def _loaders(pid: int) -> list[int]:
  """Its processes that load, without the one in which Python keeps names."""
  return [p for p in _children(pid) if "spawn_main" in pathlib.Path(f"/proc/{p}/cmdline").read_text()]


def _shared(pid: int) -> list[str]:
  """Its memory that carries a name, and so can outlive it."""
  lines = pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines()
  return [line for line in lines if "/dev/shm/" in line and not line.endswith("(deleted)")]


def test_batches_come_in_the_order_of_one_process_and_as_they_were():
  loaders = processes.Loaders(Work(11, "none"), 3)
  got = list(loaders)
  loaders.close()
  assert [number for _, number, rest in got] == list(range(11)) and {rest for *_, rest in got} == {"rest"}
  for arrays, number, _ in got:
    assert isinstance(arrays, Numbers) and arrays.empty.shape == (0, 4) and arrays.empty.dtype == np.int8
    assert (arrays.large == number).all() and arrays.large.shape == (2, 2**19) and arrays.large.flags.writeable


def test_what_a_loader_meets_is_raised_where_its_batch_would_stand():
  for fault, error, said in (
    ("user", UserError, "record 5 of DIR is bad"),
    ("bug", RuntimeError, "KeyError: 'five'"),
    ("killed", Stopped, r"loader process 2 of 2 \(pid \d+\) was ended by SIGKILL"),
    ("exit", Stopped, r"loader process 2 of 2 \(pid \d+\) ended with exit code 3"),
  ):
    loaders, got = processes.Loaders(Work(9, fault), 2), []
    with pytest.raises(error, match=said) as raised:
      got += (number for _, number, _ in loaders)
    children = _loaders(os.getpid())
    loaders.close()
    assert not _gone(children) and (error is RuntimeError or "\n" not in str(raised.value))


def test_who_stands_still_is_named():
  loaders = processes.Loaders(Work(9, "stopped"), 2)
  batches = iter(loaders)
  assert [next(batches)[1] for _ in range(5)] == [0, 1, 2, 3, 4]
  until = time.monotonic() + 20
  while not loaders.waiting_for() and time.monotonic() < until:
    time.sleep(0.01)
  assert loaders.waiting_for().startswith("loader process 2 of 2 (pid ")
  children = _loaders(os.getpid())
  loaders.close()
  assert len(children) == 2 and not _gone(children)


_STAGE = """
import sys
sys.path[:0] = {paths!r}
from jflow.data.processes import Loaders
from loading import Work
if __name__ == "__main__":
  loaders = Loaders(Work(10**9, "stopped"), 2)
  batches = iter(loaders)
  print([next(batches)[1] for _ in range(4)], flush=True)
  {then}
"""


@pytest.mark.parametrize(
  "then, code",
  [
    ("import time; time.sleep(600)", -signal.SIGKILL),  # killed from outside
    ("import os; os._exit(1)", 1),  # as the watchdog ends it
    ("raise RuntimeError('by itself')", 1),
  ],
)
def test_loaders_end_with_their_parent_even_when_they_are_stopped(tmp_path, then, code):
  script = tmp_path / "stage.py"
  script.write_text(_STAGE.format(paths=[str(tiny.ROOT), str(tiny.ROOT / "tests")], then=then))
  parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
  assert parent.stdout.readline() == "[0, 1, 2, 3]\n"
  children = _children(parent.pid)
  if code == -signal.SIGKILL:
    assert len(children) == 3 and not any(map(_shared, [parent.pid, *children]))
    parent.kill()
  assert parent.wait(60) == code
  assert not _gone(children)


def test_a_loader_that_stands_still_ends_the_run_with_one_line(tmp_path):
  script = tmp_path / "stage.py"
  then = "from jflow.training.watchdog import Watchdog; dog = Watchdog(1, loaders.waiting_for); dog.beat('step 4'); list(batches)"
  script.write_text(_STAGE.format(paths=[str(tiny.ROOT), str(tiny.ROOT / "tests")], then=then))
  done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
  assert done.returncode == 1 and done.stderr.count("\n") == 1
  assert "jflow: no step for 1 s" in done.stderr and "since loader process 2 of 2 (pid " in done.stderr


@pytest.mark.soak  # the toys above end in the same ways
def test_a_run_whose_loader_or_trainer_is_killed(tmp_path, compilation_cache):
  """Nothing is left of a trainer that is killed, even of a loader that is stopped; a loader that is killed ends it."""
  workdir = tmp_path / "run"
  command = [
    sys.executable,
    "-m",
    "jflow",
    "train",
    "--config=configs/stage1.py:tiny",
    f"--workdir={workdir}",
    "--config.train.steps=100000",
    "--config.checkpoint.interval=10",
    "--config.data.workers=2",
    *QUICK,
    f"--config.compute.compilation_cache={compilation_cache}",
  ]
  errors = tmp_path / "stderr"

  def start(until_step: int) -> tuple[subprocess.Popen, list[int]]:
    with open(errors, "w") as file:
      run = subprocess.Popen(command, cwd=tiny.ROOT, env=ENVIRONMENT, stdout=file, stderr=file)
    metrics = workdir / "metrics.jsonl"
    lines = lambda: metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    ready = lambda: lines() >= until_step and steps.sealed_steps(workdir / "checkpoints")
    while run.poll() is None and not ready():
      time.sleep(0.02)
    children = _children(run.pid)
    assert not any(map(_shared, [run.pid, *children]))
    return run, children

  def check(run: subprocess.Popen, children: list[int], code: int, said: str) -> int:
    assert run.wait(120) == code and not _gone(children)
    last = errors.read_text().splitlines()[-1]
    assert "Traceback" not in errors.read_text() and "leaked" not in errors.read_text()
    assert not said or (said in last and last.startswith("jflow: "))
    assert native.newest_valid(workdir / "checkpoints")
    steps = [row["step"] for row in read_lines(workdir / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    return len(steps)

  run, children = start(10)
  os.kill(_loaders(run.pid)[0], signal.SIGSTOP)  # it hears of nothing any more
  run.kill()
  done = check(run, children, -signal.SIGKILL, "")
  run, children = start(done + 2)
  loader = _loaders(run.pid)[0]
  os.kill(loader, signal.SIGKILL)
  record = json.loads((workdir / "data.json").read_text())  # what the next start compares its data with
  manifest = json.loads((native.resolve(workdir)[1] / "manifest.json").read_text())
  assert manifest["data"] == record and [source["records"] for source in record["understanding"]] == [40]
  check(run, children, 1, f"loader process 1 of 2 (pid {loader}) was ended by SIGKILL")
