"""Painting benchmarks with a scorer of their own: its folder layout is written, its results are read back."""

import argparse
import json
import math
import pathlib
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jflow import outputs
from jflow.data.importers.inputs import is_hidden
from jflow.errors import UserError
from jflow.evaluation import distances, outside, scores
from jflow.evaluation.recipes import Recipe
from jflow.evaluation.report import Result
from jflow.evaluation.samples import need, need_all
from jflow.evaluation.scores import Score
from jflow.evaluation.tasks import Painting, save

GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
_GUIDANCE = (
  "The guidance with which the paper painted for this benchmark is not published (for its FID: w = 2): report several, "
  "--sweep_guidance=2,3,5,7.5 makes them."
)
_FEATURES = "run launch/experiments/features.py again"


class Geneval:
  """pictures/00000/metadata.jsonl and pictures/00000/samples/00000.png, as its evaluator reads them."""

  published = 553  # prompts

  def __init__(self, recipe: Recipe, args: argparse.Namespace):
    """Reads the prompts; `args`: flags of the command."""
    self._recipe, self._args = recipe, args
    self._file = outside.find(args.data, ("evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl"), recipe)
    rows = []
    for where, row in outside.rows_of(self._file):
      need(row, ("tag", "include", "prompt"), where)
      outside.need_texts(row, ("tag", "prompt"), where)
      rows.append(row)
    if not rows:
      raise UserError(f"{self._file} holds no prompts: {recipe.data}")
    self._found, self._prompts = len(rows), rows[: args.limit]

  def data_files(self) -> list[pathlib.Path]:
    """What the pictures depend on: the file with the prompts."""
    return [self._file]

  def tasks(self) -> list[Painting]:
    """All pictures, prompt by prompt."""
    return [
      Painting(f"{i:05d}/{j}", row["prompt"], self._args.seed + j, f"pictures/{i:05d}/samples/{j:05d}.png")
      for i, row in enumerate(self._prompts)
      for j in range(self._recipe.pictures)
    ]

  def score(self, records: Mapping[str, Any]) -> Result:
    """Completes the layout, or reads what the evaluator found in it."""
    need_all([task.key for task in self.tasks()], records, "geneval", "run the same command again")
    folder = self._args.output.resolve() / "pictures"
    for i, row in enumerate(self._prompts):  # one object per file: the evaluator reads it whole
      outputs.replace(folder / f"{i:05d}" / "metadata.jsonl", json.dumps(row) + "\n")
    notes = [_GUIDANCE, *outside.another_number(self._found, self.published, self._args)]
    if self._args.results is None:
      results = folder.parent / "results.jsonl"
      words = ["python", "evaluation/evaluate_images.py", folder, "--outfile", results]
      words += ["--model-path", "OBJECT_DETECTOR_FOLDER"]
      where = "in GenEval's checkout (OBJECT_DETECTOR_FOLDER: the folder that its evaluation/download_models.sh filled)"
      return Result({}, [outside.next_command(where, words, self._args, results=results), *notes])
    found = self._read(self._args.results)
    return Result(found, ["Overall is the plain mean of the six categories, as GenEval's.", *notes])

  def _read(self, path: pathlib.Path) -> dict[str, Score]:
    found: dict[str, bool] = {}
    for where, row in outside.rows_of(path):
      need(row, ("filename", "tag", "correct"), where)
      name = re.search(r"(?<!\d)(\d{1,9})[/\\]samples[/\\](\d{1,9})\.png$", str(row["filename"]))
      if not name:
        raise UserError(f"{where} names {row['filename']!r:.200}, no picture of GenEval's layout: give its --outfile")
      number = int(name[1])
      key = f"{number:05d}/{int(name[2])}"
      if key in found:
        raise UserError(f"{where} names {row['filename']}, which comes twice: give the results of one run")
      if not isinstance(row["correct"], bool):
        raise UserError(f"{where} has correct={row['correct']!r:.60}, neither true nor false: give its --outfile")
      ours = self._prompts[number] if number < len(self._prompts) else {}
      for field in ("tag", "prompt"):
        if field in row and field in ours and row[field] != ours[field]:
          raise UserError(
            f"{where} has {field}={row[field]!r:.200} where this evaluation has {ours[field]!r}: give "
            "the results of its own pictures"
          )
      found[key] = row["correct"]
    wanted = [task.key for task in self.tasks()]
    outside.no_others(wanted, found, str(path), "give the results of its own pictures")
    need_all(wanted, found, str(path), "let the evaluator finish")
    groups: dict[str, list[list[bool]]] = defaultdict(list)
    for i, row in enumerate(self._prompts):
      groups[row["tag"]].append([found[f"{i:05d}/{j}"] for j in range(self._recipe.pictures)])
    parts = {tag: scores.clustered(groups[tag]) for tag in (*GENEVAL_TAGS, *groups) if tag in groups}
    return {"overall": scores.average(list(parts.values()))} | parts


