"""Compares checkpoints before and after reinforcement learning, by their evaluations on the built-in world.

  python launch/experiments/grpo.py start=scores/start supervised=scores/more rewarded=scores/rewarded \\
    --curves rewarded=runs/grpo --output=scores/rewards --sheet=scores/rewards_sheet.png

NAME=FOLDER is an evaluation by `evaluate --benchmark=shapes`; --curves has the runs whose metrics are kept. Writes OUTPUT.json,
a table of strict scores with 95 % intervals, Frechet distances and diversity; OUTPUT.png, reward, KL and diversity over the
steps; and the same prompts and noise for every checkpoint, the first of each kind.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
import jflow
from jflow import outputs, registry
from jflow.evaluation import report
from jflow.generation.base import family
from jflow.inference.pipeline import padded
from jflow.inference.sheet import contact_sheet
from jflow.training.metrics import read_metrics
from jflow.world import source

SPLITS = {"seen": "val", "held-out": "held_out"}  # as in reports, as folders of pictures
KINDS = ("single_object", "colors", "counting", "position", "two_object", "color_attr")
CURVES = {
  "reward": "mean reward",
  "reward_spread": "its deviation within prompts",
  "diversity": "diversity within prompts",
}
EACH = 10  # steps of a point of a curve
COMPARED = 96  # prompts whose pictures' log-probabilities are compared with the start's
SHOWN = 12  # prompts on the sheet, of each kind in turn


def pictures(folder: pathlib.Path, split: str) -> np.ndarray:
  """The pictures of an evaluation, uint8[prompts, pictures of a prompt, H, W, 3]."""
  found = sorted((folder / "pictures" / SPLITS[split]).glob("*_*.png"))
  groups: dict[str, list[np.ndarray]] = {}
  for file in found:
    groups.setdefault(file.stem.split("_")[0], []).append(np.asarray(Image.open(file).convert("RGB")))
  return np.stack([np.stack(group) for group in groups.values()])


def table(folder: pathlib.Path, kinds: Iterable[str]) -> dict[str, dict]:
  """Split -> what is measured -> value, low and high."""
  body, out = report.read(folder), {}
  for split in SPLITS:
    names = [f"{split} pictures: {kind}" for kind in (*kinds, "overall", "FD-tex", "FD-state")]
    names.append(f"{split} questions: overall")
    out[split] = {
      name.split(": ")[1] if "pictures" in name else "questions": [
        round(body["scores"][name][key], 4) for key in ("value", "low", "high")
      ]
      for name in names
      if name in body["scores"]
    }
    groups = pictures(folder, split).astype(np.float64) / 127.5
    out[split]["diversity"] = round(float(np.sqrt(groups.var(1).mean())), 4)
  return out


def curves(workdir: pathlib.Path) -> dict[str, list[float]]:
  """The fields of metrics.jsonl, means over EACH steps."""
  rows = read_metrics(workdir)
  parts = [rows[i : i + EACH] for i in range(0, len(rows) - EACH + 1, EACH)]
  names = [name for name in rows[0] if name.startswith("reward") or name in ("kl", "diversity", "grad_norm")]
  return {"step": [part[-1]["step"] for part in parts]} | {
    name: [round(float(np.mean([row[name] for row in part])), 5) for part in parts] for name in names
  }


def divergence(run: pathlib.Path, start: str) -> float:
  """KL(policy || its start) of an action: the mean over what a run's last policy draws for the benchmark's prompts."""
  after, before = jflow.load(run), jflow.load(start)
  explore = json.loads((run / "config.json").read_text(encoding="utf-8"))["rl"]["explore"]
  writes = family(after.model.config.generation)
  policy = registry.load(writes.policy)(after.model, writes.explores(**explore), after.tokenizer)
  ids = [after.generation_prompt(text) for text, _ in source.evaluation_prompts("val", COMPARED, 0)]
  tokens, lengths = padded(ids, after.tokenizer.pad)
  drawn = jax.jit(policy.sample, static_argnums=4)(after.params, tokens, lengths, jax.random.key(0), 1).drawn
  return float(jnp.mean(jax.jit(policy.compare)(after.params, before.params, tokens, lengths, drawn).divergence))


def figure(runs: dict[str, dict[str, list[float]]]) -> Figure:
  """One panel for each of CURVES, a line for each run: means over ten steps, and thick over a hundred."""
  fig = Figure(figsize=(9, 2.8), layout="constrained")
  for axis, (name, label) in zip(fig.subplots(1, len(CURVES)), CURVES.items(), strict=True):
    for number, (run, curve) in enumerate(runs.items()):
      steps, values = np.asarray(curve["step"]), np.asarray(curve[name])
      axis.plot(steps, values, alpha=0.25, color=f"C{number}")
      width = min(10, len(values))
      axis.plot(
        steps[width - 1 :], np.convolve(values, np.full(width, 1 / width), "valid"), color=f"C{number}", label=run
      )
    axis.set(title=label, xlabel="step")
    axis.grid(alpha=0.3)
  fig.axes[0].legend(frameon=False)
  return fig


def sheet(scored: Mapping[str, pathlib.Path], split: str) -> Image.Image:
  """The first prompts of a split, one picture each: a row for each evaluation."""
  prompts = source.evaluation_prompts(SPLITS[split], SHOWN, 0)  # the first of the benchmark's
  images = [Image.fromarray(group[0]) for folder in scored.values() for group in pictures(folder, split)[:SHOWN]]
  texts = [f"{name}: {text.removeprefix('a picture of ')}" for name in scored for text, _ in prompts]
  return contact_sheet(images, texts, SHOWN, side=96, lines=3)


def named(text: str) -> tuple[str, pathlib.Path]:
  """NAME=FOLDER."""
  name, folder = text.split("=", 1)
  return name, pathlib.Path(folder)


def main() -> int:
  """Writes the table, the curves and the sheet."""
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("scored", nargs="+", type=named, metavar="NAME=FOLDER", help="evaluations")
  p.add_argument("--curves", nargs="*", type=named, default=[], metavar="NAME=RUN", help="runs whose metrics are kept")
  p.add_argument(
    "--kl", nargs="*", type=named, default=[], metavar="NAME=START", help="what a run of --curves began with"
  )
  p.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS, help="of scenes that count (default: all)")
  p.add_argument("--split", choices=SPLITS, default="held-out", help="whose prompts the sheet shows")
  p.add_argument("--output", type=pathlib.Path, required=True, help="path without suffix")
  p.add_argument("--sheet", type=pathlib.Path, required=True)
  args = p.parse_args()
  scored, runs = dict(args.scored), {name: curves(run) for name, run in args.curves}
  where = ("checkpoint", "read_from")  # of no use elsewhere; the fingerprint stays
  settings = {
    name: {key: value for key, value in report.read(folder)["settings"].items() if key not in where}
    for name, folder in scored.items()
  }
  tables = {name: table(folder, args.kinds) for name, folder in scored.items()}
  kl = {name: round(divergence(dict(args.curves)[name], str(start)), 5) for name, start in args.kl}
  result = {"settings": settings, "checkpoints": tables, "kl": kl, "curves": runs}
  outputs.replace(args.output.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
  if runs:
    figure(runs).savefig(args.output.with_suffix(".png"), dpi=110)
  sheet(scored, args.split).save(args.sheet, optimize=True)
  print(json.dumps(tables, indent=1))
  return 0


if __name__ == "__main__":
  sys.exit(main())
