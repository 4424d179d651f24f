"""Scores flow and codes of size `quick` side by side: lone large objects, questions, and what a picture costs.

  python launch/experiments/writers.py FOLDER [--stage=3]     # after writers.sh FOLDER quick; minutes of one core

FOLDER holds flow/stageN and codes/stageN. The guidance of each writer, and the temperature of codes, are chosen on
pictures of seeds of their own; then 64 prompts are painted from 4 seeds each, and as many questions about new pictures
are answered as about pairs that training never shows. A picture's cost is CPU seconds of one batch, the two writers in
turn.

Writes FOLDER/stageN.json, with 95 % intervals that count the pictures of a prompt as alike as they are,
FOLDER/stageN.png, the same prompts by both, and FOLDER/curves.png.
"""

import argparse
import collections
import itertools
import json
import pathlib
import random
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jflow
from configs.world import QUICK_SPREAD
from jflow import outputs
from jflow.commit import commit
from jflow.evaluation import scores
from jflow.inference.pipeline import Pipeline, to_image
from jflow.inference.sheet import contact_sheet
from jflow.training.metrics import read_metrics
from jflow.world import judge, questions, scenes
from jflow.world import source as world

PROMPTS, SEEDS, CHOOSING = 64, 4, 1  # of the 68 pairs of color and shape; pictures of each, and of each choice
TRUE = 300  # true pictures
UNSEEN = "held_out"  # split of the pairs that training never shows
QUESTIONS = 192  # per split
KINDS = ("color", "shape", "color", "shape", "existence_shape")  # the last one twice, as a yes and a no
CHOICES = {
  "flow": [dict(steps=30, guidance=w) for w in (1.0, 2.0, 3.0)],
  "codes": [dict(guidance=w, temperature=t) for w, t in itertools.product((1.0, 2.0, 3.0, 5.0), (1.0, 0.5))],
}
BATCHES, ROUNDS = (1, 16), 5  # pictures at once, and timed rounds
SHOWN = 12


def paint(
  model: Pipeline, setting: Mapping[str, float], first: int, count: int, split: str = "train"
) -> list[list[Image.Image]]:
  """Pictures of each prompt from `count` seeds, no two of them alike."""
  prompts = [text for text, _ in asked(split)]
  numbers = range(first, first + count * len(prompts))
  images = model.generate(prompts, num_images=count, seeds=list(numbers), batch_size=64, **setting)
  return [images[at : at + count] for at in range(0, len(images), count)]


def asked(split: str = "train") -> list[tuple[str, dict]]:
  """The prompts of single objects with a color, each pair of color and shape once, with what the judge is told."""
  found = [one for one in world.evaluation_prompts(split, 600, seed=1) if one[1]["tag"] == "colors"]
  return list({text: (text, metadata) for text, metadata in found}.values())[:PROMPTS]


def judged(painted: Sequence[Sequence[Image.Image]], split: str = "train") -> dict[str, scores.Score]:
  """Shares of pictures right in color and shape and nothing else, and right in color."""
  right, color = [], []
  for images, (_, metadata) in zip(painted, asked(split)):
    found = [judge.detect(np.asarray(image)) for image in images]
    right.append([float(judge.strict(things, metadata)) for things in found])
    wanted = metadata["include"][0]["color"]
    color.append([float(bool(things) and all(thing.color == wanted for thing in things)) for things in found])
  return {"right": scores.clustered(right), "color": scores.clustered(color)}


def variety(pictures: Iterable[Sequence[Any]]) -> float:
  """The mean over prompts of the root mean square difference, of 255, of two pictures of one prompt."""
  apart = lambda a, b: float(np.sqrt(np.mean(np.square(np.subtract(a, b, dtype=np.float64)))))
  return float(np.mean([apart(a, b) for group in pictures for a, b in itertools.combinations(group, 2)]))


def ceiling(model: Pipeline, split: str) -> scores.Score:
  """The share of true pictures of a split that the judge accepts after the writer's codec."""
  rng = random.Random(f"ceiling/{split}")
  drawn = [scenes.sample("colors", split, rng, 1.0, QUICK_SPREAD) for _ in range(TRUE)]
  pixels = model.sampler.round_trip(np.stack([scene.render(model.model.config.image_size) for scene, _ in drawn]))
  wanted = (world.prompt(combination)[1] for _, combination in drawn)
  return scores.accuracy(judge.score(np.asarray(to_image(x)), asks)["strict"] for x, asks in zip(pixels, wanted))


def true_variety(size: int) -> float:
  """`variety` of the pictures that training is drawn from."""
  rng, groups = random.Random(0), collections.defaultdict(list)
  for _ in range(TRUE):
    scene, combination = scenes.sample("colors", "val", rng, 1.0, QUICK_SPREAD)
    groups[combination.pairs].append(scene.render(size))
  return variety(group[:SEEDS] for group in groups.values())


def short(score: scores.Score) -> dict[str, Any]:
  """The value, its interval and the number of samples."""
  return {
    "value": round(score.value, 4),
    "low": round(score.low, 4),
    "high": round(score.high, 4),
    "count": score.count,
  }


def answered(model: Pipeline) -> dict[str, scores.Score]:
  """Shares of right answers about new pictures of pairs that training shows, and of pairs that it never shows."""
  out = {}
  for split, name in (("val", "seen"), ("held_out", "held-out")):
    pairs = questions.for_evaluation(split, QUESTIONS, 1, KINDS, ("colors",), 1.0, QUICK_SPREAD)
    size = model.model.config.image_size
    requests = [model.request("<image>\n" + q.question, [scene.render(size)], max_tokens=16) for scene, q in pairs]
    said = model.understand_batch(requests, 16)
    out[name] = scores.accuracy(told == q.answer for told, (_, q) in zip(said, pairs))
  return out