class Dpg:
  """grids/NAME.png: four pictures of a prompt in a square, as its scorer cuts them."""

  published = 1065  # prompts

  def __init__(self, recipe: Recipe, args: argparse.Namespace):
    """Reads the prompts; `args`: flags of the command."""
    self._recipe, self._args = recipe, args
    if recipe.pictures not in (1, 4):
      raise UserError(f"--pictures={recipe.pictures}: DPG-Bench takes 4 pictures per prompt, or 1")
    folder = args.data / "prompts" if (args.data / "prompts").is_dir() else args.data
    self._files = sorted(path for path in folder.glob("*.txt") if not is_hidden(path.name))
    if not self._files:
      raise UserError(f"{folder} holds no prompts (*.txt): {recipe.data}")
    self._prompts = {path.stem: " ".join(outside.text_of(path).split()) for path in self._files[: args.limit]}
    empty = [name for name, prompt in self._prompts.items() if not prompt]
    if empty:
      raise UserError(f"{folder / empty[0]}.txt holds no prompt: {recipe.data}")

  def data_files(self) -> list[pathlib.Path]:
    """What the pictures depend on: the files with the prompts."""
    return list(self._files)

  def tasks(self) -> list[Painting]:
    """All pictures, prompt by prompt."""
    return [
      Painting(f"{name}/{j}", prompt, self._args.seed + j, f"pictures/{name}_{j}.png")
      for name, prompt in self._prompts.items()
      for j in range(self._recipe.pictures)
    ]

  def score(self, records: Mapping[str, Any]) -> Result:
    """Puts the grids together, or reads what the scorer found in them."""
    need_all([task.key for task in self.tasks()], records, "dpg", "run the same command again")
    output, side = self._args.output.resolve(), 0
    for name in self._prompts:
      tiles = [Image.open(output / f"pictures/{name}_{j}.png") for j in range(self._recipe.pictures)]
      side = tiles[0].width
      if not (output / f"grids/{name}.png").exists():
        save(grid(tiles), output / f"grids/{name}.png")
    notes = [_GUIDANCE, *outside.another_number(len(self._files), self.published, self._args)]
    if self._args.results is None:
      results = output / "results.txt"
      words = ["python", "dpg_bench/compute_dpg_bench.py", "--image-root-path", output / "grids", "--resolution", side]
      words += ["--pic-num", self._recipe.pictures, "--res-path", results]
      return Result({}, [outside.next_command("in ELLA's checkout", words, self._args, results=results), *notes])
    said = (
      "Category scores are the scorer's own: those of the last picture of each prompt, without the rule that a "
      "child falls with its parent."
    )
    return Result(self._read(self._args.results), [said, *notes])

  def _read(self, path: pathlib.Path) -> dict[str, Score]:
    """A line per grid (path, a score per picture, their mean), then a summary from "Model:" on."""
    averages: dict[str, float] = {}
    categories: dict[str, Score] = {}
    section = None
    for number, line in enumerate(outside.text_of(path).split("\n"), 1):
      where = f"{path}, line {number},"
      if line.startswith("Model: ") or line.endswith(" category scores:"):
        section = line.split()[0]
      elif line.startswith("DPG-Bench score: "):
        section = None  # the end: lines of another run behind it come twice
      elif section is None and line.strip():
        name, average = self._row(line, where)
        if name in averages:
          raise UserError(f"{where} names {name}, which comes twice: give the results of one run")
        averages[name] = average
      elif section == "L1" and line.startswith("\t"):
        name, _, value = line.strip().rpartition(": ")
        categories[name] = Score(outside.number_of(value, 100, where))
    outside.no_others(list(self._prompts), averages, str(path), "give the results of its own grids")
    need_all(
      list(self._prompts),
      averages,
      str(path),
      "the scorer drops pictures that fail without a word: run it again",
    )
    overall = scores.mean([averages[name] for name in self._prompts], 100)
    return {"overall": overall} | dict(sorted(categories.items()))

  def _row(self, line: str, where: str) -> tuple[str, float]:
    """(name of the prompt, mean of its pictures' scores); commas may stand in the path."""
    pictures = self._recipe.pictures
    path, *numbers = line.rsplit(", ", pictures + 1)
    if len(numbers) == pictures + 1:
      values = [outside.number_of(one, 1, where) for one in numbers]
      if abs(math.fsum(values[:-1]) / pictures - values[-1]) < 1e-6:
        return pathlib.PurePosixPath(path).stem, values[-1]
    raise UserError(
      f"{where} is no path with {pictures} scores and their mean: give what --res-path named (not its "
      f"_detail.txt), made with --pic-num {pictures}"
    )


