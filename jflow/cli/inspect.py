"""`python -m jflow prepare --inspect`: an image of packed rows as the model receives them."""

import argparse
import pathlib
import sys

import numpy as np

from jflow.batch import TASKS, Batch
from jflow.cli.arguments import Parser, path, whole
from jflow.config import RunConfig
from jflow.data import inspection, mixture
from jflow.data.pipeline import Pipeline
from jflow.data.store.prepared import read_summary
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError, need_extra
from jflow.training import config_files

_EPILOG = """\
examples
  python -m jflow prepare --inspect data/chat --rows=4 --output=rows.png
  python -m jflow prepare --inspect --config=configs/stage2.py:tiny --rows=6 --step=10000     # a run's own mixture
  python -m jflow prepare --inspect data/paint --config=configs/stage3.py --config.data.tokenizer=JanusFlow-1.3B

Fields of the config are set as for training, --config.FIELD=VALUE. Without a tokenizer in the config the one of the
built-in world cuts the text, and lengths are not those of a real run."""


def main(argv: list[str]) -> int:
  """Runs the command line."""
  parser = Parser(
    prog="python -m jflow prepare",
    description="Draws packed rows: images in place, decoded text, samples by colour, what is learned, fill and lengths.",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add(
    "--inspect",
    metavar="DIR",
    nargs="?",
    default="",
    const="",
    help="a prepared data set; without it the config's sources",
  )
  add("--rows", type=whole(), default=4, help="rows to draw (default 4)")
  add(
    "--output",
    metavar="FILE",
    type=path,
    default=pathlib.Path("rows.png"),
    help="PNG (default rows.png)",
  )
  add(
    "--config",
    metavar="FILE[:SIZE]",
    help="row, template, mixture (default with DIR: stage2 at 384)",
  )
  add("--step", type=whole(), default=0, help="of the run (default 0)")
  args, fields = parser.parse_known_args(argv)
  if args.rows < 1:
    raise UserError(f"--rows={args.rows} should be at least 1")
  if args.step < 0:
    raise UserError(f"--step={args.step} should not be negative")
  if args.output.suffix.lower() != ".png":
    raise UserError(f"--output={args.output}: the picture is a PNG, so its name should end in .png")
  if not args.inspect and args.config is None:
    raise UserError("--inspect needs a data set (--inspect DIR), or a run's --config=FILE[:SIZE]")
  unknown = next((field for field in fields if not field.startswith("--config.")), None)
  if unknown:
    raise UserError(
      f"unknown argument {unknown!r} beside --inspect: there are --rows, --step, --output, --config, --config.FIELD"
    )
  need_extra("plots", "matplotlib")  # its fonts
  args.config = args.config or "stage2"
  config = config_files.load(args.config, fields)
  picture, count = render(config, args.inspect, args.rows, args.step, f"{args.inspect or args.config}")
  try:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(args.output, "PNG")
  except OSError as error:
    raise UserError(f"--output={args.output} cannot be written: {error.strerror}") from error
  fewer = ", all that there are," if count < args.rows else ""
  print(f"{count} row{'s' * (count != 1)}{fewer} in {args.output}, {picture.width} x {picture.height} pixels")
  return 0


def render(config: RunConfig, directory: str, rows: int, step: int, title: str):
  """Returns an image of rows of a data set, or of a run's mixture where `directory` is empty, and their number.

  Repeated rows, of a data set with fewer rows than requested, are drawn once.

  Args:
    config: of a run.
    directory: a prepared data set; empty for the sources of the config.
    rows: number of rows; of a run, spread over the batch and thus over its tasks.
    step: of the run.
    title: of the image.
  """
  from jflow.training import setup  # imports jax, which --help does not need

  batch_size = config.train.batch_size
  if directory:
    task = read_summary(directory)["task"]
    sources = {name: ((directory, 1.0),) if name == task else () for name in TASKS}
    config = config.replace(data=dict(sources=sources, mixture=((0, tuple(float(name == task) for name in TASKS)),)))
    batch_size = rows
  if not config.data.tokenizer:
    small = config_files.load("stage2:tiny").data.tokenizer
    print(f"jflow: no config.data.tokenizer, so {small} cuts the text", file=sys.stderr)
    config = config.replace(data=dict(tokenizer=small))
  tokenizer = Tokenizer.load(config.data.tokenizer)
  shape = setup.row_shape(config, config.model)
  schedule = mixture.without_empty(config.data.mixture, config.data.sources)[1] or mixture.assumed(config.data)
  tasks = [task for task, _ in mixture.StepPlan(schedule, batch_size, step + 1)[step]]
  by_task = np.argsort(tasks, kind="stable")
  share = by_task[np.linspace(0, batch_size - 1, min(rows, batch_size)).round().astype(int)].tolist()
  pipeline = Pipeline(config.data, tokenizer, shape, batch_size, config.train.seed, share)
  for line in pipeline.report():
    print(f"jflow: {line}", file=sys.stderr)
  batch = pipeline.batch(step)
  shown = {}
  for place, (task, source, pieces) in enumerate(pipeline.pieces(step)):
    row = inspection.Row(task, source, Batch(*(array[place] for array in batch)))
    shown.setdefault((task, source, *(piece[1:] for piece in pieces)), row)  # in any epoch
  counted = [inspection.histograms(s.task, s.name, s.plan, shape.tokens) for s in pipeline.sources()]
  return inspection.draw(list(shown.values()), counted, shape, tokenizer, title), len(shown)
