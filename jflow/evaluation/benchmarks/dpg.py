"""DPG-Bench: long prompts, scored by an external question-answering model."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from jflow.data.importers.inputs import is_hidden
from jflow.errors import UserError
from jflow.evaluation import outside, scores
from jflow.evaluation.benchmark import GenerationBenchmark
from jflow.evaluation.report import Result
from jflow.evaluation.samples import need_all, read_picture
from jflow.evaluation.scores import Score
from jflow.evaluation.settings import Settings
from jflow.evaluation.tasks import Generation, save


class Dpg(GenerationBenchmark):
  """DPG-Bench: writes grids/NAME.png, the four images of a prompt in a square, as the official scorer cuts them."""

  name = "dpg"
  what = "DPG-Bench: 1,065 long prompts x 4 pictures, questions answered by mPLUG"
  where = (
    "put the folder dpg_bench/ of github.com/TencentQQGYLab/ELLA (prompts/*.txt, dpg_bench.csv) somewhere and name it "
    "with --data"
  )
  section = "table 3"
  paper = {
    "flow": {
      "overall": {"384": 80.09, "256": 81.23},
      "global": {"384": 87.03, "256": 91.20},
      "entity": {"384": 87.31, "256": 88.83},
      "attribute": {"384": 87.39, "256": 88.00},
      "relation": {"384": 89.79, "256": 87.60},
      "other": {"384": 88.10, "256": 89.53},
    },
    "codes": {
      "overall": {"Janus": 79.68, "Pro-1B": 82.63, "Pro-7B": 84.19},
      "global": {"Janus": 82.33, "Pro-1B": 87.58, "Pro-7B": 86.9},
      "entity": {"Janus": 87.38, "Pro-1B": 88.63, "Pro-7B": 88.9},
      "attribute": {"Janus": 87.7, "Pro-1B": 88.17, "Pro-7B": 89.4},
      "relation": {"Janus": 85.46, "Pro-1B": 88.98, "Pro-7B": 89.32},
      "other": {"Janus": 86.41, "Pro-1B": 88.3, "Pro-7B": 89.48},
    },
  }
  flags = GenerationBenchmark.flags | {"pictures", "results"}
  pictures = 4
  published = 1065  # prompts

  def __init__(self, settings: Settings):
    """Reads the prompts."""
    super().__init__(settings)
    if self.pictures not in (1, 4):
      raise UserError(f"--pictures={self.pictures} must be 4 or 1, the pictures per prompt that DPG-Bench takes")
    folder = settings.data / "prompts" if (settings.data / "prompts").is_dir() else settings.data
    self._files = sorted(path for path in folder.glob("*.txt") if not is_hidden(path.name))
    if not self._files:
      raise UserError(f"{folder} holds no prompts (*.txt): {self.where}")
    self._prompts = {path.stem: " ".join(outside.text_of(path).split()) for path in self._files[: settings.limit]}
    empty = [name for name, prompt in self._prompts.items() if not prompt]
    if empty:
      raise UserError(f"{folder / empty[0]}.txt holds no prompt: {self.where}")

  def data_files(self) -> list[pathlib.Path]:
    """The files with the prompts, on which the images depend."""
    return list(self._files)

  def tasks(self) -> list[Generation]:
    """One task per image, prompt by prompt."""
    return self.of_each(self._prompts, "pictures/{}_{}.png")

  def score(self, records: Mapping[str, Any]) -> Result:
    """Writes the grids, or reads the results of the official scorer."""
    need_all([task.key for task in self.tasks()], records, "dpg", "run the same command again")
    output, side = self.settings.output.resolve(), 0
    for name in self._prompts:
      tiles = [read_picture(output / f"pictures/{name}_{j}.png") for j in range(self.pictures)]
      side = tiles[0].width
      if not (output / f"grids/{name}.png").exists():
        save(grid(tiles), output / f"grids/{name}.png")
    notes = [
      *outside.guidance_of(self.writes),
      *outside.another_number(len(self._files), self.published, self.settings),
    ]
    if self.settings.results is None:
      results = output / "results.txt"
      words = ["python", "dpg_bench/compute_dpg_bench.py", "--image-root-path", output / "grids", "--resolution", side]
      words += ["--pic-num", self.pictures, "--res-path", results]
      return Result({}, [outside.next_command("in ELLA's checkout", words, self.settings, results=results), *notes])
    said = (
      "Category scores are the scorer's own: those of the last picture of each prompt, without the rule that a "
      "child falls with its parent."
    )
    return Result(self._read(self.settings.results), [said, *notes])

  def _read(self, path: pathlib.Path) -> dict[str, Score]:
    """Scores from the scorer's file: a line per grid (path, score per image, mean), then a summary from "Model:" on."""
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
    """(name of the prompt, mean of its images' scores); the path may contain commas."""
    pictures = self.pictures
    path, *numbers = line.rsplit(", ", pictures + 1)
    if len(numbers) == pictures + 1:
      values = [outside.number_of(one, 1, where) for one in numbers]
      if abs(math.fsum(values[:-1]) / pictures - values[-1]) < 1e-6:
        return pathlib.PurePosixPath(path).stem, values[-1]
    raise UserError(
      f"{where} is no path with {pictures} scores and their mean: give what --res-path named (not its "
      f"_detail.txt), made with --pic-num {pictures}"
    )


def grid(tiles: Sequence[Image.Image]) -> Image.Image:
  """Four square tiles as a 2 x 2 grid, in reading order; a single tile is returned as it is."""
  side = tiles[0].width
  columns = 2 if len(tiles) == 4 else 1
  out = Image.new("RGB", (columns * side, columns * side))
  for i, tile in enumerate(tiles):
    out.paste(tile, (i % columns * side, i // columns * side))
  return out
