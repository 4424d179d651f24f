"""The command `plot`."""

import argparse

from jflow.cli.arguments import Parser, path, whole
from jflow.errors import UserError, need_extra
from jflow.outputs import make_directory, new_file
from jflow.training import plots

_EPILOG = """
examples:
  python -m jflow plot runs/stage2 --output=losses.png
  python -m jflow plot runs/with runs/without --metric=loss_flow,grad_norm --smooth=50 --output=compared.png
Runs may still be going. Of two runs the differences of the steps that both have are drawn too, second minus first, with
the 95 % interval of their mean, as if steps did not depend on each other. It needs the extra `plots`.
"""


def parser() -> argparse.ArgumentParser:
  """The flags of `plot`."""
  p = Parser(
    prog="python -m jflow plot",
    description="Draws metrics.jsonl of runs: smoothed curves, and paired differences of two runs.",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  p.add_argument("runs", nargs="+", metavar="RUN", type=path, help="workdir of a run")
  p.add_argument("--output", required=True, metavar="FILE", type=path, help="a PNG, PDF or SVG file")
  p.add_argument("--metric", metavar="NAME,...", help="metrics to draw (default: the loss and its parts)")
  p.add_argument(
    "--smooth",
    type=whole(least=1),
    metavar="N",
    help="steps that a point is the mean of (default: a fiftieth of the longest run)",
  )
  return p


def main(argv: list[str]) -> int:
  """Reads, draws and says by how much two runs differ in the end."""
  args = parser().parse_args(argv)
  form = args.output.suffix[1:].lower()
  if form not in plots.FORMATS:
    raise UserError(f"--output={args.output} must end in .{', .'.join(plots.FORMATS)}")
  need_extra("plots", "matplotlib")
  make_directory(args.output.parent, "--output")
  if args.output.is_dir():
    raise UserError(f"--output={args.output} is a directory: name a file")
  runs = {}
  for run in args.runs:
    if str(run) in runs:
      raise UserError(f"{run} is named twice")
    runs[str(run)] = plots.read_run(run)
  metrics = args.metric.split(",") if args.metric is not None else plots.losses_of(list(runs.values()))
  plots.check_metrics(runs, metrics)
  window = args.smooth or max(1, max(map(len, runs.values())) // 50)
  with new_file(args.output) as new:
    plots.save(plots.figure(runs, metrics, window), new, form)
  for metric in metrics:
    curves = [plots.curve(rows, metric) for rows in runs.values()]
    for name, one in zip(runs, curves, strict=True):
      if not len(one.steps):
        print(f"{metric}: {name} has none")
    if len(curves) == 2 and (found := plots.last_difference(*curves, window)):
      print(
        f"{metric}: second minus first {found.mean:+.4g} (95 % interval {found.low:+.4g} to {found.high:+.4g}) over the "
        f"last {window} steps to {found.step}"
      )
  print(f"{', '.join(metrics)} of {len(runs)} run{'s' * (len(runs) > 1)}: {args.output}")
  return 0
