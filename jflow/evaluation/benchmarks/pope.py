"""POPE: hallucinated objects, yes or no."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jflow.evaluation import prompts, rules, truths
from jflow.evaluation.report import Result
from jflow.evaluation.scores import Score, clustered, f1, f1_of_yes, grouped
from jflow.evaluation.tables import TableBenchmark, kit


class Pope(TableBenchmark):
  """F1 of "yes" in percent, over all rows and per category, for questions about whether an object is in the image."""

  name = "pope"
  what = "POPE: is an object in the picture (F1 of the yes, percent)"
  where = kit("POPE.tsv")
  section = "table 5"
  paper = {
    "flow": {"F1": {"384": 88.0, "256": 85.3}},
    "codes": {"F1": {"Janus": 87.0, "Pro-1B": 86.2, "Pro-7B": 87.4}},
  }
  file = "POPE.tsv"
  fields = ("index", "question", "answer", "category")

  def prompt(self, row: Mapping[str, str]) -> str:
    return prompts.pope(row)

  def truth(self, row: Mapping[str, str]) -> str:
    return truths.yes_or_no(row)

  def judge(self, rows: Sequence[Mapping[str, str]]) -> Result:
    judged, note = rules.yes_or_no(rows)
    return Result(f1_and_accuracy(judged), [note])


def f1_and_accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
  """POPE's scores as in VLMEvalKit: F1 of "yes" in percent, over all rows and for each category a row belongs to.

  Args:
    rows: {"answer": "Yes" | "No", "said": "Yes" | "No" | "Unknown", "category": "random,popular", "picture"}; an
      Unknown is wrong and does not count as a "yes".
  """
  apart = [row | {"category": name} for row in rows for name in str(row["category"]).split(",")]
  out = {}
  for name in ["", *sorted({row["category"] for row in apart})]:
    part = [row for row in apart if name in ("", row["category"])]
    prefix, groups = f"{name} " if name else "", grouped(part)
    yes = [[(row["answer"] == "Yes", row["said"] == "Yes") for row in group] for group in groups]
    out[f"{prefix}F1"] = f1_of_yes(yes, 100)
    out[f"{prefix}accuracy"] = clustered([[r["answer"] == r["said"] for r in group] for group in groups], scale=100)
    if not name:
      scored = f1(*np.array([pair for group in yes for pair in group]).T)
      out |= {key: Score(100 * scored[key], count=len(part)) for key in ("precision", "recall")}
  return out
