"""Breaks a training run again and again for as long as you like, and checks that nobody would have noticed.

  python tests/tools/soak.py runs/soak --minutes=10
  python tests/tools/soak.py runs/soak --minutes=120 --config=configs/stage2.py:tiny --seed=1

First a run that nothing disturbs; then the same run, struck by one random fault per start (tests/tools/faults.py lists
them; besides, kills from outside at any moment and inside a save, SIGTERM once and twice, and bits flipped in the
newest checkpoint). A line of JSON per fault goes to FOLDER/faults.jsonl. After each fault every loss so far must equal
the undisturbed run's bit for bit; at the end of a run, all parameters and moments too. Exit code 1 if anything differs.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jflow.interop.native import newest_valid
from jflow.interop.steps import sealed_steps
from jflow.training.metrics import read_metrics

STEPS, INTERVAL, WATCHDOG = 60, 4, 15
INSIDE = (
  "raise",
  "sleep",
  "hold",
  "segfault",
  "abort",
  "kill",
  "full",
)  # tests/tools/faults.py, in the process itself
OUTSIDE = ("kill at any moment", "kill in a save", "freeze, then kill", "terminate", "terminate twice")
ON_DISK = ("flip a bit", "cut a file", "delete a file")
FAULTS = 2 * OUTSIDE + INSIDE + ON_DISK
SMALL = (
  "train.batch_size=4",
  "world.fit_images=20",
  "data.shapes.size=60",
  "model.autoencoder.kind=patch_pca",
  "model.autoencoder.block_channels=()",
  "model.autoencoder.patch_size=4",
  "model.autoencoder.window=4",
  f"train.steps={STEPS}",
  f"checkpoint.interval={INTERVAL}",
  "checkpoint.keep=3",
  "log.every_seconds=0",
)


class Soak:
  """The undisturbed run, and the one that is struck."""

  def __init__(self, folder: pathlib.Path, config: str, seed: int):
    self._folder, self._config, self._random = folder, config, random.Random(seed)
    self._log = folder / "output.log"

  def _command(self, workdir: pathlib.Path, *fault: str, watchdog: int = 0) -> list[str]:
    fields = [f"--config.{field}" for field in SMALL]
    fields += [
      f"--config={self._config}",
      f"--workdir={workdir}",
      f"--config.train.watchdog_seconds={watchdog}",
    ]
    fields += [f"--config.compute.compilation_cache={self._folder / 'compiled'}"]
    program = ["tests/tools/faults.py", *fault, "--"] if fault else ["-m", "jflow", "train"]
    return [sys.executable, *program, *fields]

  def _start(self, command: list[str]) -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    with open(self._log, "w") as log:
      return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

  def reference(self) -> tuple[dict[int, str], str]:
    """Runs to the end undisturbed; returns what the struck run must equal."""
    workdir = self._folder / "undisturbed"
    shutil.rmtree(workdir, ignore_errors=True)
    if self._start(self._command(workdir)).wait():
      raise SystemExit(f"the undisturbed run failed:\n{self._log.read_text()[-2000:]}")
    return losses(workdir), fingerprint(workdir)

  def strike(self, workdir: pathlib.Path) -> dict:
    """One start of the run and one fault; returns what happened."""
    fault = self._random.choice(FAULTS)
    if not sealed_steps(workdir / "checkpoints") or sealed_steps(workdir / "checkpoints")[1:] == []:
      fault = self._random.choice(OUTSIDE)  # there is nothing on disk to fall back to yet
    before = newest_step(workdir)
    step = self._random.randint(before + 1, min(before + 3 * INTERVAL, STEPS - 1))
    began = time.monotonic()
    if fault in ON_DISK:
      row = {"damaged": self._damage(workdir, fault)}
      code = self._wait(self._start(self._command(workdir, "kill", str(step), "0")))
      row["noticed"] = "is not used" in self._log.read_text()
    elif fault in INSIDE:
      watchdog = WATCHDOG if fault in ("sleep", "hold") else 0
      command = self._command(workdir, fault, str(step), "0", watchdog=watchdog)
      row, code = {}, self._wait(self._start(command))
    else:
      process = self._start(self._command(workdir))
      row, code = self._from_outside(process, fault, workdir, step)
    resumed = re.search(r"going on from step (\d+)", self._log.read_text())
    return row | {
      "fault": fault,
      "code": code,
      "resumed_from": int(resumed[1]) if resumed else 0,
      "reached": newest_step(workdir),
      "seconds": round(time.monotonic() - began, 2),
    }

  def _wait(self, process: subprocess.Popen) -> int:
    try:
      return process.wait(timeout=600)
    except subprocess.TimeoutExpired:  # a stall that nothing ended: the one thing that must not be
      process.kill()
      process.wait()
      return 999

  def _from_outside(self, process: subprocess.Popen, fault: str, workdir: pathlib.Path, step: int):
    saving = lambda: any("tmp" in p.name for p in (workdir / "checkpoints").glob("*"))
    ready = lambda: newest_step(workdir) >= step and (fault != "kill in a save" or saving())
    if fault == "kill at any moment":  # also while it starts, restores or compiles
      until = time.monotonic() + self._random.uniform(0.5, 15)
      ready = lambda: time.monotonic() > until
    while process.poll() is None and not ready():
      time.sleep(0.003)
    signals = {
      "freeze, then kill": (signal.SIGSTOP, signal.SIGKILL),
      "terminate": (signal.SIGTERM,),
      "terminate twice": (signal.SIGTERM, signal.SIGTERM),
    }.get(fault, (signal.SIGKILL,))
    for signum in signals:
      process.send_signal(signum)
      time.sleep(0.05)
    return {}, self._wait(process)

  def _damage(self, workdir: pathlib.Path, fault: str) -> str:
    newest = workdir / "checkpoints" / str(newest_valid(workdir / "checkpoints"))
    files = sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size and p.name != "manifest.json")
    file = self._random.choice(files)
    content = bytearray(file.read_bytes())
    if fault == "delete a file":
      file.unlink()
    elif fault == "cut a file":
      file.write_bytes(content[: len(content) // 2])
    else:
      content[self._random.randrange(len(content))] ^= 1 << self._random.randrange(8)
      file.write_bytes(content)
    return str(file.relative_to(workdir))


def newest_step(workdir: pathlib.Path) -> int:
  """The last step whose metrics are written."""
  rows = read_metrics(workdir)
  return rows[-1]["step"] if rows else 0


def losses(workdir: pathlib.Path) -> dict[int, str]:
  """step -> the losses and the gradient's norm, as Python writes floats: equal text, equal bits."""
  names = ("loss", "loss_text", "loss_flow", "loss_alignment", "grad_norm")
  return {row["step"]: repr([row[name] for name in names]) for row in read_metrics(workdir)}


