"""bench inference: the four measurements that decide whether painting and answering are fast enough, in one command.

Each runs as `bench generate` or `bench understand` in a process of its own, so that none meets the memory of another.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jflow import outputs
from jflow.cli.arguments import whole
from jflow.errors import Stopped, UserError

_FULL = "configs/stage3.py:384"
_PAINT, _ANSWER = ("generate", "--steps=30", "--guidance=2"), ("understand", "--new_tokens=256")
# Name -> what `bench` is asked for.
MEASUREMENTS = {
  "generate 16": (*_PAINT, "--batch_size=16"),
  "generate 1": (*_PAINT, "--batch_size=1"),
  "understand 1": (*_ANSWER, "--batch_size=1"),
  "understand 16": (*_ANSWER, "--batch_size=16"),
}


class Target(NamedTuple):
  """A figure of a report, and what it should be on one H200 with the full model in bfloat16."""

  measurement: str
  figure: str
  read: Callable[[Mapping[str, Any]], float | None]
  bound: float
  at_least: bool = True


_versus_torch = lambda report: report.get("speedup", {}).get("all")
TARGETS = (
  Target("generate 16", "times PyTorch", _versus_torch, 2.0),
  Target("generate 16", "pictures per second", lambda r: r["images_per_second"], 4.0),
  Target("generate 1", "times PyTorch", _versus_torch, 2.0),
  Target("generate 1", "seconds per picture", lambda r: 1 / r["images_per_second"], 0.5, at_least=False),
  Target("understand 1", "tokens per second", lambda r: r["tokens_per_second"], 745.0),
  Target("understand 1", "share of the memory bandwidth", lambda r: r["bandwidth_share"], 0.5),
  Target("understand 16", "times PyTorch", _versus_torch, 3.0),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Declares the flags."""
  parser.epilog = """\
examples
  python -m jflow bench inference --json=inference.json                             # one H200
  python -m jflow bench inference --config=configs/stage3.py:tiny --versus=none --repeats=1 --json=tiny.json # anywhere

A measurement that --json holds already is not repeated: the same command goes on where it was stopped. The targets are
those for one H200 with the full model in bfloat16 and are judged there only. --versus=none leaves PyTorch out."""
  add = parser.add_argument
  add("--config", metavar="FILE[:SIZE]", default=_FULL, help="random weights of this size (default %(default)s)")
  add("--versus", choices=("torch", "none"), default="torch", help="PyTorch in turn (default %(default)s)")
  add("--repeats", type=whole(most=100_000), default=5, help="timed rounds (default %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Measures what is missing and returns the report; each measurement is written as soon as it is there.

  Raises:
    UserError: no --json, or one that another command has written.
    Stopped: measurements that failed, by name; the others are kept.
  """
  if not args.json:
    raise UserError("give --json=FILE: the measurements are kept there, and the same command goes on with it")
  if args.json.exists() and not args.json.is_file():
    raise UserError(f"--json={args.json} must be a file: it is read again, and replaced")
  if args.repeats < 1:
    raise UserError(f"--repeats={args.repeats} must be at least 1")
  settings = {"config": args.config, "versus": args.versus, "repeats": args.repeats}
  report = _kept(args.json, settings)
  failed = []
  for name, flags in MEASUREMENTS.items():
    if name in report["measurements"]:
      print(f"bench: {name}: kept from before", file=sys.stderr)
      continue
    print(f"bench: {name} ...", file=sys.stderr, flush=True)
    versus = () if args.versus == "none" else (f"--versus={args.versus}",)
    measured = _measure([*flags, f"--config={args.config}", f"--repeats={args.repeats}", *versus])
    if measured is None:
      failed.append(name)
      continue
    report["measurements"][name] = measured
    outputs.replace(args.json, json.dumps(report, indent=1) + "\n")
  report["targets"] = judged(report)
  outputs.replace(args.json, json.dumps(report, indent=1) + "\n")
  print(table(report["targets"]))
  if failed:
    raise Stopped(f"not measured: {', '.join(failed)} (the messages stand above); the same command tries again")
  return {"workload": "inference", "measured": len(report["measurements"])}


def judged(report: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The figures beside their targets; "met" is None where the target is not for this device and size."""
  out = []
  for target in TARGETS:
    measured = report["measurements"].get(target.measurement)
    value = measured and target.read(measured)
    applies = measured and "H200" in measured["device"] and measured["dtype"] == "bfloat16"
    met = None
    if value is not None and applies and report["settings"]["config"] == _FULL:
      met = value >= target.bound if target.at_least else value <= target.bound
    out.append(
      {"measurement": target.measurement, "figure": target.figure, "value": value, "target": target.bound, "met": met}
    )
  return out


def table(rows: list[dict[str, Any]]) -> str:
  """The targets as lines of text."""
  said = {True: "met", False: "MISSED", None: "not judged here"}
  lines = [f"{'measurement':14} {'figure':30} {'measured':>10} {'target':>8}"]
  for row in rows:
    value = "-" if row["value"] is None else f"{row['value']:.3g}"
    lines.append(f"{row['measurement']:14} {row['figure']:30} {value:>10} {row['target']:8g}  {said[row['met']]}")
  return "\n".join(lines)


def _kept(file: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any]:
  """The report of an earlier run with the same settings, or an empty one."""
  if not file.exists():
    return {"workload": "inference", "settings": settings, "measurements": {}}
  try:
    report = json.loads(file.read_text(encoding="utf-8"))
    known = report["settings"] == settings and isinstance(report["measurements"], dict)
  except (OSError, ValueError, KeyError, TypeError):
    known = False
  if not known:
    raise UserError(f"--json={file} holds something else, or other settings: name another file")
  return report


def _measure(flags: list[str]) -> dict[str, Any] | None:
  """One report of `bench`; None where it failed, and has said why."""
  with tempfile.TemporaryDirectory(prefix="jflow-bench-") as folder:
    out = pathlib.Path(folder, "report.json")
    command = [sys.executable, "-m", "jflow", "bench", *flags, f"--json={out}"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text(encoding="utf-8")) if done.returncode == 0 else None
