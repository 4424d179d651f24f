"""Compares checkpoints before and after reinforcement learning on the built-in world's lone objects.

  python launch/experiments/grpo.py start=runs/stage3 rewarded=runs/grpo supervised=runs/more --curves=runs/grpo \\
    --output=launch/experiments/results/grpo.json --sheet=launch/experiments/pictures/grpo.png

Each generates every pair of shape and color, seen and held out, by the ODE, from the same noise. strict and lenient are
the judge's; diversity and `true` are the fields of metrics.jsonl.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
import jflow
from jflow.inference.sheet import contact_sheet
from jflow.training.metrics import read_metrics
from jflow.world import rewards, scenes, source

SPLITS = {"seen": False, "held-out": True}
CURVES = ("reward", "reward_spread", "kl", "diversity", "grad_norm")
SHOWN = 12  # prompts on the sheet, one row for each checkpoint


def generated(path: str, each: int, steps: int, guidance: float) -> dict[str, tuple[list, list, np.ndarray]]:
  """Split -> prompts, their metadata and pictures uint8[N, H, W, 3], `each` of a prompt, consecutive."""
  model, out = jflow.load(path), {}
  for name, unseen in SPLITS.items():
    asked = [source.prompt(one) for one in scenes.combinations("colors", unseen)]
    texts = [text for text, _ in asked]
    images = model.generate(texts, steps=steps, guidance=guidance, num_images=each, batch_size=64)
    repeat = lambda things: [thing for thing in things for _ in range(each)]
    out[name] = (repeat(texts), repeat([about for _, about in asked]), np.stack([np.asarray(x) for x in images]))
  return out


def scores(found: tuple[list, list, np.ndarray], each: int) -> dict[str, float]:
  """The means of what is measured, and the standard error of strict over prompts."""
  texts, about, images = found
  strict = np.asarray(rewards.strict(images, texts, about)).reshape(-1, each).mean(1)
  groups = images.astype(np.float64).reshape(-1, each, *images.shape[1:]) / 127.5
  return {
    "strict": float(strict.mean()),
    "strict_error": float(strict.std(ddof=1) / len(strict) ** 0.5),
    "lenient": float(np.mean(rewards.lenient(images, texts, about))),
    "true": float(np.mean(rewards.true(images, texts, about))),
    "diversity": float(np.sqrt(groups.var(1).mean())),
    "pictures": len(images),
  }


def curves(workdir: pathlib.Path, each: int) -> dict[str, list[float]]:
  """The fields of metrics.jsonl, means over `each` steps."""
  rows = read_metrics(workdir)
  parts = [rows[i : i + each] for i in range(0, len(rows), each)]
  return {"step": [part[-1]["step"] for part in parts]} | {
    name: [float(np.mean([row[name] for row in part])) for part in parts] for name in CURVES
  }


def main() -> int:
  """Writes the table as JSON, and a sheet of the same prompts and noise for every checkpoint."""
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("checkpoints", nargs="+", metavar="NAME=DIR")
  p.add_argument("--curves", type=pathlib.Path, help="workdir of the run whose metrics are kept")
  p.add_argument("--pictures", type=int, default=4, help="of a prompt")
  p.add_argument("--steps", type=int, default=30)
  p.add_argument("--guidance", type=float, default=2.0)
  p.add_argument("--output", type=pathlib.Path, required=True)
  p.add_argument("--sheet", type=pathlib.Path, required=True)
  args = p.parse_args()
  table, shown, captions = {}, [], []
  for name, path in (one.split("=", 1) for one in args.checkpoints):
    found = generated(path, args.pictures, args.steps, args.guidance)
    table[name] = {split: scores(one, args.pictures) for split, one in found.items()}
    print(name, json.dumps(table[name]), flush=True)
    texts, _, images = found["held-out"]
    chosen = [i * args.pictures for i in range(len(texts) // args.pictures)][:SHOWN]
    shown += [images[i] for i in chosen]
    captions += [f"{name}: {texts[i].removeprefix('a picture of ')}" for i in chosen]
  settings = {"steps": args.steps, "guidance": args.guidance}
  result = {"settings": settings, "checkpoints": table}
  if args.curves:
    result["curves"] = curves(args.curves, 10)
  args.output.write_text(json.dumps(result, indent=1) + "\n")
  contact_sheet([Image.fromarray(x) for x in shown], captions, SHOWN, side=96, lines=2).save(args.sheet)
  return 0


if __name__ == "__main__":
  sys.exit(main())
