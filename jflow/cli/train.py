"""The command `train`: trains one stage."""

import argparse
import functools
import pathlib
import shlex
import sys
from collections.abc import Collection, Sequence
from typing import Any

from jflow import values
from jflow.cli.arguments import Parser
from jflow.config import RunConfig
from jflow.errors import Terminated, UserError, need_text_name
from jflow.training import config_files

_EPILOG = """
A config is a Python file with get_config(size), or the name of one that comes with jflow (stage2, also written
configs/stage2.py); the part behind the colon is the size:
  384 (none named), 256  the paper's models    tiny  for trying things out, in a minute or two, on the built-in world
  quick, shapes, world   learn the built-in world, in minutes or hours of two cores     mid  for `bench`
  janus/stage1 to janus/stage3 are those of Janus and Janus-Pro (1b, pro-1b, pro-7b, and the small ones); tune and janus/tune put
  adapters beside the frozen weights of a checkpoint; grpo and dpo (janus/grpo, janus/dpo) learn from rewards and from pairs
Stages start from the one before (stage 1 from `convert --from=huggingface-parts`, or stage 0 of the built-in world):
  python -m jflow train --config=configs/stage2.py:tiny --workdir=runs/try
  python -m jflow train --config=configs/stage2.py --workdir=runs/stage2 --config.train.init_from=runs/stage1 \\
    --config.mesh.fsdp=8 --config.train.accumulation=16      # 512 rows on 8 GPUs, 4 at a time on each; and its
  data and tokenizer, as under "Pretrain" in configs/README.md
Set any field of configs/base.py with --config.FIELD=VALUE, for example
  --config.train.steps=100 --config.optimizer.learning_rate=3e-4 --config.mesh.data=8
Tuning on one's own data (configs/README.md, "Tune it by adapters"); data sets of `prepare`, to paint, to read, or both:
  python -m jflow train --config=tune --workdir=runs/mine --config.train.init_from=CHECKPOINT \\
    "--config.data.sources.generation=(('data/mine',1.0),)"
A share of the records, --config.data.validation=0.05, is held out; every train.validation_every steps their loss stands in
metrics.jsonl as val_loss; after train.early_stop such losses without a lower one the run ends, and its best step is what
other commands load. Before the first step a line says what a step takes of a device's memory, by kind.
The model's sizes are those of the checkpoint in train.init_from, where --config.model.FIELD=VALUE sets no other.
Stop it at any moment; the same command goes on from the last checkpoint in the workdir. It refuses data sets that hold
something else than before, wherever they lie now; --accept_data goes on with them, and with them from then on.
"""


def _generate_samples(config: RunConfig, model: Any, tokenizer: Any, params: Any, prompts: Sequence[str]) -> list[Any]:
  """Images of prompts, sampled as by `generate`, on one device; on a CPU in float32, since XLA has not all of bfloat16."""
  import jax
  import jax.numpy as jnp

  from jflow import sharding
  from jflow.inference.pipeline import Pipeline

  with jax.set_mesh(sharding.make_mesh(1, 1, 1, devices=jax.local_devices()[:1])):
    if jax.default_backend() == "cpu":
      model = model.clone(dtype=jnp.dtype("float32"))
    pipeline = Pipeline(model, params, tokenizer, config.data.template, sampling=config.sampling)
    return pipeline.generate(prompts, seed=0)


def _start_sections(workdir: pathlib.Path, config: RunConfig, given: Collection[str]) -> dict[str, Any]:
  from jflow.training import start_model  # after the flags, too

  return start_model.sections_of(config, given, workdir)


def _workdir(text: str) -> pathlib.Path:
  if what := values.text(text) or ("" if text else "must name a directory"):
    raise UserError(f"--workdir={text[:100]!r} {what}")
  return pathlib.Path(text)


def _next(config: RunConfig, workdir: pathlib.Path) -> list[str]:
  """The commands that follow a run, by what it has learned."""
  run, sources = shlex.quote(f"--checkpoint={workdir}"), config.data.sources
  writes, reads = bool(sources.generation or config.rl.method), bool(sources.understanding)
  commands = []
  if writes or not reads:
    commands.append(f"generate {run} --prompt=... --output=pictures")
  if reads and not writes:
    commands.append(f"understand {run} --image=... --question=...")
  own = [name for name, _ in (*sources.generation, *sources.understanding) if pathlib.Path(name).is_dir()]
  if config.data.validation and own:
    data = shlex.quote(f"--data={own[0]}")
    commands.append(f"evaluate --benchmark=records {run} {data} --split=held-out --output=scores")
  if config.lora.rank:
    commands.append(
      f"convert --adapter {shlex.quote(f'--input={workdir}')} --output=adapter   # what it learned, alone"
    )
  return commands


def main(argv: list[str]) -> int:
  """Parses the flags and trains; returns 143 or 130 after SIGTERM or SIGINT, when the state is saved."""
  parser = Parser(
    prog="python -m jflow train",
    description="Trains one stage.",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--config", metavar="FILE[:SIZE]", required=True, help="for example configs/stage2.py:tiny")
  parser.add_argument("--workdir", metavar="DIR", required=True, type=_workdir, help="directory of this run")
  parser.add_argument(
    "--accept_data",
    metavar="HASH",
    default="",
    help="go on with other data than the run has begun with; the refusal of such a start names HASH",
  )
  known, settings = parser.parse_known_args(argv)
  need_text_name("--workdir", known.workdir)
  config = config_files.load(known.config, settings, functools.partial(_start_sections, known.workdir))

  from jflow.rl.run import method
  from jflow.training import hosts  # after the flags: a typo needs no import of jax
  from jflow.training.loop import train
  from jflow.training.metrics import read_metrics

  try:
    sampler = functools.partial(_generate_samples, config)
    train(config, known.workdir, sampler, known.accept_data, method=method(config))
  except Terminated as error:
    hosts.say(str(error))
    return 128 + error.signum
  except BaseException as error:
    hosts.leave(error)
    raise
  if not hosts.is_first():
    return 0
  rows = read_metrics(known.workdir)
  if rows:
    loss = "not finite" if rows[-1].get("loss") is None else f"{rows[-1]['loss']:.4f}"
    print(
      f"done: step {rows[-1]['step']}, loss {loss}; checkpoints in {known.workdir / 'checkpoints'}",
      file=sys.stderr,
    )
  for command in _next(config, known.workdir):
    print(f"next: python -m jflow {command}", file=sys.stderr)
  return 0
