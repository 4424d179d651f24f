"""The command `bench`: how fast a workload runs here, as one JSON object.

Each workload is a module with `add_flags(parser)`, which needs no jax, and `run(args) -> report`.
"""

import argparse
import importlib
import pathlib
import sys

from jflow.cli.arguments import Parser
from jflow.cli.flags import check_json
from jflow.outputs import write_json

# Workload -> (module, what it measures).
WORKLOADS: dict[str, tuple[str, str]] = {
  "train": ("jflow.perf.train", "the train step of a config: tokens/s, MFU, memory, and its parts alone"),
  "generate": ("jflow.perf.generate", "painting: solver and VAE, alone or beside PyTorch"),
  "understand": (
    "jflow.perf.understand",
    "answering: first token and the ones after it, alone or beside PyTorch",
  ),
  "data": ("jflow.perf.data", "the input pipeline beside the plain loop: decode and resize"),
}


def main(argv: list[str]) -> int:
  """Runs one workload, prints its report as a table, and writes it where --json says."""
  parser = Parser(
    prog="python -m jflow bench",
    description="Measures a workload. Ratios come from one run, side by side; nothing is compared with old runs.",
  )
  chosen = parser.add_subparsers(dest="workload", required=True, metavar="|".join(WORKLOADS))
  for name, (module, what) in WORKLOADS.items():
    sub = chosen.add_parser(name, help=what, description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the report as JSON")
    importlib.import_module(module).add_flags(sub)
  args = parser.parse_args(argv)
  check_json(args)
  report = importlib.import_module(WORKLOADS[args.workload][0]).run(args)
  for name, value in report.items():
    print(f"{name:24} {_readable(value)}")
  if args.json:
    write_json(args.json, report)
    print(f"report: {args.json}", file=sys.stderr)
  return 0


def _readable(value: object) -> str:
  if isinstance(value, dict):
    return "  ".join(f"{k} {_readable(v)}" for k, v in value.items())
  if isinstance(value, float):
    return f"{value:.4g}"
  return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
