"""Sweeps over guidance and steps: one evaluation for each pair, a table and a plot (the appendix's figure 1).

A later sweep into the same folder adds to the plot, as long as only guidance and steps differ.
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
from jflow.evaluation.benchmark import PaintingBenchmark
from jflow.evaluation.settings import Settings

_MOST_PANELS = 6


def sweep(settings: Settings, guidances: Sequence[float] = (), steps: Sequence[int] = ()) -> None:
  """Runs every pair in its own folder, so that a stopped sweep resumes; plots all that have scores.

  Args:
    settings: of each evaluation, except guidance and steps.
    guidances, steps: values to vary; where empty, the value of `settings` or of the benchmark is used.

  Raises:
    UserError: see `runner.evaluate`; or a benchmark or flags that cannot be swept.
  """
  kind, output = benchmarks.get(settings.benchmark), settings.output
  if not issubclass(kind, PaintingBenchmark):
    raise UserError(f"--benchmark={kind.name} generates no pictures: it has no guidance and no steps to sweep")
  if settings.results or settings.features:
    raise UserError(
      "--results and --features belong to one setting: give them with its own --output, --guidance and --steps; the "
      "same sweep then plots them"
    )
  for name, swept in (("guidance", guidances), ("steps", steps)):
    if swept and getattr(settings, name) is not None:
      raise UserError(f"--{name} and --sweep_{name} exclude each other: give one of them")
  if steps and min(steps) < 1:
    raise UserError(f"--sweep_steps: {min(steps)} must be at least 1")
  usual = lambda name: getattr(kind, name) if getattr(settings, name) is None else getattr(settings, name)
  pairs = list(itertools.product(guidances or [usual("guidance")], steps or [usual("steps")]))
  settings = kind.swept(settings)
  points = [
    dataclasses.replace(settings, guidance=w, steps=n, output=output / f"guidance{w:g}_steps{n}") for w, n in pairs
  ]
  for one in points:
    runner.check(kind, one)
  checkpoint = runner.Checkpoint(settings)
  for number, one in enumerate(points, 1):
    print(f"{number}/{len(pairs)}: guidance {one.guidance:g}, {one.steps} steps, in {one.output}", flush=True)
    runner.evaluate(one, checkpoint)
  found, shared = reports(output, pairs)
  names = plotted(found)
  if not names:
    print("no scores to plot yet: do what the notes above say in each folder, then give this command again")
    return
  with outputs.new_file(output / "sweep.png") as new:
    figure(found, names).savefig(new, dpi=120, format="png")
  rows = [
    {
      "guidance": guidance,
      "steps": steps,
      **{name: scores[name]["value"] for name in names},
      "intervals": {name: [scores[name]["low"], scores[name]["high"]] for name in names if "low" in scores[name]},
    }
    for (guidance, steps), scores in found.items()
  ]
  body = {"benchmark": kind.name, "settings": shared, "rows": rows}
  outputs.replace(output / "sweep.json", json.dumps(body, indent=1) + "\n")
  print(f"plot: {output / 'sweep.png'}, numbers: {output / 'sweep.json'}")


def reports(
  folder: pathlib.Path, pairs: Sequence[tuple[float, int]]
) -> tuple[dict[tuple[float, int], dict[str, Any]], dict[str, Any]]:
  """Reads the reports below a folder whose settings equal those of `pairs`, except guidance and steps.

  Returns:
    (guidance, steps) -> scores, in order; and the settings that all share.
  """
  loose = ("guidance", "steps", "results", "features", "checkpoint", "read_from", "vae")  # the fingerprint says which
  found, alike = {}, {}
  for path in folder.glob("guidance*_steps*/report.json"):
    body = report.read(path.parent)
    pair = body["settings"]["guidance"], body["settings"]["steps"]
    found[pair] = body["scores"]
    alike[pair] = {name: value for name, value in body["settings"].items() if name not in loose}
  asked = next((alike[pair] for pair in pairs if pair in alike), {})
  return {pair: found[pair] for pair in sorted(found) if alike[pair] == asked}, asked


def plotted(found: Mapping[Any, Mapping[str, Any]]) -> list[str]:
  """The scores to plot: overall ones and distances, without those that do not depend on the images."""
  names = list(next(iter(found.values()), {}))
  common = [name for name in names if all(name in scores for scores in found.values())]
  distance = lambda name: name.startswith("FID") or "FD-" in name and "floor" not in name
  wanted = [name for name in common if name.endswith("overall") or name == "CLIP similarity" or distance(name)]
  return [name for name in wanted if "questions" not in name][:_MOST_PANELS]


def figure(found: Mapping[tuple[float, int], Mapping[str, Any]], names: Sequence[str]) -> Any:
  """A figure with one panel per score: over guidance, a line per number of steps; over steps if guidance is fixed."""
  need_extra("plots", "matplotlib")
  from matplotlib.figure import Figure

  guidances, steps = (sorted({pair[i] for pair in found}) for i in (0, 1))
  along, label = (0, "guidance w") if len(guidances) > 1 else (1, "solver steps")
  columns = min(3, len(names))
  rows = math.ceil(len(names) / columns)
  fig = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
  for panel, name in zip(fig.subplots(rows, columns, squeeze=False).flat, names):
    for other in steps if along == 0 else guidances:
      line = sorted((pair[along], found[pair][name]) for pair in found if pair[1 - along] == other)
      x, y = [at for at, _ in line], [score["value"] for _, score in line]
      said = f"{other} steps" if along == 0 else f"w = {other:g}"
      panel.plot(x, y, marker="o", markersize=4, label=said)
      if all("low" in score for _, score in line):
        panel.fill_between(x, [score["low"] for _, score in line], [score["high"] for _, score in line], alpha=0.15)
    panel.set(xlabel=label, title=name)
    panel.grid(alpha=0.3)
  fig.axes[0].legend(frameon=False)
  for panel in list(fig.axes)[len(names) :]:
    panel.set_visible(False)
  return fig
