"""MMBench: multiple choice, asked once per rotation of the options."""

import collections
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jflow.errors import UserError
from jflow.evaluation import prompts, rules, truths
from jflow.evaluation.report import Result
from jflow.evaluation.scores import Score, by_category
from jflow.evaluation.tables import TableBenchmark, kit

ROTATION = 1_000_000  # difference between the indices of a question and its next rotation of the options


class MmBench(TableBenchmark):
  """Circular accuracy: a question counts if it is right in every order of its options."""

  name = "mmbench"
  what = "MMBench-dev (English, 1.0): multiple choice, right in every order of the options"
  where = kit("MMBench_DEV_EN.tsv", "benchmarks/MMBench")
  section = "table 5"
  paper = {
    "flow": {"overall": {"384": 74.9, "256": 71.9}},
    "codes": {"overall": {"Janus": 69.4, "Pro-1B": 75.5, "Pro-7B": 79.2}},
  }
  file = "MMBench_DEV_EN.tsv"
  fields = ("index", "question", "answer", "A", "category")

  def prompt(self, row: Mapping[str, str]) -> str:
    return prompts.choice(row)

  def truth(self, row: Mapping[str, str]) -> str:
    return truths.letter(row)

  def chosen(self, rows: list[dict[str, str]], path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of the first --limit questions, each in every order of its options."""
    for number, row in enumerate(rows, 1):
      if not re.fullmatch("[0-9]{1,18}", row["index"]):
        raise UserError(
          f"{path}, row {number}: the index must be a number, got {row['index']!r}: is it MMBench's file?"
        )
    questions = [int(row["index"]) % ROTATION for row in rows]
    kept = set(list(dict.fromkeys(questions))[: self.settings.limit])
    return [row for row, question in zip(rows, questions, strict=True) if question in kept]

  def judge(self, rows: Sequence[Mapping[str, str]]) -> Result:
    judged, note = rules.letters(rows)
    return Result(circular(judged), [note, "A question counts if all orders of its options are answered right."])


def circular(rows: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
  """MMBench's circular score in percent: a question counts if it is right in every order of its options.

  Args:
    rows: {"index": int, "right": bool, "category", "picture"}; rows whose index is equal modulo ROTATION are one
      question, and its category and picture are those of the row with the least index.
  """
  questions: dict[int, list[Mapping[str, Any]]] = collections.defaultdict(list)
  for row in sorted(rows, key=lambda row: int(row["index"])):
    questions[int(row["index"]) % ROTATION].append(row)
  return by_category([q[0] | {"right": all(row["right"] for row in q)} for q in questions.values()])
