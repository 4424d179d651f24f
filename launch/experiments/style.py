"""A style taught by adapters: a model of the built-in world learns to paint outlines, where its prompt asks for them.

  python launch/experiments/style.py FOLDER --base=quickstart/stage3       # minutes of one core

The base, of size `quick`, paints filled shapes. FOLDER gets outlined/, 600 pictures with their captions, the data set, the run,
style.png and style.json. A quarter of the pairs of color and shape is in no picture of the style, and the pairs that the
base itself never saw are not either: both are asked for at the end. Stars, crosses and rings are left out: at 48 pixels they
have no inside, or look like another shape.

The judge of the world knows filled shapes. A picture is right if its object is hollow, and if the judge finds the shape and
the color that were asked for, and nothing else, once the object is filled. True pictures after the codec are the most that
a model can reach.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys

import numpy as np
from PIL import Image
from scipy import ndimage

root = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(root))

import writers

import jflow
from configs.world import QUICK_SPREAD
from jflow import outputs
from jflow.commit import commit
from jflow.evaluation import scores
from jflow.inference.pipeline import Pipeline, to_image
from jflow.inference.sheet import contact_sheet
from jflow.world import judge, scenes
from jflow.world import source as world

PICTURES, SEEDS, STEPS = 600, 3, 300
SHAPES = ("circle", "square", "triangle", "diamond", "heart")
WIDTH, SAMPLES = 2.5, 4  # pixels of a line; samples of a pixel along an axis
STRONG, HOLLOW = 45, 0.3  # least distance of a line from the background, of 255; least hollow share of the inside
SEEN = [pair for pair in scenes.SEEN_PAIRS if pair[0] in SHAPES]
KEPT_OUT = SEEN[::4]  # of the style
PAIRS = {
  "taught": [pair for pair in SEEN if pair not in KEPT_OUT],
  "not taught": KEPT_OUT,
  "never seen": sorted(pair for pair in scenes.HELD_OUT_PAIRS if pair[0] in SHAPES),
}
SAMPLING = dict(steps=30, guidance=2.0)
SHOWN = 4


def outlined(scene: scenes.Scene, size: int) -> np.ndarray:
  """The picture of a scene with its objects as outlines: uint8[size, size, 3]."""
  picture = scene.render(size * SAMPLES)
  inside = (picture != scene.background).any(-1)
  picture[ndimage.distance_transform_edt(inside) > WIDTH * SAMPLES] = scene.background
  return np.asarray(Image.fromarray(picture).reduce(SAMPLES))


def caption(pair: tuple[str, str], what: str = "an outline") -> str:
  """The caption of a picture of one object."""
  shape, color = pair
  return f"{what} of {'an' if color[0] in 'aeiou' else 'a'} {color} {shape}"


def draw(rng: random.Random, pairs: list[tuple[str, str]]) -> tuple[scenes.Scene, tuple[str, str]]:
  """A scene of one large object of these pairs, near the middle as in size `quick`."""
  while True:
    split = "held_out" if pairs[0] in scenes.HELD_OUT_PAIRS else "train"
    scene, combination = scenes.sample("colors", split, rng, 1.0, QUICK_SPREAD)
    if combination.pairs[0] in pairs:
      return scene, combination.pairs[0]


def write_pictures(folder: pathlib.Path, size: int) -> None:
  """Writes pictures of the style, each with its caption in a text beside it."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = random.Random("outlines")
  for number in range(PICTURES):
    scene, pair = draw(rng, PAIRS["taught"])
    Image.fromarray(outlined(scene, size)).save(folder / f"{number:04d}.png")
    (folder / f"{number:04d}.txt").write_text(caption(pair) + "\n", encoding="utf-8")


def looked_at(picture: np.ndarray) -> tuple[np.ndarray, float]:
  """The picture with its largest object filled, uint8[S, S, 3], and the hollow share of that object's inside."""
  pixels = picture.astype(np.float64)
  edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
  distance = np.abs(pixels - np.median(edge, 0)).max(-1)
  regions, count = ndimage.label(distance > STRONG, np.ones((3, 3)))
  if not count:
    return picture, 0.0
  line = regions == 1 + int(np.argmax(ndimage.sum_labels(np.ones_like(regions), regions, range(1, count + 1))))
  closed = line | ndimage.binary_closing(np.pad(line, 4), np.ones((3, 3)))[4:-4, 4:-4]
  whole = ndimage.binary_fill_holes(closed)
  filled = pixels.copy()
  filled[whole] = np.median(pixels[line & (distance >= np.median(distance[line]))], 0)
  inside = ndimage.binary_erosion(whole, iterations=3)
  faint = distance[inside] < 0.55 * np.quantile(distance[line], 0.8)
  return filled.clip(0, 255).astype(np.uint8), float(faint.mean()) if faint.size else 0.0


