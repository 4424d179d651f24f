"""The command `evaluate`: predictions sample by sample, then scores, then a report."""

import argparse
import dataclasses
import textwrap

from jflow.cli import flags
from jflow.cli.arguments import SEED, Parser, path, share, whole
from jflow.evaluation.settings import Settings

_EPILOG = """
benchmarks:
{benchmarks}

examples:
  python -m jflow evaluate --benchmark=shapes --checkpoint=world --output=scores/shapes
  python -m jflow evaluate --benchmark=records --checkpoint=runs/tuned --data=data/mine --split=held-out --output=scores/mine
  python -m jflow evaluate --benchmark=pope --checkpoint=JanusFlow-1.3B --data=LMUData --output=scores/pope
  python -m jflow evaluate --benchmark=geneval --checkpoint=JanusFlow-1.3B --vae=sdxl-vae --data=geneval --output=scores/geneval
  python -m jflow evaluate --benchmark=geneval --checkpoint=JanusFlow-1.3B --vae=sdxl-vae --data=geneval --output=scores/geneval \\
    --results=results.jsonl          # what GenEval's own evaluator wrote for scores/geneval/pictures
  python -m jflow evaluate --benchmark=shapes --checkpoint=world --output=scores/sweep \\
    --sweep_guidance=1,2,4 --sweep_steps=5,30

The same command goes on where it was stopped. Several processes share the work as --part=1/4 ... --part=4/4 with the
same --output, each on a device of its own; the last one to end writes the report.
"""


class _Parser(Parser):
  """A parser that lists the benchmarks in its help, and imports them only for that."""

  def format_help(self) -> str:
    self.epilog = _EPILOG.format(benchmarks=_listed())
    return super().format_help()


def _listed() -> str:
  """The list of benchmarks for the help, each with its measure and the source of its data."""
  from jflow.evaluation import benchmarks

  width = max(map(len, benchmarks.names()))
  indent = " " * (width + 6)
  lines = []
  for kind in map(benchmarks.get, benchmarks.names()):
    janus = " and Janus's papers" if "codes" in kind.paper else ""
    paper = f" [JanusFlow's {kind.section}{janus}]" if kind.section else ""
    lines.append(f"  {kind.name:{width}}  {kind.what}{paper}")
    lines.append(textwrap.indent(textwrap.fill(kind.where, 110 - len(indent)), indent))
  return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
  """The flags of `evaluate`."""
  p = _Parser(
    prog="python -m jflow evaluate",
    description="Scores a checkpoint: records.jsonl, report.json and report.html in --output.",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  p.add_argument("--benchmark", required=True, metavar="NAME", help="one of those below, or a Python file with one")
  flags.add_model(p)
  flags.add_template(p)
  flags.add_adapter(p)
  p.add_argument("--data", type=path, metavar="DIR", help="the benchmark's data, see below (shapes needs none)")
  p.add_argument("--output", required=True, type=path, metavar="DIR", help="where everything goes")
  p.add_argument(
    "--limit",
    type=whole(1),
    metavar="N",
    help="only the first N prompts and the first N questions, of each split; records: N of them, evenly spread (default 64)",
  )
  p.add_argument("--only", choices=("pictures", "questions"), help="shapes: leaves out the other half")
  p.add_argument("--split", default="", help="vqav2: val (default) or test-dev; records: held-out or held-out:SHARE")
  p.add_argument(
    "--batch_size",
    type=whole(1, 100_000),
    default=Settings.batch_size,
    help="samples at once (default %(default)s)",
  )
  p.add_argument(
    "--seed",
    type=whole(most=SEED),
    default=Settings.seed,
    help="added to the seeds of the pictures (default %(default)s)",
  )
  flags.add_settings(p, "default, unless benchmark or checkpoint has its own:")
  p.add_argument("--pictures", type=whole(1, 1000), metavar="N", help="pictures per prompt (default: the benchmark's)")
  p.add_argument(
    "--part",
    type=share,
    default=(1, 1),
    metavar="K/N",
    help="the K-th of N processes: makes every N-th sample from the K-th",
  )
  p.add_argument("--results", type=path, metavar="FILE", help="what an outside scorer wrote: into the report")
  p.add_argument(
    "--features",
    type=path,
    metavar="FILE",
    help="mjhq, mjhq10k: the .npz that launch/experiments/features.py writes",
  )
  p.add_argument(
    "--cache",
    default=Settings.cache,
    metavar="DIR",
    help="keeps compiled programs, and features of true pictures (default %(default)s; empty: nothing)",
  )
  flags.add_sweeps(p)
  return p


def settings_of(args: argparse.Namespace) -> Settings:
  """The settings from the flags, without those of a sweep."""
  names = {field.name for field in dataclasses.fields(Settings)} - {"sampling", "part"}
  (number, parts), values = args.part, {name: getattr(args, name) for name in names}
  return Settings(**values, part=(number - 1, parts), sampling=flags.settings_of(args))


def main(argv: list[str]) -> int:
  """Predicts, scores and writes the report."""
  args = parser().parse_args(argv)
  settings = settings_of(args)
  if grid := flags.sweeps_of(args):
    from jflow.evaluation.sweep import sweep

    sweep(settings, grid)
  else:
    from jflow.evaluation.runner import evaluate

    evaluate(settings)
  return 0
