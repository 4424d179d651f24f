"""Sweeps over sampling settings: one evaluation for each combination, a table and a plot (the appendix's figure 1).

A later sweep into the same folder adds to the plot, as long as only the swept settings differ.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jflow import outputs
from jflow.errors import UserError, need_extra
from jflow.evaluation import benchmarks, report, runner
from jflow.evaluation.benchmark import GenerationBenchmark
from jflow.evaluation.settings import Settings
from jflow.generation.base import Family

_MOST_PANELS = 6

Point = tuple[Any, ...]  # the values of the axes of a sweep
Found = Mapping[Point, Mapping[str, Any]]  # the scores of each point


def sweep(settings: Settings, grid: Mapping[str, Sequence[Any]]) -> None:
  """Runs every combination in its own folder, so that a stopped sweep resumes; plots all that have scores.

  Args:
    settings: of each evaluation, except those swept.
    grid: sampling setting -> values to vary.

  Raises:
    UserError: see `runner.evaluate`; or a benchmark or flags that cannot be swept.
  """
  kind, output = benchmarks.get(settings.benchmark), settings.output
  if not issubclass(kind, GenerationBenchmark):
    raise UserError(f"--benchmark={kind.name} generates no pictures: it has no settings to sweep")
  if settings.results or settings.features:
    raise UserError(
      "--results and --features belong to one setting: give them with its own --output and settings; the same sweep "
      "then plots them"
    )
  for name in grid:
    if name in settings.sampling:
      raise UserError(f"--{name} and --sweep_{name} exclude each other: give one of them")
  settings = kind.swept(settings)
  combinations = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
  each = [dataclasses.replace(settings, sampling={**settings.sampling, **values}) for values in combinations]
  for one in each:
    runner.check(kind, one)
  runner.opened(settings)  # the data's mistakes, before a checkpoint is located
  checkpoint = runner.Checkpoint(settings)
  axes = axes_of(checkpoint.family, grid)
  points = {}
  for one in each:
    chosen = runner.sampling_of(kind, one, checkpoint.family, checkpoint.sampling)
    values = {name: getattr(chosen, name) for name in axes}
    folder = output / "_".join(name + _short(value) for name, value in values.items())
    points[*values.values()] = dataclasses.replace(one, sampling={**one.sampling, **values}, output=folder)
  for number, (point, one) in enumerate(points.items(), 1):
    print(f"{number}/{len(points)}: {_told(axes, point)}, in {one.output}", flush=True)
    runner.evaluate(one, checkpoint, brief=True)
  found, shared = reports(output, axes, list(points))
  names = plotted(found)
  if not names:
    print("no scores to plot yet: do what the notes above say in each folder, then give this command again")
    return
  with outputs.new_file(output / "sweep.png") as new:
    figure(found, names, axes).savefig(new, dpi=120, format="png")
  rows = [
    {
      **dict(zip(axes, point)),
      **{name: scores[name]["value"] for name in names},
      "intervals": {name: [scores[name]["low"], scores[name]["high"]] for name in names if "low" in scores[name]},
    }
    for point, scores in found.items()
  ]
  body = {"benchmark": kind.name, "settings": shared, "rows": rows}
  outputs.replace(output / "sweep.json", json.dumps(body, indent=1) + "\n")
  print(table(found, names, axes))
  print(f"plot: {output / 'sweep.png'}, numbers: {output / 'sweep.json'}")


def axes_of(family: Family, grid: Mapping[str, Any]) -> list[str]:
  """The settings that name a folder and stand in the table: the common numbers of the family, and those swept."""
  fields = dataclasses.fields(family.settings)
  numbers = {field.name for field in fields if isinstance(field.metadata.get("page"), tuple)}
  return sorted(numbers | set(grid))


def reports(folder: pathlib.Path, axes: Sequence[str], points: Sequence[Point]) -> tuple[Found, dict[str, Any]]:
  """Reads the reports below a folder whose settings equal those of `points`, except on the axes.

  Returns:
    The scores of each point, in order; and the settings that all share.
  """
  loose = (*axes, "results", "features", "checkpoint", "read_from", "vae")  # the fingerprint says which
  found, alike = {}, {}
  for path in folder.glob(f"{axes[0]}*/report.json"):
    body = report.read(path.parent)
    if set(axes) <= body["settings"].keys():
      point = tuple(body["settings"][name] for name in axes)
      found[point] = body["scores"]
      alike[point] = {name: value for name, value in body["settings"].items() if name not in loose}
  asked = next((alike[point] for point in points if point in alike), {})
  return {point: found[point] for point in sorted(found) if alike[point] == asked}, asked


def plotted(found: Found) -> list[str]:
  """The scores to plot: overall ones and distances, without those that do not depend on the images."""
  names = list(next(iter(found.values()), {}))
  common = [name for name in names if all(name in scores for scores in found.values())]
  distance = lambda name: name.startswith("FID") or "FD-" in name and "floor" not in name
  wanted = [name for name in common if name.endswith("overall") or name == "CLIP similarity" or distance(name)]
  return [name for name in wanted if "questions" not in name][:_MOST_PANELS]


def table(found: Found, names: Sequence[str], axes: Sequence[str]) -> str:
  """The scores of all points as text, a line for each point."""
  rows = [[*axes, *names]]
  rows += [
    [*map(_short, point), *(f"{scores[name]['value']:.4g}" for name in names)] for point, scores in found.items()
  ]
  widths = [max(map(len, column)) for column in zip(*rows)]
  return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def figure(found: Found, names: Sequence[str], axes: Sequence[str]) -> Any:
  """A figure with one panel per score: over the first axis of numbers that varies, a line per value of the others."""
  need_extra("plots", "matplotlib")
  from matplotlib.figure import Figure

  values = [sorted({point[i] for point in found}) for i in range(len(axes))]
  numbers = [i for i, some in enumerate(values) if not isinstance(some[0], str)]
  along = next((i for i in numbers if len(values[i]) > 1), numbers[-1] if numbers else 0)
  others = [i for i in range(len(axes)) if i != along]
  columns = min(3, len(names))
  rows = math.ceil(len(names) / columns)
  fig = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.4), layout="constrained")
  for panel, name in zip(fig.subplots(rows, columns, squeeze=False).flat, names):
    for other in sorted({tuple(point[i] for i in others) for point in found}):
      line = sorted((point[along], found[point][name]) for point in found if tuple(point[i] for i in others) == other)
      x, y = [at for at, _ in line], [score["value"] for _, score in line]
      panel.plot(x, y, marker="o", markersize=4, label=_told([axes[i] for i in others], other))
      if all("low" in score for _, score in line):
        panel.fill_between(x, [score["low"] for _, score in line], [score["high"] for _, score in line], alpha=0.15)
    panel.set(xlabel=axes[along], title=name)
    panel.grid(alpha=0.3)
  if others:  # below all panels, where it covers no line
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
  for panel in list(fig.axes)[len(names) :]:
    panel.set_visible(False)
  return fig


def _told(axes: Sequence[str], point: Point) -> str:
  return ", ".join(f"{name} {_short(value)}" for name, value in zip(axes, point))


def _short(value: Any) -> str:
  return f"{value:g}" if isinstance(value, float) else str(value)
