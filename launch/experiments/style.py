"""A style taught by adapters: a model of the built-in world learns to paint framed pictures, where its prompt asks for them.

  python launch/experiments/style.py FOLDER --base=quickstart/stage3       # minutes of one core

The base, of size `quick`, paints a colored shape on gray. The style adds a frame in the color of the shape: what changes
depends on the color that the prompt names, and the shape stands within it as before, so no constant added to a picture makes
it. FOLDER gets framed/, 600 pictures with their captions, the data set, the run, style.png and style.json. A quarter of the
pairs of color and shape is in no picture of the style, and the pairs that the base itself never saw are not either: both are
asked for at the end.

A picture is right if its frame has the color on every side, and if the judge of the world finds the shape in its color, and
nothing else, in the picture without its frame, whose place gets the color of the background beside it. True pictures after
the codec are the most that a model can reach.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys

import numpy as np
from PIL import Image

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

PICTURES, SEEDS, STEPS = 600, 3, 1200
KEPT_OUT = scenes.SEEN_PAIRS[::4]  # of the style
PAIRS = {
  "taught": [pair for pair in scenes.SEEN_PAIRS if pair not in KEPT_OUT],
  "not taught": list(KEPT_OUT),
  "never seen": sorted(scenes.HELD_OUT_PAIRS),
}
PATTERNS = (
  "language_model/layers",
  "generation_(encoder|decoder)/(blocks_.*|patch_embed|output)",
  "generation_(output_)?projector",
)
STYLE, PLAIN = "a framed picture", "a picture"
FRAME, SOFT, LEAST = 5, 1, 0.8  # pixels of a frame, of its soft edge on either side; share of a side that has the color
SAMPLING = dict(steps=30, guidance=2.0, batch_size=48)
SHOWN = 4


def framed(scene: scenes.Scene, size: int) -> np.ndarray:
  """The picture of a scene of one object with a frame in its color: uint8[size, size, 3]."""
  picture = scene.render(size)
  return np.where(around(size, FRAME)[..., None], np.array(scene.fills[0], np.uint8), picture)


def around(size: int, width: int) -> np.ndarray:
  """Whether a pixel lies within `width` of the edge of the picture: bool[size, size]."""
  inside = np.zeros((size, size), bool)
  inside[width:-width, width:-width] = True
  return ~inside


def caption(pair: tuple[str, str], what: str) -> str:
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


def spaced(items: list) -> list:
  """SHOWN of the items, equally far apart."""
  return items[:: len(items) // SHOWN][:SHOWN]


def write_pictures(folder: pathlib.Path, size: int) -> None:
  """Writes pictures of the style, each with its caption in a text beside it."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = random.Random("frames")
  for number in range(PICTURES):
    scene, pair = draw(rng, PAIRS["taught"])
    Image.fromarray(framed(scene, size)).save(folder / f"{number:04d}.png")
    (folder / f"{number:04d}.txt").write_text(caption(pair, STYLE) + "\n", encoding="utf-8")


def seen_in(picture: np.ndarray, pair: tuple[str, str]) -> tuple[bool, bool]:
  """Whether a picture has a frame of the color of a pair, and whether it shows the pair and nothing else within one."""
  size, wide = len(picture), FRAME + SOFT
  sides = np.stack([np.rot90(picture, turn)[: FRAME - SOFT] for turn in range(4)]).reshape(4, -1, 3)
  palette = np.array([*scenes.COLORS.values(), (scenes.BACKGROUND,) * 3], float)
  nearest = np.linalg.norm(judge.lab(palette) - judge.lab(sides)[..., None, :], axis=-1).argmin(-1)
  has_frame = ((nearest == list(scenes.COLORS).index(pair[1])).mean(-1) > LEAST).all()
  beside = np.median(picture[around(size, wide + 1) & ~around(size, wide)], 0).astype(np.uint8)
  plain = np.where(around(size, wide)[..., None], beside, picture)
  wanted = world.prompt(scenes.Combination("colors", (pair,)))[1]
  return bool(has_frame), bool(has_frame and judge.score(plain, wanted)["strict"])


def shares(found: list[list[tuple[bool, bool]]]) -> dict[str, dict]:
  """The shares of pictures with the frame, and of those that are right, over groups of one pair."""
  return {
    name: writers.short(scores.clustered([[float(one[at]) for one in group] for group in found]))
    for at, name in enumerate(("framed", "right"))
  }


