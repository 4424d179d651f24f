"""MME: perception and reasoning, two yes/no questions about each image."""

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jflow.errors import UserError
from jflow.evaluation import prompts, rules, truths
from jflow.evaluation.report import Result
from jflow.evaluation.scores import Score, average, clustered
from jflow.evaluation.tables import TableBenchmark, kit

PERCEPTION = (
  "OCR",
  "artwork",
  "celebrity",
  "color",
  "count",
  "existence",
  "landmark",
  "position",
  "posters",
  "scene",
)
REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")


class Mme(TableBenchmark):
  """Accuracy plus accuracy+ in percent, summed over the categories."""

  name = "mme"
  what = "MME: yes or no, two questions a picture (accuracy + accuracy+, perception at most 2,000)"
  where = kit("MME.tsv")
  section = "table 5"
  paper = {
    "flow": {"perception": {"384": 1333.1, "256": 1203.0}},
    "codes": {"perception": {"Janus": 1338.0, "Pro-1B": 1444.0, "Pro-7B": 1567.1}},
  }
  file = "MME.tsv"
  fields = ("index", "question", "answer", "category", "image_path")

  def prompt(self, row: Mapping[str, str]) -> str:
    return prompts.yes_no(row)

  def truth(self, row: Mapping[str, str]) -> str:
    return truths.yes_or_no(row)

  def chosen(self, rows: list[dict[str, str]], path: pathlib.Path) -> list[dict[str, str]]:
    if self.settings.limit:
      raise UserError(f"--limit={self.settings.limit}: MME adds up whole categories; leave --limit out")
    return rows

  def judge(self, rows: Sequence[Mapping[str, str]]) -> Result:
    judged, note = rules.yes_or_no([row | {"picture": row["image_path"]} for row in rows])
    return Result(accuracies([row | {"right": row["said"] == row["answer"]} for row in judged]), [note])


def accuracies(rows: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
  """MME's scores: accuracy plus accuracy+ (both questions about an image right) per category, in percent, and sums.

  Args:
    rows: {"category", "picture", "right": bool}, two per picture and category.

  Raises:
    UserError: an image does not have two questions, or neither perception nor reasoning is complete.
  """
  pictures: dict[str, dict[str, list[bool]]] = collections.defaultdict(lambda: collections.defaultdict(list))
  for row in rows:
    pictures[row["category"]][row["picture"]].append(bool(row["right"]))
  out = {}
  for category, groups in sorted(pictures.items()):
    odd = [name for name, answers in groups.items() if len(answers) != 2]
    if odd:
      raise UserError(
        f"MME: each picture of {category} must have two questions, but {len(odd)} do not, for example {odd[0]!r} "
        f"({len(groups[odd[0]])}): score the whole file, without --limit"
      )
    # An image's share: a quarter for each right answer, and a half more if both are right.
    shares = [[sum(pair) / 4 + all(pair) / 2] for pair in groups.values()]
    out[category] = clustered(shares, scale=200)._replace(count=2 * len(groups))
  sums = {}
  for name, parts in (("perception", PERCEPTION), ("reasoning", REASONING)):
    if all(part in out for part in parts):
      sums[name] = _times(average([out[part] for part in parts]), len(parts))
  if not sums:
    raise UserError(f"MME: neither the ten perception categories nor the four of reasoning are there: {sorted(out)}")
  return sums | out


def _times(score: Score, factor: float) -> Score:
  return score._replace(value=factor * score.value, low=factor * score.low, high=factor * score.high)