class Mjhq:
  """pictures/ID.png; the Frechet distance and the similarity come from features that an extractor wrote."""

  published = 30_000  # pictures and prompts

  def __init__(self, recipe: Recipe, args: argparse.Namespace):
    """Reads the prompts; `args`: flags of the command."""
    self._recipe, self._args = recipe, args
    self._file = outside.find(args.data, ("meta_data.json",), recipe)
    rows = outside.object_of(outside.text_of(self._file), f"{self._file}")
    for name, row in rows.items():
      where = f"{self._file}, picture {name!r},"
      if not isinstance(row, dict):
        raise UserError(f"{where} is no JSON object, but {row!r:.60}")
      need(row, ("prompt", "category") if recipe.prompts else ("prompt",), where)
      outside.need_texts(row, ("prompt",), where)
      if re.search(r"[/\\\0]", name) or name in ("", ".", ".."):
        raise UserError(f"{where} has no name that a file could bear: {recipe.data}")
    chosen = evenly(rows, recipe.prompts, str(self._file)) if recipe.prompts else list(rows)
    self._all = list(rows)
    self._prompts = {name: rows[name]["prompt"] for name in chosen[: args.limit]}

  def data_files(self) -> list[pathlib.Path]:
    """What the pictures depend on: the file with the prompts."""
    return [self._file]

  def tasks(self) -> list[Painting]:
    """One picture per prompt; each starts from noise of its own."""
    first = self._args.seed
    return [
      Painting(name, prompt, first + i, f"pictures/{name}.png")
      for i, (name, prompt) in enumerate(self._prompts.items())
    ]

  def score(self, records: Mapping[str, Any]) -> Result:
    """Says how to make features, or measures on them."""
    need_all([task.key for task in self.tasks()], records, self._recipe.name, "run the same command again")
    notes = outside.another_number(len(self._all), self.published, self._args)
    if self._recipe.prompts:
      total = f"{len(self._all):,}"
      notes.append(
        f"The prompts are {self._recipe.prompts:,} of {total}, drawn with a seed, as many of each category; "
        f"the reference is all {total} true pictures. The paper does not say which it took."
      )
    if self._args.features is None:
      features = self._args.output.resolve() / "features.npz"
      words = [
        "python",
        outside.script("launch/experiments/features.py"),
        f"--pictures={features.with_name('pictures')}",
        f"--reference={self._file.resolve().parent}",
        "--inception=inception-2015-12-05.pt",
        "--clip=clip-vit-large-patch14",
        f"--output={features}",
      ]
      where = (
        "where PyTorch is installed (--inception: the TorchScript file that clean-fid takes; --clip: the folder "
        "of Hugging Face's openai/clip-vit-large-patch14, may be left out)"
      )
      return Result({}, [outside.next_command(where, words, self._args, features=features), *notes])
    found, resize = self._measure(_arrays(self._args.features))
    both = [
      ("Lanczos to 256, as GigaGAN's script has it", "--resize=lanczos"),
      ("bicubic to 256, as an author of the paper says", "--resize=bicubic"),
    ]
    (done, _), (other, flag) = both if resize == "lanczos" else both[::-1]
    said = [
      f"Pictures were resized {done}, then bicubic to 299 in float32. Report the other way too, {other}: "
      f"launch/experiments/features.py {flag}.",
      f"A distance is comparable only at the same number of pictures: here {len(self._prompts):,} painted ones and "
      f"{len(self._all):,} true ones.",
    ]
    return Result(found, [*said, *notes])

  def _measure(self, arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Score], str]:
    """Scores, and how pictures were resized to 256: "lanczos" or "bicubic"."""
    path = self._args.features
    for name in ("names", "generated", "reference", "reference_names", "resize"):
      if name not in arrays:
        raise UserError(f"{path} has no array {name!r}; it has {', '.join(arrays) or 'none'}: {_FEATURES}")
    resize = str(arrays["resize"])
    if resize not in ("lanczos", "bicubic"):
      raise UserError(f"{path}: resize={resize!r:.40} must be lanczos or bicubic: {_FEATURES}")
    names, true = (_names(arrays, name, path) for name in ("names", "reference_names"))
    outside.no_others(list(self._prompts), names, str(path), f"{_FEATURES} on the pictures of this evaluation")
    need_all(list(self._prompts), set(names), str(path), "let the extractor finish")
    outside.no_others(self._all, true, f"{path}, reference", f"{_FEATURES} with this --reference")
    need_all(self._all, set(true), f"{path}, reference", f"{_FEATURES} with the whole reference")
    generated = _features(arrays, "generated", len(names), path)
    reference = _features(arrays, "reference", len(true), path)
    if generated.shape[1] != reference.shape[1]:
      raise UserError(f"{path}: generated {generated.shape}, reference {reference.shape} differ in width: {_FEATURES}")
    row = {name: i for i, name in enumerate(names)}
    chosen = [row[name] for name in self._prompts]
    distance = distances.frechet(generated[chosen], reference)
    out = {"FID" if resize == "lanczos" else "FID, bicubic to 256": Score(distance, count=len(chosen))}
    for label, name in (
      ("CLIP similarity", "clip_prompts"),
      ('CLIP similarity, "A photo depicts"', "clip_prompts_depicts"),
    ):
      if name in arrays:
        pictures, prompts = (_features(arrays, one, len(names), path) for one in ("clip_pictures", name))
        if pictures.shape != prompts.shape:
          raise UserError(f"{path}: clip_pictures {pictures.shape} and {name} {prompts.shape} differ: {_FEATURES}")
        out[label] = scores.mean(_cosines(pictures[chosen], prompts[chosen]), 100)
    return out, resize


