"""Closed rules that several benchmarks share: parsing an answer and judging it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jflow.evaluation import answers, scores
from jflow.evaluation.prompts import choices
from jflow.evaluation.report import Result

_OTHER = "Other Answers"  # second option of MMMU's open questions, the first being the answer
Row = Mapping[str, Any]


def yes_or_no(rows: Sequence[Row]) -> tuple[list[dict[str, Any]], str]:
  """Rows with "said" (Yes, No or Unknown), and a note that counts the unknown."""
  judged = [row | {"said": answers.yes_or_no(row["prediction"])} for row in rows]
  count = sum(row["said"] == "Unknown" for row in judged)
  return judged, f"{count} of {len(judged)} answers hold no clear yes or no; they count as wrong."


def letters(rows: Sequence[Row]) -> tuple[list[dict[str, Any]], str]:
  """Rows of multiple choice with "said" and "right", and a note that counts answers without a readable option."""
  judged = []
  for row in rows:
    options, answer = choices(row), row["answer"]
    if not options:  # an open question of MMMU
      options, answer = {"A": answer, "B": _OTHER}, "A"
    said = answers.option(row["prediction"], options)
    judged.append(row | {"said": said, "right": said == answer, "category": row.get("category") or "all"})
  count = sum(row["said"] == answers.UNDECIDED for row in judged)
  note = f"From {count} of {len(judged)} answers no option can be read; they count as wrong (no language model judges)."
  return judged, note


def choice(rows: Sequence[Row]) -> Result:
  """Accuracy of multiple choice, per category."""
  judged, note = letters(rows)
  return Result(scores.by_category(judged), [note])


def each(rows: Sequence[Row], right: Callable[[Row], float]) -> Result:
  """The mean of `right` over the rows, per split."""
  judged = [row | {"right": right(row), "category": row.get("split") or "all"} for row in rows]
  return Result(scores.by_category(judged))