def fingerprint(workdir: pathlib.Path) -> str:
  """sha256 over everything that the last checkpoint holds."""
  import jax
  import numpy as np
  from orbax.checkpoint import v1 as ocp

  step_dir = (workdir / "checkpoints" / str(newest_valid(workdir / "checkpoints"))).absolute()
  state = ocp.load_checkpointables(step_dir)
  digest = hashlib.sha256()
  for path, leaf in jax.tree.leaves_with_path(state):
    digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
  return digest.hexdigest()


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--minutes", type=float, default=10.0)
  parser.add_argument("--config", default="configs/stage1.py:tiny")
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  args.folder = args.folder.absolute()
  args.folder.mkdir(parents=True, exist_ok=True)
  soak = Soak(args.folder, args.config, args.seed)
  wanted, final = soak.reference()
  until, workdir = time.monotonic() + 60 * args.minutes, args.folder / "struck"
  shutil.rmtree(workdir, ignore_errors=True)
  rows, differing, runs, wrong_ends = [], 0, 0, 0
  with open(args.folder / "faults.jsonl", "w", encoding="utf-8") as log:
    while time.monotonic() < until:
      row = soak.strike(workdir)
      got = losses(workdir)
      row["differing"] = sum(got[step] != wanted[step] for step in got)
      row["missing"] = len(set(range(1, max(got, default=0) + 1)) - set(got))
      differing += row["differing"] + row["missing"]
      if max(got, default=0) >= STEPS - 1 or row["code"] == 0:
        code = soak._wait(soak._start(soak._command(workdir)))
        row["finished"] = code == 0 and fingerprint(workdir) == final and losses(workdir) == wanted
        runs, wrong_ends = runs + 1, wrong_ends + (not row["finished"])
        shutil.rmtree(workdir, ignore_errors=True)
      rows.append(row)
      print(json.dumps(row), file=log, flush=True)
      print(json.dumps(row), flush=True)
  survived = sum(not row["differing"] and not row["missing"] and row["code"] != 999 for row in rows)
  silent = [row for row in rows if "damaged" in row]
  stalls = [row["seconds"] for row in rows if row["fault"] in ("sleep", "hold")]
  print(
    f"kills survived {survived}/{len(rows)}, differing losses {differing}; complete runs equal to the undisturbed one "
    f"{runs - wrong_ends}/{runs}; silent corruption {sum(not row['noticed'] for row in silent)}/{len(silent)}; "
    f"longest stalled start {max(stalls, default=0):.0f} s (watchdog {WATCHDOG} s)"
  )
  return int(survived < len(rows) or wrong_ends > 0 or any(not row["noticed"] for row in silent))


if __name__ == "__main__":
  sys.exit(main())