def score(model: Pipeline, what: str, added: np.ndarray | float = 0.0) -> tuple[dict[str, dict], list[Image.Image]]:
  """The shares of a model's pictures by kind of pair, and the first picture of each pair shown.

  Args:
    what: the words of the prompt before the pair.
    added: what is added to every picture, broadcast to its shape.
  """
  asked = [pair for pairs in PAIRS.values() for pair in pairs]
  seeds = list(range(SEEDS * len(asked)))
  images = model.generate([caption(p, what) for p in asked], num_images=SEEDS, seeds=seeds, **SAMPLING)
  moved = lambda image: (np.asarray(image) + added).round().clip(0, 255).astype(np.uint8)
  out, first, groups = {}, [], iter(range(0, len(images), SEEDS))
  for name, pairs in PAIRS.items():
    painted = [images[at : at + SEEDS] for _, at in zip(pairs, groups)]
    out[name] = shares([[seen_in(moved(image), pair) for image in group] for group, pair in zip(painted, pairs)])
    first += [group[0] for group in spaced(painted)]
  return out, first


def true_pictures(model: Pipeline) -> tuple[dict[str, dict], np.ndarray]:
  """The shares for true pictures of the style after the model's codec, and the mean of framed - plain picture, float[S, S, 3]."""
  rng, size = random.Random("ceiling"), model.model.config.image_size
  drawn = [draw(rng, PAIRS["taught"]) for _ in range(200)]
  true = np.stack([framed(scene, size) for scene, _ in drawn])
  pictures = [np.asarray(to_image(x)) for x in model.sampler.round_trip(true)]
  plain = np.stack([scene.render(size) for scene, _ in drawn])
  return shares([[seen_in(x, pair)] for x, (_, pair) in zip(pictures, drawn)]), (true - plain.astype(float)).mean(0)


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("folder", metavar="FOLDER", type=pathlib.Path, help="where all of it goes; the same folder goes on")
  p.add_argument("--base", metavar="CHECKPOINT", type=pathlib.Path, required=True, help="a model of size quick")
  args = p.parse_args()
  out, base = args.folder.resolve(), jflow.load(args.base)
  command = lambda *flags: subprocess.run([sys.executable, "-m", "jflow", *flags], check=True, cwd=root)
  if not (out / "data").exists():
    pictures = out / "framed"
    write_pictures(pictures, base.model.config.image_size)
    command("prepare", "--format=imagefolder", "--task=generation", f"--input={pictures}", f"--output={out / 'data'}")
  command(
    "train",
    "--config=tune:quick",
    f"--workdir={out / 'run'}",
    f"--config.train.init_from={args.base.resolve()}",
    f"--config.data.sources.generation=(('{out / 'data'}',2.0),('shapes',1.0))",  # what it can is seen again
    "--config.data.sources.text=()",
    "--config.data.mixture=((0,(1,7,0)),)",  # a row of its questions too
    "--config.lora.rank=16",
    f"--config.lora.patterns={PATTERNS}",
    f"--config.train.steps={STEPS}",
    f"--config.optimizer.cooldown_steps={STEPS}",
    "--config.optimizer.learning_rate=4e-3",
  )
  models = {"before": base, "after": jflow.load(out / "run")}
  ceiling, difference = true_pictures(base)
  body = {"commit": commit(), "true pictures after the codec": ceiling}
  images, texts = [], []
  for what in (STYLE, PLAIN):
    body[f"{what} of"] = {}
    for when, model in models.items():
      body[f"{what} of"][when], first = score(model, what)
      images += first
      texts += [f"{when}: {caption(pair, what)}" for pairs in PAIRS.values() for pair in spaced(pairs)]
  body["before, with the mean difference added"], _ = score(base, PLAIN, difference)
  body["abilities"] = {when: writers.abilities(model) for when, model in models.items()}
  outputs.replace(out / "style.json", json.dumps(body, indent=1) + "\n")
  contact_sheet(images, texts, columns=len(PAIRS) * SHOWN, side=96, lines=4).save(out / "style.png", optimize=True)
  print(json.dumps(body, indent=1))


if __name__ == "__main__":
  main()
