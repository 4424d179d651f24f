"""The last step of quickstart.sh: generates from prompts, answers questions about held-out pictures, plots the losses.

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
from jflow.inference.pipeline import Pipeline
from jflow.inference.sheet import contact_sheet
from jflow.training.metrics import read_metrics
from jflow.world import judge, questions
from jflow.world import source as world

PROMPTS = 32
QUESTIONS = 24
OTHERS = (
  "a picture of two red squares",
  "a picture of three blue circles",
  "a picture of a green circle and a yellow star",
  "a picture of a black ring and a red heart",
  "a picture of a circle left of a cross",
  "a picture of a star above a square",
)


def single_object_prompts() -> list[tuple[str, dict]]:
  """One prompt per seen pair of color and shape, the first PROMPTS of an even sample."""
  pool = [x for x in world.evaluation_prompts("train", 600, seed=1) if x[1]["tag"] == "colors"]
  return pool[:PROMPTS]


def paint(model: Pipeline, out: pathlib.Path) -> str:
  """Writes sheet.png; returns one line that says how many pictures are right by the programmatic judge."""
  singles = single_object_prompts()
  prompts = [prompt for prompt, _ in singles] + list(OTHERS)
  c = model.model.config
  shape = (len(prompts), c.autoencoder.latent_channels, c.latent_size, c.latent_size)
  noise = np.random.default_rng(0).standard_normal(shape, np.float32)  # a seed gives every prompt the same noise
  images = model.generate(prompts, steps=30, guidance=3.0, noise=noise)
  names = [prompt.removeprefix("a picture of ") for prompt in prompts]
  contact_sheet(images, names, columns=8, side=128, lines=2).save(out / "sheet.png")
  color = shape_too = 0
  for image, (_, metadata) in zip(images, singles):
    wanted = metadata["include"][0]["color"]
    found = judge.detect(np.asarray(image))
    color += bool(found) and all(thing.color == wanted for thing in found)
    shape_too += judge.score(np.asarray(image), metadata)["strict"]
  total = len(singles)
  return (
    f"painted: the right color and no other in {color} of {total} single-object pictures, right in all in {shape_too}"
  )


def answer(model: Pipeline, out: pathlib.Path) -> str:
  """Writes answers.txt and answers.png about pictures with combinations that training never showed."""
  asked = questions.for_evaluation("held_out", QUESTIONS, seed=1)
  size = model.model.config.image_size
  pictures, lines, right = [], [], 0
  for scene, question in asked:
    picture = scene.render(size)
    said = model.understand("<image>\n" + question.question, [picture], max_tokens=16)
    right += said == question.answer
    pictures.append(Image.fromarray(picture))
    lines.append((question.question.splitlines()[0], said, question.answer))
  text = [f"{q}  ->  {said}" + ("" if said == want else f"   (right: {want})") for q, said, want in lines]
  (out / "answers.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
  contact_sheet(pictures, text, columns=6, side=160, lines=4).save(out / "answers.png")
  return f"answered: {right} of {len(asked)} questions about held-out pictures"


def plot(out: pathlib.Path) -> None:
  """Writes losses.png: every loss of every stage."""
  stages = sorted(p for p in out.glob("stage*") if (p / "metrics.jsonl").exists())
  figure, axes = plt.subplots(1, len(stages), figsize=(4 * len(stages), 3), squeeze=False)
  for axis, stage in zip(axes[0], stages):
    rows = read_metrics(stage)
    for name in sorted({k for row in rows for k in row if k.startswith("loss_")}):
      values = np.array([row.get(name) or np.nan for row in rows], float)
      if np.isfinite(values).any():
        axis.plot([row["step"] for row in rows], values, label=name.removeprefix("loss_"), linewidth=1)
    axis.set_title(stage.name)
    axis.set_xlabel("step")
    axis.legend(fontsize=7)
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
