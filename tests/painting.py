"""Benchmarks that paint, with their flags, and pictures in the place of a model's."""

import shlex

from PIL import Image

from jflow.cli.evaluate import parser, with_flags
from jflow.evaluation import painted, tasks
from jflow.evaluation.recipes import RECIPES


def flags(name: str, tmp_path, *more: str):
  return parser().parse_args(
    [
      f"--benchmark={name}",
      "--checkpoint=x",
      f"--data={tmp_path / 'data'}",
      f"--output={tmp_path / 'out'}",
      *more,
    ]
  )


def benchmark(name: str, tmp_path, *more: str, **changes):
  args = flags(name, tmp_path, *more)
  return painted.BENCHMARKS[name](with_flags(RECIPES[name], args)._replace(**changes), args)


def commands(note: str) -> tuple[list[str], list[str]]:
  """The words of the two command lines of a note that says what to run next."""
  first, then = (shlex.split(line) for line in note.split("\n") if line.startswith("  "))
  return first, then


def paint(bench, tmp_path) -> dict:
  """A picture of its own color for each task."""
  records = {}
  for i, task in enumerate(bench.tasks()):
    tasks.save(Image.new("RGB", (8, 8), (i, 0, 0)), tmp_path / "out" / task.file)
    records[task.key] = {"file": task.file}
  return records
