"""GenEval: objects, counts, colors and positions, scored by an external detector."""

import json
import pathlib
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from jflow import outputs
from jflow.errors import UserError
from jflow.evaluation import outside, scores
from jflow.evaluation.benchmark import GenerationBenchmark
from jflow.evaluation.report import Result
from jflow.evaluation.samples import need, need_all
from jflow.evaluation.scores import Score
from jflow.evaluation.settings import Settings
from jflow.evaluation.tasks import Generation

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


class Geneval(GenerationBenchmark):
  """GenEval: writes pictures/00000/metadata.jsonl and pictures/00000/samples/00000.png, as its evaluator reads them."""

  name = "geneval"
  what = "GenEval: 553 prompts x 4 pictures, objects, counts, colors and places found by a detector"
  where = "put prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval into a folder and name it with --data"
  section = "table 2"
  paper = {
    "flow": {
      "overall": {"384": 0.63, "256": 0.70},
      "single_object": {"384": 0.97, "256": 0.98},
      "two_object": {"384": 0.59, "256": 0.73},
      "counting": {"384": 0.45, "256": 0.54},
      "colors": {"384": 0.83, "256": 0.83},
      "position": {"384": 0.53, "256": 0.63},
      "color_attr": {"384": 0.42, "256": 0.53},
    },
    "codes": {
      "overall": {"Janus": 0.61, "Pro-1B": 0.73, "Pro-7B": 0.8},
      "single_object": {"Janus": 0.97, "Pro-1B": 0.98, "Pro-7B": 0.99},
      "two_object": {"Janus": 0.68, "Pro-1B": 0.82, "Pro-7B": 0.89},
      "counting": {"Janus": 0.3, "Pro-1B": 0.51, "Pro-7B": 0.59},
      "colors": {"Janus": 0.84, "Pro-1B": 0.89, "Pro-7B": 0.9},
      "position": {"Janus": 0.46, "Pro-1B": 0.65, "Pro-7B": 0.79},
      "color_attr": {"Janus": 0.42, "Pro-1B": 0.56, "Pro-7B": 0.66},
    },
  }
  flags = GenerationBenchmark.flags | {"pictures", "results"}
  pictures = 4
  published = 553  # prompts

  def __init__(self, settings: Settings):
    """Reads the prompts."""
    super().__init__(settings)
    self._file = outside.find(
      settings.data, ("evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl"), self.where
    )
    rows = []
    for where, row in outside.rows_of(self._file):
      need(row, ("tag", "include", "prompt"), where)
      outside.need_texts(row, ("tag", "prompt"), where)
      rows.append(row)
    if not rows:
      raise UserError(f"{self._file} holds no prompts: {self.where}")
    self._found, self._prompts = len(rows), rows[: settings.limit]

  def data_files(self) -> list[pathlib.Path]:
    """The file with the prompts, on which the images depend."""
    return [self._file]

  def tasks(self) -> list[Generation]:
    """One task per image, prompt by prompt."""
    prompts = {f"{i:05d}": row["prompt"] for i, row in enumerate(self._prompts)}
    return self.of_each(prompts, "pictures/{}/samples/{:05d}.png")

  def score(self, records: Mapping[str, Any]) -> Result:
    """Completes the layout, or reads the results of the official evaluator."""
    need_all([task.key for task in self.tasks()], records, "geneval", "run the same command again")
    folder = self.settings.output.resolve() / "pictures"
    for i, row in enumerate(self._prompts):  # one object per file: the evaluator reads it whole
      outputs.replace(folder / f"{i:05d}" / "metadata.jsonl", json.dumps(row) + "\n")
    notes = [*outside.guidance_of(self.writes), *outside.another_number(self._found, self.published, self.settings)]
    if self.settings.results is None:
      results = folder.parent / "results.jsonl"
      words = ["python", "evaluation/evaluate_images.py", folder, "--outfile", results]
      words += ["--model-path", "OBJECT_DETECTOR_FOLDER"]
      where = "in GenEval's checkout (OBJECT_DETECTOR_FOLDER: the folder that its evaluation/download_models.sh filled)"
      return Result({}, [outside.next_command(where, words, self.settings, results=results), *notes])
    found = self._read(self.settings.results)
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
        raise UserError(f"{where} has correct={row['correct']!r:.60}, which must be true or false: give its --outfile")
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
      groups[row["tag"]].append([found[f"{i:05d}/{j}"] for j in range(self.pictures)])
    parts = {tag: scores.clustered(groups[tag]) for tag in (*TAGS, *groups) if tag in groups}
    return {"overall": scores.average(list(parts.values()))} | parts
