"""Draws what a run's scores on the built-in world cost: against pictures painted in training, by category.

  python launch/experiments/cost.py runs/world/stage2 2500=scores/2500 5000=scores/5000 --records=120000 --rows=20713 \\
    --output=launch/experiments/results/cost

STEP=FOLDER is an evaluation of the run's step by `evaluate --benchmark=shapes`; records and rows are those of the line
"generation shapes" of the run's log. --beside=NAME=FILE, an OUTPUT.json of another run, is drawn dashed: its mean.
Writes OUTPUT.json and OUTPUT.png.
"""

import argparse
import json
import pathlib
import sys

from matplotlib.figure import Figure

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from jflow.evaluation import report
from jflow.training.metrics import read_metrics

NAMES = ("single_object", "colors", "counting", "position", "two_object", "color_attr", "overall")
SCORES = (*(f"seen pictures: {name}" for name in NAMES), "seen questions: overall")


def points(run: pathlib.Path, scored: dict[int, pathlib.Path], per_row: float) -> list[dict]:
  """A point for each scored step: pictures painted in training so far, and each score with its interval."""
  rows = {row["step"]: row["packs"] for row in read_metrics(run)}
  out = []
  for step, folder in sorted(scored.items()):
    painted = sum(packs["generation"] for at, packs in rows.items() if at <= step) * per_row
    scores = report.read(folder)["scores"]
    kept = {name: [scores[name][key] for key in ("value", "low", "high")] for name in SCORES if name in scores}
    out.append({"step": step, "painted": round(painted), "scores": kept})
  return out


def figure(found: list[dict], other: list[dict], name_of_other: str) -> Figure:
  """One panel, the pictures on a logarithmic axis; of another run, the mean over categories."""
  fig = Figure(figsize=(7, 4), layout="constrained")
  axis = fig.subplots()
  for name in SCORES:
    line = [(point["painted"], *point["scores"][name]) for point in found if name in point["scores"]]
    if len(line) > 1:
      x, y, low, high = zip(*line)
      axis.plot(x, y, marker="o", markersize=4, label=name.removeprefix("seen "))
      axis.fill_between(x, low, high, alpha=0.1)
  if other:
    line = [(point["painted"], point["scores"]["seen pictures: overall"][0]) for point in other]
    axis.plot(*zip(*line), "k--", marker="o", markersize=3, linewidth=1, label=f"{name_of_other}: pictures: overall")
  axis.set(xscale="log", ylim=(0, 1), xlabel="pictures painted in training, thousands", ylabel="right, strict")
  painted: list[int] = []
  for number in (point["painted"] for point in found + other):  # labels that do not overlap, the run's own first
    painted += [number] * all(not 1 / 1.6 < number / one < 1.6 for one in painted)
  axis.set_xticks(painted, [f"{n / 1000:,.0f}" for n in painted])
  axis.minorticks_off()
  axis.grid(alpha=0.3)
  fig.legend(loc="outside right center", frameon=False)
  return fig


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("run", type=pathlib.Path, help="workdir whose steps are scored")
  parser.add_argument("scores", nargs="+", metavar="STEP=FOLDER", help="evaluation of a step")
  parser.add_argument("--records", type=int, required=True, help="records of generation in the plan")
  parser.add_argument("--rows", type=int, required=True, help="rows that hold them")
  parser.add_argument("--output", type=pathlib.Path, required=True, help="path without suffix")
  parser.add_argument("--beside", metavar="NAME=FILE", default="", help="points of another run, its mean drawn dashed")
  args = parser.parse_args()
  scored = {int(step): pathlib.Path(folder) for step, _, folder in (one.partition("=") for one in args.scores)}
  found = points(args.run, scored, args.records / args.rows)
  args.output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
  name, _, file = args.beside.partition("=")
  other = json.loads(pathlib.Path(file).read_text(encoding="utf-8")) if file else []
  figure(found, other, name).savefig(args.output.with_suffix(".png"), dpi=90)


if __name__ == "__main__":
  main()
