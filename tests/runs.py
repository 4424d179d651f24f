"""Tiny runs of `train` as a user starts them."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import tiny

from jflow.cli import train as train_command
from jflow.training.metrics import read_metrics

INTERVAL, STEPS = 4, 24  # of a save, of a stage
SMALL = (
  "--config.train.batch_size=4",
  "--config.world.fit_images=20",
  "--config.data.shapes.size=60",
  "--config.model.autoencoder.kind=patch_pca",
  "--config.model.autoencoder.block_channels=()",
  "--config.model.autoencoder.patch_size=4",
  "--config.model.autoencoder.window=4",
  "--config.model.generation.encoder_blocks=1",
  "--config.model.generation.decoder_blocks=1",
  f"--config.checkpoint.interval={INTERVAL}",
)


def environment() -> dict[str, str]:
  return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def command(config: str, workdir: pathlib.Path, cache: str, *fields: str) -> list[str]:
  """The command line of a run of `STEPS` steps."""
  return [
    sys.executable,
    "-m",
    "jflow",
    "train",
    f"--config={config}",
    f"--workdir={workdir}",
    f"--config.compute.compilation_cache={cache}",
    f"--config.train.steps={STEPS}",
    *fields,
  ]


def command_of(stage: int, workdir: pathlib.Path, cache: str, before: pathlib.Path | str, *fields: str) -> list[str]:
  """The command line of a stage; `before` is the run or checkpoint it starts from."""
  return [
    *command(f"configs/stage{stage}.py:tiny", workdir, cache),
    *SMALL,
    f"--config.train.init_from={before}",
    *[f"--config.optimizer.muon={tiny.MUON}"] * (stage == 3),
    *fields,
  ]


def train(*args) -> subprocess.CompletedProcess:
  """A run to its end; arguments as `command_of` takes them."""
  done = subprocess.run(command_of(*args), cwd=tiny.ROOT, env=environment(), capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done


def inside(flags: Sequence[str], workdir: pathlib.Path, steps: int, *more: str) -> list[dict]:
  """The metrics of a run to its end in this process."""
  assert not train_command.main([*flags, f"--workdir={workdir}", f"--config.train.steps={steps}", *more])
  return read_metrics(workdir)
