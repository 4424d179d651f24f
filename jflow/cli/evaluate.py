"""The command `evaluate`: predictions sample by sample, then scores, then a report."""

import argparse
import math
import os
import pathlib
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from jflow.cli.arguments import SEED, Parser, listed, number, whole
from jflow.errors import UserError
from jflow.evaluation.recipes import RECIPES, Recipe

_EPILOG = """benchmarks:
{benchmarks}

examples:
  python -m jflow evaluate --benchmark=shapes --checkpoint=quickstart/stage3 --output=scores/shapes
  python -m jflow evaluate --benchmark=pope --checkpoint=JanusFlow-1.3B --data=LMUData --output=scores/pope
  python -m jflow evaluate --benchmark=geneval --checkpoint=JanusFlow-1.3B --vae=sdxl-vae --data=geneval --output=scores/geneval
  python -m jflow evaluate --benchmark=geneval --checkpoint=JanusFlow-1.3B --vae=sdxl-vae --data=geneval --output=scores/geneval \\
    --results=results.jsonl          # what GenEval's own evaluator wrote for scores/geneval/pictures
  python -m jflow evaluate --benchmark=shapes --checkpoint=quickstart/stage3 --output=scores/sweep \\
    --sweep_guidance=1,2,4 --sweep_steps=5,30

The same command goes on where it was stopped. Several processes share the work as --part=0/4 ... --part=3/4 with the
same --output, each on a device of its own; the last one to end writes the report.
"""


