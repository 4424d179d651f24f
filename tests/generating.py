"""Benchmarks that generate, with their flags, and pictures in the place of a model's."""

import shlex

from PIL import Image

from jflow.evaluation import benchmarks, tasks
from jflow.evaluation.settings import Settings


def settings(name: str, tmp_path, **more) -> Settings:
  return Settings(name, "x", tmp_path / "out", data=tmp_path / "data", **more)


def benchmark(name: str, tmp_path, **more):
  return benchmarks.get(name)(settings(name, tmp_path, **more))


def commands(note: str) -> tuple[list[str], list[str]]:
  """The words of the two command lines of a note that says what to run next."""
  first, then = (shlex.split(line) for line in note.split("\n") if line.startswith("  "))
  return first, then


def generate(bench, tmp_path) -> dict:
  """A picture of its own color for each task."""
  records = {}
  for i, task in enumerate(bench.tasks()):
    tasks.save(Image.new("RGB", (8, 8), (i, 0, 0)), tmp_path / "out" / task.file)
    records[task.key] = {"file": task.file}
  return records
