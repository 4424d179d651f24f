"""A second judge for pictures of the built-in world: a model that reads, which no reward has trained, answers about them.

  python launch/experiments/second_judge.py --reader=runs/world/stage3 --output=second.json \\
    before=scores/before after=scores/after

NAME=FOLDER is an evaluation by `evaluate --benchmark=shapes` whose first picture of each prompt is judged. It is right if
the reader gives each expected answer: that each object of the prompt is there, how many of each of its shapes there are,
their relation, and that a color of another object is not on it. Reinforcement learning with the world's own judge
(jflow/world/judge.py) may please that judge alone; this one shares neither code nor features with it. "true" are renders
of the same kinds of scenes: what the reader makes of pictures that are right; "others", true pictures under the prompts
of their neighbours: what it accepts wrongly.
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
from jflow.evaluation import report, scores
from jflow.inference.pipeline import Pipeline
from jflow.interop import checkpoints
from jflow.world import scenes, source, words
from jflow.world.words import NUMBERS

SPLITS = {"seen": "val", "held-out": "held_out"}  # as in reports, as folders of pictures
BATCH = 64


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
  out += [(f"How many {words.plural_noun(shape)} are there?", NUMBERS[count]) for shape, count in counts.items()]
  for wanted in include:
    if "position" in wanted:
      relation, other = wanted["position"]
      name, shape = next(x for x in scenes.INVERSE if x.startswith(relation)), include[other]["class"]
      out.append((f"Is the {wanted['class']} {name} the {shape}?", "yes"))
      out.append((f"Is the {wanted['class']} {scenes.INVERSE[name]} the {shape}?", "no"))
  return out


def judged(reader: Pipeline, shown: Sequence[tuple[Image.Image, Mapping[str, Any]]]) -> list[bool]:
  """Whether the reader gives every expected answer about each picture."""
  questions = [(i, image, *one) for i, (image, about) in enumerate(shown) for one in asked(about)]
  answers = reader.understand_batch([reader.request(text, [image], 8) for _, image, text, _ in questions], BATCH)
  right = [True] * len(shown)
  for (i, _, _, expected), answer in zip(questions, answers, strict=True):
    right[i] &= answer.strip().lower().rstrip(".") == expected
  return right


def renders(split: str, prompts: Sequence[tuple[str, Mapping[str, Any]]], side: int) -> list[Image.Image]:
  """A true picture of each prompt's combination."""
  rng, wanted = (
    random.Random(f"second judge/{split}"),
    {json.dumps(about, sort_keys=True): None for _, about in prompts},
  )
  tags = {about["tag"] for _, about in prompts}
  while any(image is None for image in wanted.values()):
    for tag in tags:
      scene, combination = scenes.sample(tag, split, rng)
      key = json.dumps(source.prompt(combination)[1], sort_keys=True)
      if key in wanted and wanted[key] is None:
        wanted[key] = Image.fromarray(scene.render(side))
  return [wanted[json.dumps(about, sort_keys=True)] for _, about in prompts]


def main() -> int:
  """Judges the pictures and writes the shares that are right, with 95 % intervals."""
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("scored", nargs="+", type=lambda text: text.split("=", 1), metavar="NAME=FOLDER", help="evaluations")
  p.add_argument("--reader", required=True, help="a checkpoint that reads, trained without rewards")
  p.add_argument("--output", type=pathlib.Path, required=True)
  args = p.parse_args()
  reader, out = jflow.load(args.reader), {}
  for split, folder in SPLITS.items():
    files = {name: sorted((pathlib.Path(path) / "pictures" / folder).glob("*_0.png")) for name, path in args.scored}
    prompts = source.evaluation_prompts(folder, len(next(iter(files.values()))), 0)
    about = [one for _, one in prompts]
    shown = {name: [Image.open(file).convert("RGB") for file in found] for name, found in files.items()}
    shown["true"] = renders(folder, prompts, next(iter(shown.values()))[0].width)
    tags = list(dict.fromkeys(one["tag"] for one in about))
    for name, images in shown.items():
      right = judged(reader, list(zip(images, about, strict=True)))
      kinds = {tag: scores.accuracy(r for r, one in zip(right, about) if one["tag"] == tag) for tag in tags}
      kinds["overall"] = scores.average(list(kinds.values()))
      out.setdefault(name, {})[split] = {tag: [round(x, 4) for x in one[:3]] for tag, one in kinds.items()}
      print(f"{split:9}{name:12}" + "  ".join(f"{tag} {one.value:.3f}" for tag, one in kinds.items()), flush=True)
    others = [
      next(x for x in about[i + 1 :] + about[:i] if x["tag"] == one["tag"] and x != one) for i, one in enumerate(about)
    ]
    wrong = judged(reader, list(zip(shown["true"], others, strict=True)))
    out.setdefault("others", {})[split] = {"overall": round(sum(wrong) / len(wrong), 4)}
    print(f"{split:9}{'others':12}overall {sum(wrong) / len(wrong):.3f}", flush=True)
  settings = {name: report.read(pathlib.Path(path))["settings"] for name, path in args.scored}
  kept = ("fingerprint", "steps", "guidance", "seed")
  body = {
    "reader": report.fingerprint(checkpoints.locate(args.reader), "ema"),
    "settings": {n: {k: s[k] for k in kept} for n, s in settings.items()},
  }
  outputs.replace(args.output, json.dumps(body | {"right": out}, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