def parser() -> argparse.ArgumentParser:
  """The flags of `evaluate`."""
  width = max(map(len, RECIPES))
  indent = " " * (width + 6)
  names = "\n".join(
    f"  {name:{width}}  {recipe.what}\n{textwrap.indent(textwrap.fill(recipe.data, 110 - len(indent)), indent)}"
    for name, recipe in RECIPES.items()
  )
  p = Parser(
    prog="python -m jflow evaluate",
    description="Scores a checkpoint: records.jsonl, report.json and report.html in --output.",
    epilog=_EPILOG.format(benchmarks=names),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  p.add_argument("--benchmark", required=True, choices=RECIPES, metavar="NAME", help="one of those below")
  p.add_argument(
    "--checkpoint",
    required=True,
    metavar="DIR",
    help="official directory, or a jflow workdir or step; also gs://...",
  )
  p.add_argument("--vae", metavar="DIR", help="SDXL-VAE, for a checkpoint that holds none")
  p.add_argument("--data", type=pathlib.Path, metavar="DIR", help="the benchmark's data, see below (shapes needs none)")
  p.add_argument("--output", required=True, type=pathlib.Path, metavar="DIR", help="where everything goes")
  p.add_argument(
    "--limit", type=whole(1), metavar="N", help="only the first N prompts and the first N questions, of each split"
  )
  p.add_argument("--only", choices=("pictures", "questions"), help="shapes: leaves out the other half")
  p.add_argument("--split", default="", help="vqav2: val (default) or test-dev")
  p.add_argument(
    "--batch_size",
    type=whole(1, 100_000),
    default=16,
    help="samples at once (default %(default)s)",
  )
  p.add_argument(
    "--seed", type=whole(most=SEED), default=0, help="added to the seeds of the pictures (default %(default)s)"
  )
  p.add_argument("--steps", type=whole(1, 10_000), help="solver steps (default: the recipe's 30)")
  p.add_argument("--guidance", type=number(most=1e6), help="w of eq. 5 (default: the recipe's 2)")
  p.add_argument("--pictures", type=whole(1, 1000), metavar="N", help="pictures per prompt (default: the recipe's)")
  p.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype (default: float32 on a CPU)")
  p.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a jflow training run")
  p.add_argument("--part", type=_part, default=(0, 1), metavar="K/N", help="make every N-th sample, from the K-th")
  p.add_argument("--results", type=pathlib.Path, metavar="FILE", help="what an outside scorer wrote: into the report")
  p.add_argument(
    "--features",
    type=pathlib.Path,
    metavar="FILE",
    help="mjhq, mjhq10k: the .npz that launch/experiments/features.py writes",
  )
  p.add_argument(
    "--cache",
    default="~/.cache/jflow",
    metavar="DIR",
    help="keeps compiled programs, and features of true pictures (default %(default)s; empty: nothing)",
  )
  p.add_argument(
    "--sweep_guidance", type=listed(number(most=1e6)), metavar="W,W,...", help="one evaluation for each, and a plot"
  )
  p.add_argument(
    "--sweep_steps", type=listed(whole(most=10_000)), metavar="S,S,...", help="one evaluation for each, and a plot"
  )
  return p


def main(argv: list[str]) -> int:
  """Predicts, scores, writes the report."""
  args = parser().parse_args(argv)
  if args.sweep_guidance or args.sweep_steps:
    from jflow.evaluation import sweep

    return sweep.main(args)
  return evaluate(args, {})


def evaluate(args: argparse.Namespace, opened: dict[str, Any]) -> int:
  """Runs one evaluation.

  Args:
    args: flags of the command.
    opened: keeps what the next evaluation of a sweep reads too: where the checkpoint lies, its fingerprint, and the
      model by its dtype.
  """
  check_flags(RECIPES[args.benchmark], args)
  recipe = with_flags(RECIPES[args.benchmark], args)
  benchmark = make(recipe, args)
  tasks = benchmark.tasks()
  from jflow import checks
  from jflow.evaluation import report
  from jflow.evaluation.samples import Samples
  from jflow.evaluation.tasks import Painting
  from jflow.interop import checkpoints

  seeds = [task.seed for task in tasks if isinstance(task, Painting)]
  checks.seed(args.seed, max(seeds, default=args.seed) - args.seed)
  if "fingerprint" not in opened:
    opened["checkpoint"] = checkpoints.locate(args.checkpoint)
    opened["fingerprint"] = report.fingerprint(opened["checkpoint"], args.weights, args.vae)
  settings = settings_of(recipe, args, opened["fingerprint"], benchmark.data_files())
  samples = Samples(args.output, settings, args.part)
  predict(args, recipe, settings["dtype"], tasks, samples, opened)
  records = samples.read()
  missing = sum(task.key not in records for task in tasks)
  if missing:
    print(f"this part is done; {missing} of {len(tasks)} samples are left to the other parts", file=sys.stderr)
    return 0
  result = benchmark.score(records)
  before = report.scored_before(args.output, settings)
  read = str(opened["checkpoint"])
  body = before if before and not result.scores else _write(args, read, recipe, settings, result, before)
  print(report.table(body))
  for note in body["notes"]:
    print(note)
  print(f"report: {args.output / 'report.html'} (and report.json)", file=sys.stderr)
  return 0


def _write(
  args: argparse.Namespace,
  read: str,
  recipe: Recipe,
  settings: dict[str, Any],
  result: Any,
  before: dict[str, Any] | None,
) -> dict[str, Any]:
  """Writes the report, with notes on what differs from the recipe and on what an outside scorer has found.

  `read`: the directory that the checkpoint was read from. `before`: an earlier report on the same predictions; a FID
  on pictures that were resized the other way stays.
  """
  from jflow.evaluation import report
  from jflow.evaluation.scores import Score

  usual, notes, scores = RECIPES[recipe.name], list(result.notes), dict(result.scores)
  for name, score in (before or {}).get("scores", {}).items():
    if name.startswith("FID") and name not in scores:
      scores[name] = Score(**{field: score.get(field) for field in Score._fields})
  changed = [
    f"--{name}={getattr(args, name)}"
    for name in ("guidance", "steps", "pictures", "limit")
    if getattr(args, name) is not None and getattr(args, name) != getattr(usual, name, None)
  ]
  if changed:
    paper = " The paper's scores stand for the recipe." if usual.paper else ""
    notes.append(f"Not the recipe: {', '.join(changed)}.{paper}")
  more = {"checkpoint": args.checkpoint, "read_from": read, "vae": args.vae}
  for name in ("results", "features"):
    path = getattr(args, name)
    if path is not None:
      more[name] = f"{path} (sha256 {report.hash_of([path])[:16]})"
  result = result._replace(notes=notes, scores=scores)
  return report.write(args.output, recipe.name, recipe.what, result, recipe.paper, {**settings, **more})


def check_flags(recipe: Recipe, args: argparse.Namespace) -> None:
  """Raises a UserError for a flag that the benchmark does not know, and for a value that no sampler takes."""
  known = {  # flag -> benchmarks that it belongs to
    "data": set(RECIPES) - {"shapes"},
    "only": {"shapes"},
    "split": {"vqav2"},
    "results": {"geneval", "dpg"},
    "features": {"mjhq", "mjhq10k"},
    **dict.fromkeys(("steps", "guidance"), {name for name, one in RECIPES.items() if not one.prompt}),
    "pictures": {"shapes", "geneval", "dpg"},
  }
  for flag, names in known.items():
    value = getattr(args, flag)
    if value not in (None, "") and recipe.name not in names:
      some = ", ".join(sorted(names)) if len(names) < 6 else "other benchmarks"
      raise UserError(f"--{flag}={value} does not belong to --benchmark={recipe.name}, but to {some}")
  if args.guidance is not None and not (args.guidance == 0 or 1 <= args.guidance < math.inf):
    raise UserError(f"--guidance={args.guidance} must be at least 1 (1: none), or 0 (ignore the prompt)")
  for name in ("results", "features"):
    path = getattr(args, name)
    if path is not None and not path.is_file():
      raise UserError(
        f"--{name}={path} does not exist" + (": launch/experiments/features.py writes it" * (name == "features"))
      )


def with_flags(recipe: Recipe, args: argparse.Namespace) -> Recipe:
  """The recipe with what the flags change."""
  changed = {name: getattr(args, name) for name in ("steps", "guidance", "pictures") if getattr(args, name) is not None}
  return recipe._replace(**changed)


def make(recipe: Recipe, args: argparse.Namespace) -> Any:
  """The benchmark: an object with `tasks()` and `score(records)`; data is checked before the model is read."""
  if recipe.name == "shapes":
    from jflow.world.benchmark import WorldBenchmark

    return WorldBenchmark(recipe, args)
  if args.data is None:
    raise UserError(f"--benchmark={recipe.name} needs --data=DIR: {recipe.data}")
  if not args.data.exists():
    raise UserError(f"--data={args.data} does not exist: {recipe.data}")
  if recipe.name == "vqav2":
    from jflow.evaluation.vqav2 import Vqav2Benchmark

    return Vqav2Benchmark(recipe, args.data, args.split or recipe.split, args.limit)
  if recipe.file:
    from jflow.evaluation.tables import TableBenchmark

    return TableBenchmark(recipe, args.data, args.limit)
  from jflow.evaluation import painted

  return painted.BENCHMARKS[recipe.name](recipe, args)


def settings_of(
  recipe: Recipe, args: argparse.Namespace, fingerprint: str, data: Sequence[pathlib.Path] = ()
) -> dict[str, Any]:
  """All that the predictions depend on; `fingerprint` of the checkpoint and its VAE, `data` the benchmark's files."""
  from jflow.evaluation import report

  settings = {
    "benchmark": recipe.name,
    "fingerprint": fingerprint,
    "weights": args.weights,
    "limit": args.limit,
    "data": report.hash_of(data) if data else None,
  }
  settings |= {"seed": args.seed, "dtype": _dtype(args), "split": args.split or recipe.split}
  settings |= {"only": args.only}
  if recipe.prompt:
    from jflow.evaluation.tables import PROMPTS

    row = {"question": "QUESTION", "hint": "HINT", "A": "OPTION A", "B": "OPTION B"}
    settings |= {"prompt": PROMPTS[recipe.prompt](row), "system": recipe.system, "decoding": "greedy"}
    settings["max_tokens"] = recipe.max_tokens
  if not recipe.prompt:
    settings |= {
      "steps": recipe.steps,
      "guidance": recipe.guidance,
      "pictures": recipe.pictures,
      "solver": "euler",
    }
  if recipe.name == "shapes":
    settings["noise"] = "of its own for every picture"
  return settings


def _dtype(args: argparse.Namespace) -> str:
  """The compute dtype: --dtype, or that of the predictions so far, or the usual one of this machine."""
  if args.dtype:
    return args.dtype
  from jflow.evaluation.samples import settings_in

  before = (settings_in(args.output) or {}).get("dtype")
  if before:
    return before
  from jflow.inference.loading import usual_dtype

  return usual_dtype()


def predict(
  args: argparse.Namespace, recipe: Recipe, dtype: str, tasks: list, samples: Any, opened: dict[str, Any]
) -> None:
  """Makes the predictions of this part that have no record yet; loads the model only if there are any."""
  from jflow.evaluation.tasks import Painting, Question, RoundTrip

  records, mine = samples.read(), set(samples.mine([task.key for task in tasks]))
  open_tasks = [task for task in tasks if task.key in mine and not _is_done(task, records, args.output)]
  if not open_tasks:
    return
  import jax

  import jflow
  from jflow.evaluation.tasks import answer, paint, round_trips
  from jflow.progress import Progress

  if dtype not in opened:
    if args.cache:
      jax.config.update("jax_compilation_cache_dir", os.path.expanduser(args.cache))
    opened[dtype] = jflow.load(opened["checkpoint"], vae=args.vae, dtype=dtype, weights=args.weights)
  model = opened[dtype]
  with Progress(len(mine), len(mine) - len(open_tasks), args.benchmark, "samples") as bar:
    paintings = [task for task in open_tasks if isinstance(task, Painting)]
    questions = [task for task in open_tasks if isinstance(task, Question)]
    painting = {"steps": recipe.steps, "guidance": recipe.guidance}
    paint(model, paintings, samples, args.output, args.batch_size, painting, bar.count)
    trips = [task for task in open_tasks if isinstance(task, RoundTrip)]
    round_trips(model, trips, samples, args.output, args.batch_size, bar.count)
    answer(model, questions, samples, args.batch_size, bar.count)


def _is_done(task: Any, records: dict[str, Any], output: pathlib.Path) -> bool:
  """Whether a task has its record, and the file that this names is there."""
  record = records.get(task.key, {})
  if hasattr(task, "file"):
    return record.get("file") == task.file and (output / task.file).is_file()
  return isinstance(record.get("answer"), str)


def _part(text: str) -> tuple[int, int]:
  number, _, parts = text.partition("/")
  digits = all(one.isascii() and one.isdigit() and len(one) < 10 for one in (number, parts))
  if not (digits and int(number) < int(parts)):
    raise argparse.ArgumentTypeError(f"{text!r} must be K/N with K from 0 to N - 1, for example 0/4")
  return int(number), int(parts)