def seen_in(picture: np.ndarray, pair: tuple[str, str]) -> tuple[bool, bool]:
  """Whether a picture is an outline, and whether it shows the pair and nothing else once it is filled."""
  filled, hollow = looked_at(picture)
  wanted = world.prompt(scenes.Combination("colors", (pair,)))[1]
  return hollow > HOLLOW, judge.score(filled, wanted)["strict"]


def score(model: Pipeline, what: str) -> tuple[dict[str, dict], list[Image.Image]]:
  """Shares of pictures that are outlines, that are right, and both, by kind of pair; and the first picture of each."""
  out, first = {}, []
  for name, pairs in PAIRS.items():
    count = SEEDS * len(pairs)
    images = model.generate([caption(p, what) for p in pairs], num_images=SEEDS, seeds=list(range(count)), **SAMPLING)
    groups = [images[at : at + SEEDS] for at in range(0, count, SEEDS)]
    found = [[seen_in(np.asarray(image), pair) for image in group] for group, pair in zip(groups, pairs)]
    measures = {"outlined": lambda x: x[0], "right": lambda x: x[1], "both": all}
    out[name] = {
      kind: writers.short(scores.clustered([[float(test(x)) for x in group] for group in found]))
      for kind, test in measures.items()
    }
    first += [group[0] for group in groups[:SHOWN]]
  return out, first


def ceiling(model: Pipeline) -> dict[str, dict]:
  """The shares of `score` for true pictures of the style after the model's codec."""
  rng = random.Random("ceiling")
  drawn = [draw(rng, PAIRS["taught"]) for _ in range(200)]
  true = np.stack([outlined(scene, model.model.config.image_size) for scene, _ in drawn])
  pictures = [np.asarray(to_image(x)) for x in model.sampler.round_trip(true)]
  found = [seen_in(picture, pair) for picture, (_, pair) in zip(pictures, drawn)]
  return {
    "outlined": writers.short(scores.accuracy(x[0] for x in found)),
    "both": writers.short(scores.accuracy(map(all, found))),
  }


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("folder", metavar="FOLDER", type=pathlib.Path, help="where all of it goes; the same folder goes on")
  p.add_argument("--base", metavar="CHECKPOINT", type=pathlib.Path, required=True, help="a model of size quick")
  args = p.parse_args()
  out, base = args.folder.resolve(), jflow.load(args.base)
  command = lambda *flags: subprocess.run([sys.executable, "-m", "jflow", *flags], check=True, cwd=root)
  if not (out / "data").exists():
    write_pictures(out / "outlined", base.model.config.image_size)
    command(
      "prepare", "--format=imagefolder", "--task=generation", f"--input={out / 'outlined'}", f"--output={out / 'data'}"
    )
  command(
    "train",
    "--config=tune:quick",
    f"--workdir={out / 'run'}",
    f"--config.train.init_from={args.base.resolve()}",
    f"--config.data.sources.generation=(('{out / 'data'}',2.0),('shapes',1.0))",  # what it can is seen again
    "--config.data.sources.understanding=()",
    "--config.data.sources.text=()",
    "--config.lora.rank=8",
    f"--config.train.steps={STEPS}",
    f"--config.optimizer.cooldown_steps={STEPS}",
    "--config.optimizer.learning_rate=4e-3",
  )
  tuned = jflow.load(out / "run")
  body = {"commit": commit(), "true pictures after the codec": ceiling(base)}
  sheets = []
  for what in ("an outline", "a picture"):
    body[f"{what} of"], rows = {}, []
    for name, model in (("before", base), ("after", tuned)):
      body[f"{what} of"][name], first = score(model, what)
      rows += first
    sheets += rows
  body["abilities"] = {"before": writers.abilities(base), "after": writers.abilities(tuned)}
  outputs.replace(out / "style.json", json.dumps(body, indent=1) + "\n")
  pairs = [pair for group in PAIRS.values() for pair in group[:SHOWN]]
  texts = [
    f"{when}: {caption(pair, what)}"
    for what in ("an outline", "a picture")
    for when in ("before", "after")
    for pair in pairs
  ]
  contact_sheet(sheets, texts, columns=len(pairs), side=96, lines=4).save(out / "style.png", optimize=True)
  print(json.dumps(body, indent=1))


if __name__ == "__main__":
  main()
