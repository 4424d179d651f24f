"""Overfitting of real photographs: imports and memorizes them, generates from captions, answers questions.

  python launch/experiments/photos.py FOLDER       # a few minutes on 2 cores; needs scikit-image and scikit-learn
  python launch/experiments/photos.py FOLDER --base=quickstart/stage3         # by adapters of rank 8 beside that model

With --base, a model of size `quick`, its other abilities are measured before and after: single objects of the built-in
world and questions about them. --rehearsed mixes the world's records into the training.

FOLDER gets photos/ (JPEG and PNG of their own sizes and two LLaVA JSONL files), the data sets of `prepare`, the run,
painted.png and result.json. Exits with 1 unless 9 of 10 pictures and answers are right.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image

try:
  import skimage.data
  import sklearn.datasets
except ImportError:
  sys.exit("launch/experiments/photos.py needs the photographs of two packages: pip install scikit-image scikit-learn")

root = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(root))

import writers

import jflow
from jflow.data import images
from jflow.inference.sheet import contact_sheet

# Name -> (caption, ((question, answer), ...)), all written for this file.
PHOTOS = {
  "astronaut": (
    "an astronaut in an orange suit smiles at the camera",
    (("Who is in the picture?", "an astronaut"), ("What color is the suit?", "orange")),
  ),
  "camera": (
    "a man in a dark coat looks through a camera on a tripod",
    (("What is the man doing?", "taking a picture"),),
  ),
  "coffee": ("a cup of coffee on a saucer with a spoon", (("What is in the cup?", "coffee"),)),
  "chelsea": ("the face of a ginger cat, seen from close by", (("What animal is this?", "a cat"),)),
  "rocket": ("a white rocket stands on its launch pad at dusk", (("What stands on the pad?", "a rocket"),)),
  "coins": ("rows of ancient coins on a dark table", (("What lies on the table?", "coins"),)),
  "hubble_deep_field": ("hundreds of galaxies in deep space", (("What are the bright spots?", "galaxies"),)),
  "retina": ("the inside of an eye with its blood vessels", (("What organ is this?", "an eye"),)),
  "immunohistochemistry": (
    "stained tissue under a microscope, brown and blue",
    (("How was the picture taken?", "with a microscope"),),
  ),
  "brick": ("a wall of bricks", (("What is the wall made of?", "bricks"),)),
  "grass": ("a meadow of grass from above", (("What grows here?", "grass"),)),
  "moon": ("craters on the moon", (("Where is this?", "on the moon"),)),
  "china": (
    "a Chinese palace under a blue sky",
    (("In which country is this?", "China"), ("What kind of building is it?", "a palace")),
  ),
  "flower": ("a red flower with green leaves behind it", (("What plant part is shown?", "a flower"),)),
}


TUNED = (  # the words of the photographs are new to the base: so the head has an adapter, too
  "--config=tune:quick",
  "--config.lora.rank=8",
  "--config.lora.alpha=16.0",
  "--config.lora.patterns=('language_model','generation_(encoder|decoder)','generation_(output_)?projector',"
  "'understanding_projector')",
  "--config.train.steps=600",
  "--config.optimizer.learning_rate=6e-3",
  "--config.optimizer.cooldown_steps=600",
  "--config.objective.draws.time_mean=0.0",
  "--config.objective.draws.time_std=1.0",
  "--config.data.first_sentence=0.0",
  "--config.data.sources.text=()",
  "--config.data.mixture=((0,(25,75,0)),)",
)


def original(name: str) -> np.ndarray:
  """A photograph as shipped: uint8[H, W] or uint8[H, W, 3]."""
  if name in ("china", "flower"):
    return sklearn.datasets.load_sample_image(f"{name}.jpg")
  return getattr(skimage.data, name)()


def write_photos(folder: pathlib.Path) -> None:
  """Writes every second photograph as JPEG, the others as PNG, and reading.jsonl and painting.jsonl."""
  folder.mkdir(parents=True, exist_ok=True)
  reading, painting = [], []
  for i, (name, (caption, questions)) in enumerate(PHOTOS.items()):
    file = f"{name}.{'jpg' if i % 2 else 'png'}"
    Image.fromarray(original(name)).save(folder / file)
    painting.append({"id": name, "image": file, "caption": caption})
    turns = []
    for question, answer in questions:
      turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    reading.append({"id": name, "image": file, "conversations": turns})
  for file, records in (("reading.jsonl", reading), ("painting.jsonl", painting)):
    (folder / file).write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def command(*arguments: str) -> None:
  """Runs a jflow command as a subprocess."""
  subprocess.run([sys.executable, "-m", "jflow", *arguments], check=True, cwd=root)


def main() -> int:
  parser = argparse.ArgumentParser(
    description="Memorizes 14 photographs, generates them, and answers questions about them."
  )
  parser.add_argument("folder", type=pathlib.Path, help="where all of it goes; the same folder goes on")
  parser.add_argument(
    "--base", metavar="CHECKPOINT", type=pathlib.Path, help="a model of size quick, to tune by adapters"
  )
  parser.add_argument("--rehearsed", action="store_true", help="with --base: half of what is seen is the world's")
  args = parser.parse_args()
  out = args.folder.resolve()
  write_photos(out / "photos")
  for task, file in (("understanding", "reading"), ("generation", "painting")):
    if not (out / task).exists():
      command(
        "prepare",
        "--format=llava-jsonl",
        f"--input={out / 'photos' / file}.jsonl",
        f"--output={out / task}",
        f"--task={task}",
      )
  how = ("--config=configs/photos.py",)
  if args.base:
    how = (*TUNED, f"--config.train.init_from={args.base.resolve()}")
  others = ",('shapes',1.0)" if args.rehearsed else ""
  command(
    "train",
    *how,
    f"--workdir={out / 'run'}",
    *(f"--config.data.sources.{task}=(('{out / task}',1.0){others},)" for task in ("understanding", "generation")),
  )

  model = jflow.load(out / "run")
  size = model.model.config.image_size
  crops = {name: square_crops(file_of(out, name), size) for name in PHOTOS}
  painted = model.generate([caption for caption, _ in PHOTOS.values()], steps=30, guidance=2.0, seed=0)
  nearest = []
  for image in painted:  # training paints random square crops, so the distance is that to the nearest crop
    pixels = np.asarray(image, np.float32)
    distance = {name: float(((crop - pixels) ** 2).mean(axis=(1, 2, 3)).min()) for name, crop in crops.items()}
    nearest.append(min(distance, key=distance.get))
  right = sum(a == b for a, b in zip(nearest, PHOTOS))

  answers = []
  for name, (_, questions) in PHOTOS.items():
    file = file_of(out, name)
    messages = []
    for question, answer in questions:
      messages.append({"role": "user", "content": question})
      said = model.understand(messages, [file], max_tokens=24)
      messages.append({"role": "assistant", "content": said})
      answers.append({"photo": name, "question": question, "answer": answer, "said": said})
  correct = sum(a["said"] == a["answer"] for a in answers)

  pairs = [x for name, image in zip(PHOTOS, painted) for x in (Image.fromarray(crops[name][4].astype(np.uint8)), image)]
  captions = [x for caption, _ in PHOTOS.values() for x in ("photograph", caption)]
  contact_sheet(pairs, captions, columns=8, side=128).save(out / "painted.png")
  result = {
    "painted": [right, len(PHOTOS)],
    "nearest": dict(zip(PHOTOS, nearest)),
    "answered": [correct, len(answers)],
    "answers": answers,
  }
  if args.base:
    result["abilities"] = {"before": writers.abilities(jflow.load(args.base)), "after": writers.abilities(model)}
  (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
  print(f"painted: the nearest photograph is the right one for {right} of {len(PHOTOS)}")
  print(f"answered: {correct} of {len(answers)} questions word for word")
  print(f"all on one page: {out / 'painted.png'}")
  return 0 if right >= 0.9 * len(PHOTOS) and correct >= 0.9 * len(answers) else 1


def file_of(out: pathlib.Path, name: str) -> pathlib.Path:
  """The file of a photograph from `write_photos`."""
  return next((out / "photos").glob(f"{name}.*"))


def square_crops(file: pathlib.Path, size: int, count: int = 9) -> np.ndarray:
  """Square crops f32[count, size, size, 3] of a written photograph, evenly along its long side, the middle included."""
  image = Image.fromarray(images.decode(file.read_bytes()))
  side = min(image.size)
  crops = []
  for share in np.linspace(0.0, 1.0, count):
    left, top = share * (image.width - side), share * (image.height - side)
    crops.append(image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side)))
  return np.stack([np.asarray(crop, np.float32) for crop in crops])


if __name__ == "__main__":
  sys.exit(main())
