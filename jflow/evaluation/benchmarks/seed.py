"""SEED-Bench, image part: multiple choice."""

from collections.abc import Mapping, Sequence

from jflow.evaluation import prompts, rules, truths
from jflow.evaluation.report import Result
from jflow.evaluation.tables import TableBenchmark, kit


class Seed(TableBenchmark):
  """Accuracy per dimension."""

  name = "seed"
  what = "SEED-Bench, images: multiple choice"
  where = kit("SEEDBench_IMG.tsv", "benchmarks/SEEDBench")
  section = "table 5"
  paper = {
    "flow": {"overall": {"384": 70.5, "256": 67.6}},
    "codes": {"overall": {"Janus": 63.7, "Pro-1B": 68.3, "Pro-7B": 72.1}},
  }
  file = "SEEDBench_IMG.tsv"
  fields = ("index", "question", "answer", "A")

  def prompt(self, row: Mapping[str, str]) -> str:
    return prompts.choice(row)

  def truth(self, row: Mapping[str, str]) -> str:
    return truths.letter(row)

  def judge(self, rows: Sequence[Mapping[str, str]]) -> Result:
    return rules.choice(rows)
