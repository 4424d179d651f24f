"""VQAv2 from its official files: scores on val, and the file to submit for test-dev."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from PIL import Image

from jflow.data import images
from jflow.errors import UserError
from jflow.evaluation import answers, outside, prompts, scores, truths
from jflow.evaluation.benchmark import ReadingBenchmark
from jflow.evaluation.report import Result
from jflow.evaluation.samples import need, need_all
from jflow.evaluation.settings import Settings
from jflow.evaluation.tasks import Question

# Split -> (questions, annotations or none, pictures).
SPLITS = {
  "val": (
    "v2_OpenEnded_mscoco_val2014_questions.json",
    "v2_mscoco_val2014_annotations.json",
    "val2014/COCO_val2014_{:012d}.jpg",
  ),
  "test-dev": (
    "v2_OpenEnded_mscoco_test-dev2015_questions.json",
    "",
    "test2015/COCO_test2015_{:012d}.jpg",
  ),
}
_SERVER = "the server's score"


class Vqav2(ReadingBenchmark):
  """Open questions with the answers of ten people."""

  name = "vqav2"
  what = "VQAv2: VQA score on val; on test-dev the file to hand in"
  where = (
    "from visualqa.org, put v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json and the "
    "COCO images val2014/ (for test-dev: v2_OpenEnded_mscoco_test-dev2015_questions.json and test2015/) into one "
    "folder and name it with --data"
  )
  section = "table 5"
  paper = {"flow": {_SERVER: {"384": 79.8, "256": 76.3}}, "codes": {_SERVER: {"Janus": 77.3}}}
  flags = frozenset({"data", "split"})
  split = "val"

  def __init__(self, settings: Settings):
    """Reads questions and annotations, and checks that the first image exists."""
    super().__init__(settings)
    split, data = settings.split or self.split, settings.data
    if split not in SPLITS:
      raise UserError(f"--split={split!r} must be one of {', '.join(SPLITS)}")
    self._data = data
    questions, annotations, self._picture = SPLITS[split]
    self._files = [data / name for name in (questions, annotations) if name]
    self._rows = _read(data / questions, "questions", self.where)[: settings.limit]
    for row in self._rows:
      where = f"{data / questions}, question {row['question_id']},"
      need(row, ("image_id", "question"), where)
      outside.need_texts(row, ("question",), where)
      _need_number(row, "image_id", where)
    self._people: dict[int, Mapping[str, Any]] = {}
    if annotations:
      self._people = {row["question_id"]: row for row in _read(data / annotations, "annotations", self.where)}
      wanted = [row["question_id"] for row in self._rows]
      need_all(wanted, self._people, str(data / annotations), "take questions and annotations of one release")
      for number in wanted:
        _check_people(self._people[number], f"{data / annotations}, question {number},")
    if self._rows and not self._path(self._rows[0]).is_file():
      raise UserError(f"{self._path(self._rows[0])} does not exist: {self.where}")

  def prompt(self, row: Mapping[str, str]) -> str:
    return prompts.short(row)

  def data_files(self) -> list[pathlib.Path]:
    """The files that predictions and scores depend on, except the images."""
    return self._files

  def tasks(self) -> list[Question]:
    """The questions, in the order of the file."""
    return [
      Question(
        str(row["question_id"]), self.prompt(row), functools.partial(self._images, row), max_tokens=self.max_tokens
      )
      for row in self._rows
    ]

  def score(self, records: Mapping[str, Mapping[str, Any]]) -> Result:
    """The VQA score on val; for test-dev, the answers to submit."""
    need_all([str(row["question_id"]) for row in self._rows], records, "vqav2", "run the same command again")
    published = self.papers(_SERVER)
    said = {row["question_id"]: records[str(row["question_id"])]["answer"] for row in self._rows}
    if not self._people:
      note = (
        f"Hand submission.json to the challenge's server{published and f' (published: {published})'}. Its answers are "
        "normalised by the challenge's rule, as is usual, since the server leaves some as they are."
      )
      given = [{"question_id": i, "answer": answers.normal_answer(a)} for i, a in said.items()]
      return Result({}, [note], files={"submission.json": given})
    judged = []
    for number, answer in said.items():
      people = [one["answer"] for one in self._people[number]["answers"]]
      score = answers.vqa_score(answer, people, unanimous_as_written=True)
      row = self._people[number]
      judged.append({"right": score, "category": row["answer_type"], "picture": row["image_id"]})
    notes = [
      "Answers are normalised, but for the people's where all ten agree word for word: there the model's is right "
      "as it stands, too.",
    ]
    if published:
      ablations = "; on val the paper's ablations have 69.20 at 256" if self.writes == "flow" else ""
      notes.insert(0, f"The published scores are the server's, not of val: {published}{ablations}.")
    return Result(scores.by_category(judged), notes)

  def _images(self, row: Mapping[str, Any]) -> list[Image.Image]:
    path = self._path(row)
    try:
      return [images.as_published(path.read_bytes())]
    except (OSError, images.ImageError) as error:
      raise UserError(f"{path} cannot be read: {error}") from error

  def _path(self, row: Mapping[str, Any]) -> pathlib.Path:
    return self._data / self._picture.format(row["image_id"])


def _read(path: pathlib.Path, field: str, where: str) -> list[dict[str, Any]]:
  """The list of objects in `field`, each checked to have a unique question_id."""
  if not path.is_file():
    raise UserError(f"{path} does not exist: {where}")
  rows = outside.object_of(outside.text_of(path), f"{path}").get(field)
  if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
    raise UserError(f"{path} must be a file of VQAv2: {field!r} should be a list of objects")
  seen = set()
  for number, row in enumerate(rows, 1):
    need(row, ("question_id",), f"{path}, {field} {number},")
    _need_number(row, "question_id", f"{path}, {field} {number},")
    if row["question_id"] in seen:
      raise UserError(f"{path}, {field} {number}: question {row['question_id']} comes twice")
    seen.add(row["question_id"])
  return rows


def _need_number(row: Mapping[str, Any], field: str, where: str) -> None:
  if type(row[field]) is not int or not 0 <= row[field] < 10**12:
    raise UserError(f"{where} has {field}={row[field]!r:.60}, which must be a whole number from 0 to 10**12")


def _check_people(row: Mapping[str, Any], where: str) -> None:
  """Raises a UserError unless a row of the annotations can be scored."""
  need(row, ("image_id", "answers", "answer_type"), where)
  people = row["answers"]
  if not isinstance(people, list) or not people or not all(isinstance(one, dict) for one in people):
    raise UserError(f"{where} has answers={people!r:.60}, which must be a list of objects")
  if len(people) < truths.LEAST_PEOPLE:
    raise UserError(
      f"{where} has {len(people)} answers, and no answer is wholly right by fewer than {truths.LEAST_PEOPLE}"
    )
  for one in people:
    need(one, ("answer",), f"{where} one of its answers,")
    outside.need_texts(one, ("answer",), f"{where} one of its answers,")