def abilities(model: Pipeline) -> dict[str, dict[str, Any]]:
  """What a model of size `quick` can do: single objects right in color and shape, and answers about new pictures."""
  painted = judged(paint(model, dict(steps=30, guidance=2.0), 0, 2))
  found = {f"pictures, {kind}": score for kind, score in painted.items()}
  found |= {f"questions, {split}": score for split, score in answered(model).items()}
  return {name: short(score) for name, score in found.items()}


def costs(models: Mapping[str, Pipeline], settings: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
  """Medians of CPU and wall seconds per picture, writer -> pictures at once -> clock; the writers take turns."""
  prompts = [text for text, _ in asked()]
  taken: dict[Any, list[float]] = {}
  for batch, number in itertools.product(BATCHES, range(ROUNDS + 1)):
    for name, model in models.items():
      wall, cpu = time.perf_counter(), time.process_time()
      model.generate(prompts[:batch], seed=number, batch_size=batch, **settings[name])
      clocks = {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall}
      for clock, seconds in clocks.items() if number else ():  # the first round compiles
        taken.setdefault((name, batch, clock), []).append(seconds / batch)
  of = lambda name, batch: {clock: float(np.median(taken[name, batch, clock])) for clock in ("cpu_seconds", "seconds")}
  return {name: {f"{batch} at once": of(name, batch) for batch in BATCHES} for name in models}


def plot(folder: pathlib.Path, names: Sequence[str]) -> None:
  """Writes curves.png: the text loss of both writers, and each one's own, over the steps of stages 2 and 3."""
  figure, axes = plt.subplots(1, 2, figsize=(8, 2.8))
  for name in names:
    stages = (folder / name / f"stage{stage}" for stage in (2, 3))
    rows = [row for stage in stages if (stage / "metrics.jsonl").exists() for row in read_metrics(stage)]
    for axis, key in zip(axes, ("loss_text", f"loss_{name}")):
      values = np.array([row.get(key) or np.nan for row in rows], float)
      usual = [np.nanmean(values[at : at + 50]) for at in range(0, len(values), 50)]
      axis.plot(
        np.arange(len(usual)) * 50, usual, label=key.removeprefix("loss_") if axis is axes[1] else name, linewidth=1
      )
  for axis, title in zip(axes, ("text loss", "loss of pictures, each its own")):
    axis.set(title=title, xlabel="step of stages 2 and 3", ylim=(0, None))
    axis.legend(fontsize=7)
  figure.tight_layout()
  figure.savefig(folder / "curves.png", dpi=80)


def scored(model: Pipeline, name: str, file: pathlib.Path) -> dict[str, Any]:
  """The scores of a writer, kept in a file with its first pictures beside it."""
  if file.exists():
    return json.loads(file.read_text())
  tried = [judged(paint(model, setting, 10_000, CHOOSING))["right"] for setting in CHOICES[name]]
  best = CHOICES[name][int(np.argmax([score.value for score in tried]))]
  painted = paint(model, best, 0, SEEDS)
  texts = [f"{name}: {text.removeprefix('a picture of ')}" for text, _ in asked()[:SHOWN]]
  contact_sheet([images[0] for images in painted[:SHOWN]], texts, SHOWN, side=72, lines=3).save(
    file.with_suffix(".png")
  )
  body = {
    "choices": [{**setting, "right": short(score)} for setting, score in zip(CHOICES[name], tried)],
    "sampling": best,
    "pictures": {kind: short(score) for kind, score in judged(painted).items()} | {"variety": variety(painted)},
    "questions": {split: short(score) for split, score in answered(model).items()},
  }
  outputs.replace(file, json.dumps(body, indent=1) + "\n")
  return body


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("folder", metavar="FOLDER", type=pathlib.Path)
  p.add_argument("--stage", type=int, choices=(2, 3), default=3, help="whose checkpoints (default %(default)s)")
  args = p.parse_args()
  models, found = {}, {}
  for name in CHOICES:
    models[name] = jflow.load(args.folder / name / f"stage{args.stage}")
    found[name] = scored(models[name], name, args.folder / name / f"scores{args.stage}.json")
    print(name, found[name]["sampling"], found[name]["pictures"], found[name]["questions"], flush=True)
  cost = costs(models, {name: body["sampling"] for name, body in found.items()})
  size = next(iter(models.values())).model.config.image_size
  unseen = {
    name: {
      kind: short(score)
      for kind, score in judged(paint(model, found[name]["sampling"], 0, SEEDS, UNSEEN), UNSEEN).items()
    }
    for name, model in models.items()
  }
  more = {"pictures of unseen pairs": unseen, "cost of a picture": cost, "variety of true pictures": true_variety(size)}
  splits = {"seen": "val", "held-out": UNSEEN}
  more["true pictures after the codec"] = {
    name: {told: short(ceiling(model, split)) for told, split in splits.items()} for name, model in models.items()
  }
  body = {"commit": commit(), "stage": args.stage, **found, **more}
  outputs.replace(args.folder / f"stage{args.stage}.json", json.dumps(body, indent=1) + "\n")
  sheets = [np.asarray(Image.open(args.folder / name / f"scores{args.stage}.png")) for name in CHOICES]
  Image.fromarray(np.concatenate(sheets)).save(args.folder / f"stage{args.stage}.png", optimize=True)
  plot(args.folder, list(CHOICES))
  print(json.dumps(cost))


if __name__ == "__main__":
  main()
