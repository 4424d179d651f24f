"""MJHQ-30K: the Frechet distance (FID) and the CLIP similarity, on features from an external extractor."""

import pathlib
import random
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from jflow.errors import UserError
from jflow.evaluation import distances, outside, scores
from jflow.evaluation.benchmark import GenerationBenchmark
from jflow.evaluation.report import Result
from jflow.evaluation.samples import need, need_all
from jflow.evaluation.scores import Score
from jflow.evaluation.settings import Settings
from jflow.evaluation.tasks import Generation

_FEATURES = "run launch/experiments/features.py again"


class Mjhq(GenerationBenchmark):
  """MJHQ-30K: writes pictures/ID.png; FID and CLIP similarity are computed from extracted features."""

  name = "mjhq"
  what = "MJHQ-30K: Frechet distance to 30,000 pictures, similarity of picture and prompt"
  where = (
    "download meta_data.json and the unpacked mjhq30k_imgs.zip (one folder per category) of "
    "huggingface.co/datasets/playgroundai/MJHQ-30K into one folder and name it with --data"
  )
  section = "table 4"
  paper = {"flow": {"FID": {"384": 9.51, "256": 12.70}}, "codes": {"FID": {"Janus": 10.10}}}
  flags = GenerationBenchmark.flags | {"features"}
  published = 30_000  # pictures and prompts
  prompts: int = 0  # of those of the data, as many of each category; 0: all

  def __init__(self, settings: Settings):
    """Reads the prompts."""
    super().__init__(settings)
    self._file = outside.find(settings.data, ("meta_data.json",), self.where)
    rows = outside.object_of(outside.text_of(self._file), f"{self._file}")
    for name, row in rows.items():
      where = f"{self._file}, picture {name!r},"
      if not isinstance(row, dict):
        raise UserError(f"{where} must be a JSON object, got {row!r:.60}")
      need(row, ("prompt", "category") if self.prompts else ("prompt",), where)
      outside.need_texts(row, ("prompt",), where)
      if re.search(r"[/\\\0]", name) or name in ("", ".", ".."):
        raise UserError(f"{where} has no name that a file could bear: {self.where}")
    chosen = evenly(rows, self.prompts, str(self._file)) if self.prompts else list(rows)
    self._all = list(rows)
    self._prompts = {name: rows[name]["prompt"] for name in chosen[: settings.limit]}

  def data_files(self) -> list[pathlib.Path]:
    """The file with the prompts, on which the images depend."""
    return [self._file]

  def tasks(self) -> list[Generation]:
    """One image per prompt, each from its own noise."""
    first = self.settings.seed
    return [
      Generation(name, prompt, first + i, f"pictures/{name}.png")
      for i, (name, prompt) in enumerate(self._prompts.items())
    ]

  def score(self, records: Mapping[str, Any]) -> Result:
    """Scores from extracted features; without them, the command that extracts them."""
    need_all([task.key for task in self.tasks()], records, self.name, "run the same command again")
    notes = outside.another_number(len(self._all), self.published, self.settings)
    if self.prompts:
      total = f"{len(self._all):,}"
      notes.append(
        f"The prompts are {self.prompts:,} of {total}, drawn with a seed, as many of each category; "
        f"the reference is all {total} true pictures. The paper does not say which it took."
      )
    if self.settings.features is None:
      features = self.settings.output.resolve() / "features.npz"
      words = [
        "python",
        "launch/experiments/features.py",
        f"--pictures={features.with_name('pictures')}",
        f"--reference={self._file.resolve().parent}",
        "--inception=inception-2015-12-05.pt",
        "--clip=clip-vit-large-patch14",
        f"--output={features}",
      ]
      where = (
        "in a checkout of jflow, where PyTorch is installed (--inception: the TorchScript file that clean-fid takes; --clip: the folder "
        "of Hugging Face's openai/clip-vit-large-patch14, may be left out)"
      )
      return Result({}, [outside.next_command(where, words, self.settings, features=features), *notes])
    found, resize = self._measure(_arrays(self.settings.features))
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
    """Scores, and how images were resized to 256: "lanczos" or "bicubic"."""
    path = self.settings.features
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


class Mjhq10k(Mjhq):
  """The setting of the paper's ablations: fewer prompts, stronger guidance."""

  name = "mjhq10k"
  what = "MJHQ as in the paper's ablations: 10,000 prompts, guidance 7.5; figures of its final model F"
  section = "table 6"
  paper = {"flow": {"FID": {"256": 17.61}, "CLIP similarity": {"256": 26.40}}}
  usual = {"flow": {"guidance": 7.5}}
  prompts = 10_000


def evenly(rows: Mapping[str, Mapping[str, Any]], count: int, what: str) -> list[str]:
  """The names of `count` rows, equally many per category, drawn with seed 0, in the order of `rows`.

  Raises:
    UserError: `count` cannot be drawn evenly from the categories; the message begins with `what`.
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
  """The arrays of an .npz file; Python objects (pickles) are never read."""
  try:
    with np.load(path, allow_pickle=False) as file:
      return {name: np.asanyarray(file[name]) for name in file.files}
  except Exception as error:  # zip, zlib and NumPy raise many types on a file that is damaged or another's
    raise UserError(
      f"{path} must be a file of launch/experiments/features.py ({type(error).__name__}): {_FEATURES}"
    ) from None


def _names(arrays: Mapping[str, np.ndarray], name: str, path: pathlib.Path) -> list[str]:
  if arrays[name].ndim != 1 or arrays[name].dtype.kind != "U":
    raise UserError(
      f"{path}: {name} {arrays[name].dtype}{list(arrays[name].shape)} must be a list of names: {_FEATURES}"
    )
  names = arrays[name].tolist()
  if len(set(names)) != len(names):
    raise UserError(f"{path}: {len(names) - len(set(names))} of {len(names)} {name} come twice: {_FEATURES}")
  return names


def _features(arrays: Mapping[str, np.ndarray], name: str, count: int, path: pathlib.Path) -> np.ndarray:
  """The array `name`, checked to be float[count, D] and finite."""
  array = arrays.get(name, np.zeros(0))
  if array.ndim != 2 or array.dtype.kind != "f" or len(array) != count or count < 2 or not array.shape[1]:
    raise UserError(
      f"{path}: {name} {array.dtype}{list(array.shape)} should be float[{count}, D], of two pictures at "
      f"least: {_FEATURES}"
    )
  if not np.isfinite(array).all():
    raise UserError(f"{path}: {name} holds values that are not finite: {_FEATURES}")
  return array
