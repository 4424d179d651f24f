"""A second judge of pictures of the built-in world: a model that reads, trained without rewards, answers about them.

  python launch/experiments/second_judge.py --reader=runs/world/stage3 --output=second.json \
    before=scores/before after=scores/after

NAME=FOLDER is an evaluation by `evaluate --benchmark=shapes`. A picture is right if the reader gives each expected
answer: that each object of the prompt is there and a shape that it does not name is not, how many of each of its shapes
there are, their relation, and that the color of one object is not on the other. Reinforcement learning with the world's
own judge (jflow/world/judge.py) may please that judge alone; this one shares neither code nor features with it. "true"
are renders of the same kinds: what the reader makes of pictures that are right; "others", the same under prompts of
their kind that they do not fulfil: what it accepts wrongly.
"""

import argparse
import collections
import json
import pathlib
import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
import jflow
from jflow import outputs
from jflow.data.sequences import IMAGE_MARK
from jflow.evaluation import report, scores
from jflow.evaluation.answers import normal_answer
from jflow.evaluation.samples import read_picture
from jflow.inference.pipeline import Pipeline
from jflow.interop import checkpoints
from jflow.world import benchmark, judge, references, scenes, source, words
from jflow.world.questions import SHORT_ANSWER
from jflow.world.words import NUMBERS

BATCH = 64
TRUE = 60  # true pictures of a kind
RESERVED = ("true", "others")

Shown = tuple[Image.Image, Mapping[str, Any]]  # a picture, and the metadata of its prompt


def asked(about: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Questions and their answers for a picture that shows what the metadata of a prompt asks for."""
  include, out = about["include"], []
  counts = collections.Counter()
  for wanted in include:
    counts[wanted["class"]] += wanted["count"]
    out.append((f"Is there {words.noun(wanted['class'], wanted.get('color'))} in the picture?", "yes"))
  colors = {wanted["class"]: wanted["color"] for wanted in include if "color" in wanted}
  if len(colors) == 2 and len(set(colors.values())) == 2:
    (a, red), (b, blue) = colors.items()
    out += [(f"Is there {words.noun(shape, color)} in the picture?", "no") for shape, color in ((a, blue), (b, red))]
  absent = next(shape for shape in scenes.SHAPES if shape not in counts)
  out.append((f"Is there {words.noun(absent)} in the picture?", "no"))
  out += [(f"How many {words.plural_noun(shape)} are there?", NUMBERS[count]) for shape, count in counts.items()]
  for wanted in include:
    if "position" in wanted:
      relation, other = wanted["position"]
      name, shape = next(x for x in scenes.INVERSE if x.startswith(relation)), include[other]["class"]
      out.append((f"Is the {wanted['class']} {name} the {shape}?", "yes"))
      out.append((f"Is the {wanted['class']} {scenes.INVERSE[name]} the {shape}?", "no"))
  return out


def judged(reader: Pipeline, shown: Sequence[Shown]) -> list[bool]:
  """Whether the reader gives every expected answer about each picture, asked as the benchmark asks."""
  questions = [(i, image, *one) for i, (image, about) in enumerate(shown) for one in asked(about)]
  answers = reader.understand_batch(
    [reader.request(f"{IMAGE_MARK}\n{text}{SHORT_ANSWER}", [image], 16) for _, image, text, _ in questions], BATCH
  )
  right = [True] * len(shown)
  for (i, _, _, expected), answer in zip(questions, answers, strict=True):
    right[i] &= normal_answer(answer) == normal_answer(expected)
  return right


def true_pictures(split: str, tags: Sequence[str], side: int) -> tuple[list[Shown], list[Shown]]:
  """Renders with the metadata of their own prompts, and with those of a prompt of their kind that they do not fulfil."""
  rng, true, others = random.Random(f"second judge/{split}"), [], []
  for tag in tags:
    drawn = [scenes.sample(tag, split, rng) for _ in range(TRUE)]
    prompts = [source.prompt(combination)[1] for _, combination in drawn]
    for i, (scene, _) in enumerate(drawn):
      image, large = Image.fromarray(scene.render(side)), judge.detect(scene.render(judge.MOST_SIDE))
      true.append((image, prompts[i]))
      others += [(image, x) for x in prompts[i + 1 :] + prompts[:i] if not judge.lenient(large, x)][:1]
  return true, others


def by_kind(right: Sequence[bool], about: Sequence[Mapping[str, Any]]) -> dict[str, scores.Score]:
  """Kind of prompt -> share of pictures that are right; pictures of one prompt count as related."""
  kinds: dict[str, dict[str, list[float]]] = {}
  for one, prompt in zip(right, about, strict=True):
    kinds.setdefault(prompt["tag"], {}).setdefault(prompt["prompt"], []).append(float(one))
  out = {tag: scores.clustered(list(groups.values())) for tag, groups in kinds.items()}
  return out | {"overall": scores.average(list(out.values()))}


def evaluation(text: str) -> tuple[str, pathlib.Path, dict[str, Any]]:
  """NAME=FOLDER -> the two, and the report.

  Raises:
    ArgumentTypeError: there is no evaluation of pictures by the benchmark `shapes`.
  """
  name, _, folder = text.partition("=")
  found = report.read(pathlib.Path(folder)) if folder else None
  if not name or name in RESERVED or not found or found["benchmark"] != "shapes":
    raise argparse.ArgumentTypeError(
      f"{text!r} must be NAME=FOLDER, an evaluation by --benchmark=shapes, and no NAME of {', '.join(RESERVED)}"
    )
  if found["settings"]["only"] == "questions":
    raise argparse.ArgumentTypeError(f"{text!r} has no pictures: it was made with --only=questions")
  return name, pathlib.Path(folder), found


def main() -> int:
  """Judges the pictures and writes the shares that are right, with 95 % intervals."""
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("scored", nargs="+", type=evaluation, metavar="NAME=FOLDER", help="evaluations")
  p.add_argument("--reader", required=True, help="a checkpoint that reads, trained without rewards")
  p.add_argument("--output", type=pathlib.Path, required=True)
  args = p.parse_args()
  reader, out = jflow.load(args.reader), {}
  for folder, split in benchmark.SPLITS.items():
    shown: dict[str, list[Shown]] = {}
    for name, path, _ in args.scored:
      found = benchmark.painted(path, folder, references.Scope())
      shown[name] = [(read_picture(file), about) for _, about, file in found]
    images = next(iter(shown.values()))
    tags = list(dict.fromkeys(about["tag"] for _, about in images))
    shown["true"], shown["others"] = true_pictures(folder, tags, images[0][0].width)
    for name, pictures in shown.items():
      right = by_kind(judged(reader, pictures), [about for _, about in pictures])
      out.setdefault(name, {})[split] = {tag: [round(x, 4) for x in one[:3]] for tag, one in right.items()}
      print(f"{split:9}{name:12}" + "  ".join(f"{tag} {one.value:.3f}" for tag, one in right.items()), flush=True)
  kept = ("fingerprint", "steps", "guidance", "temperature", "seed", "pictures")
  settings = {name: {k: v for k, v in told["settings"].items() if k in kept} for name, _, told in args.scored}
  body = {"reader": report.fingerprint(checkpoints.locate(args.reader), "ema"), "settings": settings, "right": out}
  outputs.replace(args.output, json.dumps(body, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