def grid(tiles: Sequence[Image.Image]) -> Image.Image:
  """Four square tiles as 2 x 2, in reading order; one tile as it is."""
  side = tiles[0].width
  columns = 2 if len(tiles) == 4 else 1
  out = Image.new("RGB", (columns * side, columns * side))
  for i, tile in enumerate(tiles):
    out.paste(tile, (i % columns * side, i // columns * side))
  return out


def evenly(rows: Mapping[str, Mapping[str, Any]], count: int, what: str) -> list[str]:
  """The names of `count` rows, as many of each category, drawn with seed 0, in the order of `rows`.

  Raises:
    UserError: naming `what`, where the categories do not allow it.
  """
  groups: dict[str, list[str]] = defaultdict(list)
  for name, row in rows.items():
    groups[str(row["category"])].append(name)
  each, rest = divmod(count, max(len(groups), 1))
  if rest or any(len(names) < each for names in groups.values()):
    least = min(map(len, groups.values()), default=0)
    raise UserError(
      f"{what}: {count:,} prompts cannot be drawn evenly from {len(groups)} categories, the least of "
      f"{least:,}: take the whole file"
    )
  draw = random.Random(0)
  chosen = {name for _, names in sorted(groups.items()) for name in draw.sample(sorted(names), each)}
  return [name for name in rows if name in chosen]


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  a, b = a.astype(np.float64), b.astype(np.float64)
  return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of an .npz; no object of Python is ever read."""
  try:
    with np.load(path, allow_pickle=False) as file:
      return {name: np.asanyarray(file[name]) for name in file.files}
  except Exception as error:  # zip, zlib and NumPy raise many types on a file that is damaged or another's
    raise UserError(
      f"{path} is no file of launch/experiments/features.py ({type(error).__name__}): {_FEATURES}"
    ) from None


def _names(arrays: Mapping[str, np.ndarray], name: str, path: pathlib.Path) -> list[str]:
  if arrays[name].ndim != 1 or arrays[name].dtype.kind != "U":
    raise UserError(f"{path}: {name} {arrays[name].dtype}{list(arrays[name].shape)} is no list of names: {_FEATURES}")
  names = arrays[name].tolist()
  if len(set(names)) != len(names):
    raise UserError(f"{path}: {len(names) - len(set(names))} of {len(names)} {name} come twice: {_FEATURES}")
  return names


def _features(arrays: Mapping[str, np.ndarray], name: str, count: int, path: pathlib.Path) -> np.ndarray:
  """float[count, D], finite."""
  array = arrays.get(name, np.zeros(0))
  if array.ndim != 2 or array.dtype.kind != "f" or len(array) != count or count < 2 or not array.shape[1]:
    raise UserError(
      f"{path}: {name} {array.dtype}{list(array.shape)} should be float[{count}, D], of two pictures at "
      f"least: {_FEATURES}"
    )
  if not np.isfinite(array).all():
    raise UserError(f"{path}: {name} holds values that are not finite: {_FEATURES}")
  return array


BENCHMARKS = {"geneval": Geneval, "dpg": Dpg, "mjhq": Mjhq, "mjhq10k": Mjhq}
