"""The last step of quickstart.sh: generates from prompts, answers questions about new pictures, plots the losses.

python launch/quickstart.py FOLDER     # FOLDER holds stage0 ... stage3
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

root = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))

import jflow
from configs.world import QUICK_SPREAD
from jflow.inference.pipeline import Pipeline
from jflow.inference.sheet import contact_sheet
from jflow.training import plots
from jflow.training.metrics import read_metrics
from jflow.world import judge, questions
from jflow.world import source as world

PROMPTS, NOISES = 64, 2  # of single objects: of the 68 pairs of color and shape that training shows
SHOWN = 32  # of these on the sheet, from the first noise
OTHERS = 8  # prompts of pairs that training never shows
QUESTIONS = 24  # about new pictures of seen pairs, and as many about held-out pairs
KINDS = ("color", "shape", "color", "shape", "existence_shape")  # the last one twice, as a yes and a no


def prompts_of(split: str, count: int) -> list[tuple[str, dict]]:
  """Prompts of single objects with a color: the first `count` of an even sample."""
  return [one for one in world.evaluation_prompts(split, 600, seed=1) if one[1]["tag"] == "colors"][:count]


def paint(model: Pipeline, out: pathlib.Path) -> str:
  """Writes sheet.png; returns one line that says how many pictures are right by the programmatic judge."""
  singles, others = prompts_of("train", PROMPTS), prompts_of("held_out", OTHERS)
  c = model.model.config
  shape = (c.autoencoder.latent_channels, c.latent_size, c.latent_size)
  rng = np.random.default_rng(0)  # a seed gives every prompt the same noise
  color = right = 0
  shown = []
  for number in range(NOISES):
    asked = singles + others * (number == 0)
    noise = rng.standard_normal((len(asked), *shape), np.float32)
    images = model.generate([prompt for prompt, _ in asked], steps=30, guidance=2.0, noise=noise)
    shown = shown or images[:SHOWN] + images[PROMPTS:]
    for image, (_, metadata) in zip(images, singles):
      found = judge.detect(np.asarray(image))
      color += bool(found) and all(thing.color == metadata["include"][0]["color"] for thing in found)
      right += judge.score(np.asarray(image), metadata)["strict"]
  names = [prompt.removeprefix("a picture of ") for prompt, _ in singles[:SHOWN] + others]
  contact_sheet(shown, names, columns=8, side=128, lines=2).save(out / "sheet.png")
  total = PROMPTS * NOISES
  return f"painted: right in color and shape in {right} of {total} single objects, in color in {color} of {total}"


def answer(model: Pipeline, out: pathlib.Path) -> str:
  """Writes answers.txt and answers.png about new pictures of seen pairs, and of pairs that training never shows."""
  size = model.model.config.image_size
  pictures, lines, said = [], [], []
  for split, name in (("val", "new pictures"), ("held_out", "pictures of held-out pairs")):
    right = 0
    for scene, asked in questions.for_evaluation(split, QUESTIONS, 1, KINDS, ("colors",), 1.0, QUICK_SPREAD):
      picture = scene.render(size)
      told = model.understand("<image>\n" + asked.question, [picture], max_tokens=16)
      right += told == asked.answer
      pictures.append(Image.fromarray(picture))
      wanted = "" if told == asked.answer else f"   (right: {asked.answer})"
      lines.append(f"{asked.question.splitlines()[0]}  ->  {told}{wanted}")
    said.append(f"{right} of {QUESTIONS} questions about {name}")
  (out / "answers.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
  contact_sheet(pictures, lines, columns=6, side=160, lines=4).save(out / "answers.png")
  return "answered: " + ", ".join(said)


def plot(out: pathlib.Path) -> None:
  """Writes losses.png: a row for each loss, a column for each stage, smoothed over a fiftieth of the stage."""
  stages = {path.name: read_metrics(path) for path in sorted(out.glob("stage*")) if (path / "metrics.jsonl").exists()}
  names = [name for name in plots.losses_of(list(stages.values())) if name != "loss"]
  size = (3.2 * len(stages), 2.2 * len(names))
  figure, axes = plt.subplots(len(names), len(stages), figsize=size, sharex="col", sharey="row", squeeze=False)
  for row, name in zip(axes, names):
    row[0].set_ylabel(name.removeprefix("loss_"))
    for axis, metrics in zip(row, stages.values()):
      curve = plots.curve(metrics, name)
      axis.plot(curve.steps, plots.smoothed(curve.values, max(1, len(metrics) // 50)), linewidth=1)
      axis.grid(alpha=0.3)
  for axis, stage in zip(axes[0], stages):
    axis.set_title(stage)
  for axis in axes[-1]:
    axis.set_xlabel("step")
  figure.tight_layout()
  figure.savefig(out / "losses.png", dpi=90)


def main() -> None:
  out = pathlib.Path(sys.argv[1])
  plot(out)
  model = jflow.load(out / "stage3")
  summary = [paint(model, out), answer(model, out)]
  (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
  print("\n".join(summary))
  print(f"the pictures:  {out / 'sheet.png'}")
  print(f"the answers:   {out / 'answers.png'}, {out / 'answers.txt'}")
  print(f"the losses:    {out / 'losses.png'}")
  print(
    f'try your own:  {sys.executable} -m jflow generate --checkpoint={out / "stage3"} --prompt="a picture of a red ring" --output={out / "mine"}'
  )


if __name__ == "__main__":
  main()
