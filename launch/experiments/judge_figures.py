"""Accuracy of the built-in world's judge on damaged true pictures, and on images that are not of the world.

  python launch/experiments/judge_figures.py launch/experiments/results/judge.json --pictures=720     # 7 to 9 minutes on one core

For pictures of 48 (the side of the `:shapes` model), 64 and 96 pixels and for each kind of damage:

  score  share of true prompts that GenEval's rules accept, as much of it from each of the six categories
  fp     share of prompts accepted that are false in one attribute: another shape or color, a count off by one, two
         colors or two sides exchanged
  exact  share of pictures in which every object is found with its shape and color, and nothing else

and how often images without objects are accepted for a prompt. Every row judges the same scenes, half of them with
held-out combinations. Prints two tables. OUTPUT.json gets every figure with its 95 % interval (Wilson's), the figures
under the strict rules, and the score of each category.
"""

import argparse
import contextlib
import copy
import functools
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

if __name__ == "__main__":  # before numpy, whose threads slow down matrices this small
  for _library in ("OPENBLAS", "OMP", "MKL"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from jflow import outputs
from jflow.commit import commit
from jflow.errors import UserError
from jflow.evaluation import scores
from jflow.world import (
  judge,
  scenes,
)
from jflow.world import source as world
from jflow.world.scenes import COLORS, SHAPES, TAGS, Scene

SIDES = (48, 64, 96)  # pixels
PICTURES = 900  # per row
FITTED = 300  # training pictures to fit the codec to
WINDOW, STRIDE = 16, 8  # pixels, of the codec

Rng = np.random.Generator
Metadata = Mapping[str, Any]  # the objects that a prompt requests, in GenEval's schema


# --- Scenes and their metadata


def drawn(tag: str, split: str, number: int, seed: str) -> tuple[Scene, dict[str, Any]]:
  """Returns a scene and the metadata of a prompt that is true of it, as a pure function of the arguments."""
  scene, combination = scenes.sample(tag, split, random.Random(f"{tag}/{split}/{seed}/{number}"))
  return scene, world.prompt(combination)[1]


def falsified(metadata: Metadata, rng: random.Random) -> dict[str, Any]:
  """Returns metadata that differ in one attribute from the true ones."""
  metadata = copy.deepcopy(dict(metadata))
  include = metadata["include"]
  if metadata["tag"] in ("single_object", "two_object"):
    there = {thing["class"] for thing in include}
    include[0]["class"] = rng.choice([shape for shape in SHAPES if shape not in there])
  elif metadata["tag"] == "counting":
    include[0]["count"] += rng.choice((-1, 1))
    metadata["exclude"][0]["count"] = include[0]["count"] + 1
  elif metadata["tag"] == "colors":
    include[0]["color"] = rng.choice([color for color in COLORS if color != include[0]["color"]])
  elif metadata["tag"] == "position":
    include[1]["position"] = [scenes.INVERSE[include[1]["position"][0]], 0]
  else:
    include[0]["color"], include[1]["color"] = include[1]["color"], include[0]["color"]
  return metadata


def classes(things: Iterable[scenes.Object | judge.Detection]) -> list[tuple[str, str]]:
  """Returns the sorted shapes and colors of things."""
  return sorted((thing.shape, thing.color) for thing in things)


# --- Damage: (uint8[S, S, 3], random generator) -> uint8[S, S, 3]


def noisy(image: np.ndarray, rng: Rng, deviation: float) -> np.ndarray:
  """Adds normal noise to each channel of each pixel, its standard deviation of 255."""
  return _pixels(image + rng.normal(0, deviation, image.shape))


def blurred(image: np.ndarray, rng: Rng, deviation: float) -> np.ndarray:
  """Smooths with a Gaussian, its standard deviation in pixels."""
  return _pixels(ndimage.gaussian_filter(image.astype(float), (deviation, deviation, 0)))


def blotched(image: np.ndarray, rng: Rng, deviation: float) -> np.ndarray:
  """Adds colored blotches an eighth of the picture wide, their standard deviation of 255."""
  width = len(image) / 8
  blotches = ndimage.gaussian_filter(rng.normal(size=image.shape), (width, width, 0))
  return _pixels(image + deviation * blotches / blotches.std())


def halved(image: np.ndarray, rng: Rng) -> np.ndarray:
  """Reduces to half the side and enlarges again."""
  side = len(image)
  small = Image.fromarray(image).resize((side // 2, side // 2), Image.Resampling.BOX)
  return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


def as_jpeg(image: np.ndarray, rng: Rng, quality: int) -> np.ndarray:
  """Writes and reads a JPEG with chroma at half the resolution (4:2:0)."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
  return np.asarray(Image.open(buffer))


def coded(image: np.ndarray, rng: Rng, components: int, latent_noise: float = 0.0) -> np.ndarray:
  """Encodes and decodes with a `PatchCodec`; the noise is a share of each latent's standard deviation."""
  return codec(len(image))(image, rng, components, latent_noise)


def like_a_vae(image: np.ndarray, rng: Rng) -> np.ndarray:
  """Combines mild forms of the damage by an autoencoder and a sampler."""
  image = blurred(coded(image, rng, 64, 0.05), rng, 0.5)
  return noisy(blotched(image, rng, 6), rng, 4)


class PatchCodec:
  """A model of an autoencoder: the principal components of windows of 16 pixels at a stride of 8."""

  def __init__(self, images: Iterable[np.ndarray]):
    """Fits the components to uint8[S, S, 3] pictures, S a multiple of 8."""
    count, total, products = 0, 0.0, 0.0
    for image in images:
      windows = self._windows(image)
      count, total, products = count + len(windows), total + windows.sum(0), products + windows.T @ windows
    self._mean = total / count
    variances, basis = np.linalg.eigh(products / count - np.outer(self._mean, self._mean))
    self._scale, self._basis = np.sqrt(np.maximum(variances, 0)), basis  # the strongest component last

  def __call__(self, image: np.ndarray, rng: Rng, components: int, latent_noise: float) -> np.ndarray:
    """Keeps the strongest `components` of each window; see `coded`."""
    basis, scale = self._basis[:, -components:], self._scale[-components:]
    latents = (self._windows(image) - self._mean) @ basis
    latents += latent_noise * scale * rng.normal(size=latents.shape)
    total, count = np.zeros(image.shape), np.zeros((*image.shape[:2], 1))
    for (y, x), window in zip(self._corners(image), latents @ basis.T + self._mean):
      total[y : y + WINDOW, x : x + WINDOW] += window.reshape(WINDOW, WINDOW, 3)
      count[y : y + WINDOW, x : x + WINDOW] += 1
    return _pixels(total / count)

  def _windows(self, image: np.ndarray) -> np.ndarray:
    cut = [image[y : y + WINDOW, x : x + WINDOW].ravel() for y, x in self._corners(image)]
    return np.stack(cut).astype(float)

  def _corners(self, image: np.ndarray) -> Iterable[tuple[int, int]]:
    return itertools.product(range(0, len(image) - WINDOW + 1, STRIDE), repeat=2)


@functools.cache
def codec(side: int) -> PatchCodec:
  """Returns the codec for pictures of a side, fitted to pictures of training."""
  return PatchCodec(drawn(TAGS[i % len(TAGS)], "train", i // len(TAGS), "codec")[0].render(side) for i in range(FITTED))


def _pixels(image: np.ndarray) -> np.ndarray:
  return np.clip(image, 0, 255).round().astype(np.uint8)


DAMAGE: Mapping[str, Callable[[np.ndarray, Rng], np.ndarray]] = {
  "none": lambda image, rng: image,
  **{f"noise {sd} of 255": functools.partial(noisy, deviation=sd) for sd in (8, 16, 24, 32, 48)},
  **{f"blur {sd} px": functools.partial(blurred, deviation=sd) for sd in (0.5, 1.0, 1.5, 2.0)},
  "half size and back": halved,
  "half size and back, noise 8": lambda image, rng: noisy(halved(image, rng), rng, 8),
  **{f"JPEG 4:2:0, quality {q}": functools.partial(as_jpeg, quality=q) for q in (50, 20, 10)},
  **{f"patch PCA, {k} of 768": functools.partial(coded, components=k) for k in (64, 32, 16)},
  "color blotches 12": functools.partial(blotched, deviation=12),
  "VAE-like mix": like_a_vae,
}


# --- Images that are not of the world: (side, random generator) -> uint8[S, S, 3]


def _blobs(side: int, rng: Rng) -> np.ndarray:
  """One to three blobs of any form and color on the world's gray."""
  image = np.full((side, side, 3), float(scenes.BACKGROUND))
  for _ in range(rng.integers(1, 4)):
    field = ndimage.gaussian_filter(rng.normal(size=(side, side)), rng.uniform(3, 8) * side / 64)
    image[field > np.quantile(field, rng.uniform(0.85, 0.97))] = rng.integers(0, 256, 3)
  return _pixels(image)


GARBAGE: Mapping[str, Callable[[int, Rng], np.ndarray]] = {
  "blank: the gray": lambda side, rng: np.full((side, side, 3), scenes.BACKGROUND, np.uint8),
  "blank: any color": lambda side, rng: np.tile(rng.integers(0, 256, 3).astype(np.uint8), (side, side, 1)),
  "gradient": lambda side, rng: _pixels(np.linspace(0, 255, side)[None, :, None] * np.ones((side, side, 3))),
  "uniform noise": lambda side, rng: _pixels(rng.uniform(0, 255, (side, side, 3))),
  "random blobs": _blobs,
}


# --- Judging


class Verdict(NamedTuple):
  """The judgement of one damaged picture."""

  tag: str  # of the prompt, of TAGS
  score: bool  # the true prompt is accepted
  fp: bool  # a prompt that is false in one attribute is accepted
  exact: bool  # every object found with its shape and color, nothing else
  strict: bool  # as score and fp, under the strict rules
  strict_fp: bool


def verdict(image: np.ndarray, scene: Scene, metadata: Metadata, rng: random.Random) -> Verdict:
  """Judges the damaged picture of a scene by its own prompt and by a false one that `rng` chooses."""
  found, wrong = judge.detect(image), falsified(metadata, rng)
  return Verdict(
    metadata["tag"],
    judge.lenient(found, metadata),
    judge.lenient(found, wrong),
    classes(found) == classes(scene.objects),
    judge.strict(found, metadata),
    judge.strict(found, wrong),
  )


def damaged(side: int, number: int, names: Sequence[str] = tuple(DAMAGE)) -> dict[str, Verdict]:
  """Judges one scene after each kind of damage.

  Args:
    side: of the picture, in pixels.
    number: of the scene. Categories alternate, and within a category seen and held-out combinations.
    names: of DAMAGE.
  """
  tag, turn = TAGS[number % len(TAGS)], number // len(TAGS)
  scene, metadata = drawn(tag, ("val", "held_out")[turn % 2], turn, "figures")
  image, out = scene.render(side), {}
  for name in names:
    hurt = DAMAGE[name](image, np.random.default_rng(number))
    out[name] = verdict(hurt, scene, metadata, random.Random(f"{number}/false"))
  return out


def garbage(side: int, number: int, asked: Metadata, names: Sequence[str] = tuple(GARBAGE)) -> dict[str, dict]:
  """Judges garbage by a prompt; returns name of GARBAGE -> {"lenient": accepted, "strict": accepted}."""
  return {name: judge.score(GARBAGE[name](side, np.random.default_rng(number)), asked) for name in names}


def figures(verdicts: Sequence[Verdict]) -> dict[str, scores.Score]:
  """Returns the share of each field of `Verdict` with its interval."""
  return {name: scores.accuracy([getattr(v, name) for v in verdicts]) for name in Verdict._fields[1:]}


def _judge(task: tuple[int, int, Metadata]) -> tuple[dict[str, Verdict], dict[str, dict]]:
  side, number, asked = task
  return damaged(side, number), garbage(side, number, asked)


def measure(pictures: int, jobs: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Measures all rows at all sides, with its progress on stderr.

  Args:
    pictures: per row and side.
    jobs: processes.

  Returns:
    A dictionary per row: "side", "damage" or "garbage", and the figures as {"value", "low", "high"}.

  Raises:
    UserError: `pictures` is not a multiple of the number of categories, or `jobs` is below 1.
  """
  if pictures < 1 or pictures % len(TAGS):
    raise UserError(f"--pictures={pictures} must be a multiple of {len(TAGS)}, the number of categories")
  if jobs < 1:
    raise UserError(f"--jobs={jobs} must be at least 1")
  asked = [metadata for _, metadata in world.evaluation_prompts("val", pictures, 0)]
  tasks = [(side, number, asked[number]) for side in SIDES for number in range(pictures)]
  with contextlib.ExitStack() as stack:
    pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(jobs)) if jobs > 1 else None
    judged = pool.imap(_judge, tasks, chunksize=6) if pool else map(_judge, tasks)
    judged = list(tqdm(judged, total=len(tasks), unit="scene", mininterval=1))
  rows, passed = [], []
  for side in SIDES:
    here = [one for (at, _, _), one in zip(tasks, judged) if at == side]
    for name in DAMAGE:
      verdicts = [damage[name] for damage, _ in here]
      row = {"side": side, "damage": name, **_short(figures(verdicts))}
      by_tag = {tag: scores.accuracy([v.score for v in verdicts if v.tag == tag]) for tag in TAGS}
      rows.append(row | {"score by category": {tag: round(score.value, 4) for tag, score in by_tag.items()}})
    for name in GARBAGE:
      found = {rule: scores.accuracy([out[name][rule] for _, out in here]) for rule in ("strict", "lenient")}
      passed.append({"side": side, "garbage": name, **_short(found)})
  return rows, passed


def table(body: Mapping[str, Any]) -> str:
  """Returns the figures of a file as two Markdown tables."""
  return "\n\n".join(
    _table(body[kind], name, keys)
    for kind, name, keys in (
      ("rows", "damage", ("score", "fp", "exact")),
      ("garbage", "garbage", ("strict", "lenient")),
    )
  )


def _table(rows: Sequence[Mapping[str, Any]], name: str, keys: Sequence[str]) -> str:
  cells = {(row[name], row["side"], key): f"{row[key]['value']:.3f}" for row in rows for key in keys}
  columns = [(side, key) for side in SIDES for key in keys]
  lines = [[name, *(f"{side} px: {key}" if key == keys[0] else key for side, key in columns)]]
  lines.append(["---", *["---:"] * len(columns)])
  for first in dict.fromkeys(row[name] for row in rows):
    lines.append([first, *(cells[first, side, key] for side, key in columns)])
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _short(found: Mapping[str, scores.Score]) -> dict[str, dict[str, float]]:
  return {
    name: {"value": round(score.value, 4), "low": round(score.low, 4), "high": round(score.high, 4)}
    for name, score in found.items()
  }


def _text(body: Mapping[str, Any]) -> str:
  """The results as JSON with a line per row."""
  parts = []
  for key, value in body.items():
    if isinstance(value, list):
      parts.append(f' "{key}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]")
    else:
      parts.append(f' "{key}": {json.dumps(value)}')
  return "{\n" + ",\n".join(parts) + "\n}\n"


def main(arguments: Sequence[str] | None = None) -> int:
  """Measures, writes and prints; returns the exit code."""
  arguments = sys.argv[1:] if arguments is None else list(arguments)
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("output", metavar="OUTPUT.json", type=pathlib.Path, nargs="?", help="file to write")
  p.add_argument("--pictures", type=int, default=PICTURES, help=f"per row and side (default: {PICTURES})")
  p.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
  args = p.parse_args(arguments)
  try:
    if args.output:
      outputs.make_directory(args.output.parent, "OUTPUT.json")
      if args.output.is_dir():
        raise UserError(f"OUTPUT.json: {args.output} is a directory; name a file")
    rows, passed = measure(args.pictures, args.jobs)
  except UserError as error:
    print(error, file=sys.stderr)
    return 2
  body = {
    "command": shlex.join(["python", "launch/experiments/judge_figures.py", *arguments]),
    "commit": commit(),
    "pictures": args.pictures,
    "rows": rows,
    "garbage": passed,
  }
  if args.output:
    outputs.replace(args.output, _text(body))
  print(table(body))
  return 0


if __name__ == "__main__":
  sys.exit(main())
