"""Painting benchmarks with a scorer of their own: its folder layout is written, its results are read back."""

import argparse
import json
import pathlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jflow.errors import UserError
from jflow.evaluation import distances, scores
from jflow.evaluation.recipes import Recipe
from jflow.evaluation.report import Result
from jflow.evaluation.samples import need, need_all
from jflow.evaluation.scores import Score
from jflow.evaluation.tasks import Painting, save

GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


class Geneval:
  """pictures/00000/metadata.jsonl and pictures/00000/samples/00000.png, as its evaluator reads them."""

  def __init__(self, recipe: Recipe, args: argparse.Namespace):
    """Reads the prompts; `args`: flags of the command."""
    self._recipe, self._args = recipe, args
    path = _find(args.data, ("evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl"), recipe)
    self._prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
      try:
        row = json.loads(line)
      except ValueError as error:
        raise UserError(f"{path}, line {number}, is no JSON: {error}") from error
      need(row, ("tag", "include", "prompt"), f"{path}, line {number},")
      self._prompts.append(row)
    self._prompts = self._prompts[: args.limit]

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
    folder = self._args.output / "pictures"
    for i, row in enumerate(self._prompts):  # one object per file: the evaluator reads it whole
      (folder / f"{i:05d}" / "metadata.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    if self._args.results is None:
      return Result({}, [f"Next: GenEval's evaluation/evaluate_images.py {folder} --outfile results.jsonl, then this "
                         "command again with --results=results.jsonl."])  # fmt: skip
    return Result(
      self._read(self._args.results), ["Overall is the plain mean of the six categories, as GenEval's."]
    )

  def _read(self, path: pathlib.Path) -> dict[str, Score]:
    found: dict[str, bool] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
      try:
        row = json.loads(line)
      except ValueError as error:
        raise UserError(f"{path}, line {number}, is no JSON: {error}") from error
      need(row, ("filename", "tag", "correct"), f"{path}, line {number},")
      name = re.search(r"(\d+)[/\\]samples[/\\](\d+)\.png$", row["filename"])
      if not name:
        raise UserError(f"{path}, line {number}: {row['filename']!r} is no picture of GenEval's layout")
      key = f"{int(name[1]):05d}/{int(name[2])}"
      if key in found:
        raise UserError(f"{path}, line {number}: {row['filename']} comes twice")
      found[key] = bool(row["correct"])
    need_all([task.key for task in self.tasks()], found, str(path), "let the evaluator finish")
    groups: dict[str, list[list[bool]]] = defaultdict(list)
    for i, row in enumerate(self._prompts):
      groups[row["tag"]].append([found[f"{i:05d}/{j}"] for j in range(self._recipe.pictures)])
    parts = {tag: scores.clustered(groups[tag]) for tag in (*GENEVAL_TAGS, *groups) if tag in groups}
    return {"overall": scores.average(list(parts.values()))} | parts


class Dpg:
  """grids/NAME.png: four pictures of a prompt in a square, as its scorer cuts them."""

  def __init__(self, recipe: Recipe, args: argparse.Namespace):
    """Reads the prompts; `args`: flags of the command."""
    self._recipe, self._args = recipe, args
    if recipe.pictures not in (1, 4):
      raise UserError(f"--pictures={recipe.pictures}: DPG-Bench takes 4 pictures per prompt, or 1")
    folder = args.data / "prompts" if (args.data / "prompts").is_dir() else args.data
    files = sorted(folder.glob("*.txt"))
    if not files:
      raise UserError(f"{folder} holds no prompts (*.txt): {recipe.data}")
    self._prompts = {path.stem: " ".join(_text(path).split()) for path in files[: args.limit]}

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
    grids, side = self._args.output / "grids", 0
    for name in self._prompts:
      tiles = [
        Image.open(self._args.output / f"pictures/{name}_{j}.png") for j in range(self._recipe.pictures)
      ]
      side = tiles[0].width
      if not (grids / f"{name}.png").exists():
        save(grid(tiles), grids / f"{name}.png")
    if self._args.results is None:
      return Result({}, [f"Next: DPG-Bench's compute_dpg_bench.py --image-root-path {grids} --resolution {side} "
                         f"--pic-num {self._recipe.pictures} --res-path results.txt, then this command again with "
                         "--results=results.txt."])  # fmt: skip
    return Result(self._read(self._args.results), ["Category scores are the scorer's own: those of the last picture of each "
                                                   "prompt, without the rule that a child falls with its parent."])  # fmt: skip

  def _read(self, path: pathlib.Path) -> dict[str, Score]:
    averages, categories, section = {}, {}, ""
    for line in _text(path).splitlines():
      parts = line.rsplit(", ", self._recipe.pictures + 1)
      if line.endswith("category scores:"):
        section = line.split()[0]
      elif len(parts) == self._recipe.pictures + 2:
        averages[pathlib.PurePosixPath(parts[0]).stem] = float(parts[-1])
      elif section == "L1" and line.startswith("\t"):
        name, value = line.strip().split(": ")
        categories[name] = Score(float(value))
    need_all(
      list(self._prompts),
      averages,
      str(path),
      "the scorer drops pictures that fail without a word: run it again",
    )
    overall = scores.mean([averages[name] for name in self._prompts], 100)
    return {"overall": overall} | dict(sorted(categories.items()))


class Mjhq:
  """pictures/ID.png; the Frechet distance and the similarity come from features that an extractor wrote."""

  def __init__(self, recipe: Recipe, args: argparse.Namespace):
    """Reads the prompts; `args`: flags of the command."""
    self._recipe, self._args = recipe, args
    path = _find(args.data, ("meta_data.json",), recipe)
    try:
      rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
      raise UserError(f"{path} is no JSON: {error}") from error
    for name, row in rows.items():
      need(row, ("prompt",), f"{path}, picture {name},")
    self._prompts = {name: row["prompt"] for name, row in list(rows.items())[: args.limit]}

  def tasks(self) -> list[Painting]:
    """One picture per prompt; each starts from noise of its own."""
    first = self._args.seed
    return [
      Painting(name, prompt, first + i, f"pictures/{name}.png")
      for i, (name, prompt) in enumerate(self._prompts.items())
    ]

  def score(self, records: Mapping[str, Any]) -> Result:
    """Says how to make features, or measures on them."""
    need_all([task.key for task in self.tasks()], records, "mjhq", "run the same command again")
    if self._args.features is None:
      return Result({}, [f"Next: python launch/features.py --pictures={self._args.output / 'pictures'} --reference={self._args.data} "
                         "--inception=inception-2015-12-05.pt --output=features.npz, then this command again with "
                         "--features=features.npz."])  # fmt: skip
    with np.load(self._args.features, allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
    return Result(self._measure(arrays), ["Lanczos to 256, then bicubic to 299 in float32 (GigaGAN's protocol); a distance is "
                                          "comparable only at the same number of pictures."])  # fmt: skip

  def _measure(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Score]:
    path = self._args.features
    for name in ("names", "generated", "reference"):
      if name not in arrays:
        raise UserError(f"{path} has no array {name!r}; it has {', '.join(arrays) or 'none'}")
    need_all(list(self._prompts), set(arrays["names"].tolist()), str(path), "let the extractor finish")
    row = {name: i for i, name in enumerate(arrays["names"].tolist())}
    chosen = [row[name] for name in self._prompts]
    generated, reference = arrays["generated"][chosen], arrays["reference"]
    if generated.shape[1:] != reference.shape[1:]:
      raise UserError(f"{path}: generated {generated.shape} and reference {reference.shape} differ in width")
    if len(reference) < len(generated):
      raise UserError(
        f"{path}: {len(reference)} reference pictures for {len(generated)} painted ones: some are missing"
      )
    out = {"FID": Score(distances.frechet(generated, reference), count=len(generated))}
    for label, name in (
      ("CLIP similarity", "clip_prompts"),
      ('CLIP similarity, "A photo depicts"', "clip_prompts_depicts"),
    ):
      if name in arrays:
        out[label] = scores.mean(_cosines(arrays["clip_pictures"][chosen], arrays[name][chosen]), 100)
    return out


def grid(tiles: Sequence[Image.Image]) -> Image.Image:
  """Four square tiles as 2 x 2, in reading order; one tile as it is."""
  side = tiles[0].width
  columns = 2 if len(tiles) == 4 else 1
  out = Image.new("RGB", (columns * side, columns * side))
  for i, tile in enumerate(tiles):
    out.paste(tile, (i % columns * side, i // columns * side))
  return out


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  a, b = a.astype(np.float64), b.astype(np.float64)
  return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def _find(data: pathlib.Path, names: Sequence[str], recipe: Recipe) -> pathlib.Path:
  for path in (data, *(data / name for name in names)):
    if path.is_file():
      return path
  raise UserError(f"{data / names[0]} does not exist: {recipe.data}")


def _text(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path} cannot be read: {error}") from error


BENCHMARKS = {"geneval": Geneval, "dpg": Dpg, "mjhq": Mjhq}
