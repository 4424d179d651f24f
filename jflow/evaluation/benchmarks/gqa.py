"""GQA: questions about scenes, one word."""

from collections.abc import Mapping, Sequence

from jflow.evaluation import answers, prompts, rules
from jflow.evaluation.report import Result
from jflow.evaluation.tables import TableBenchmark, kit


class Gqa(TableBenchmark):
  """Exact match of one-word answers."""

  name = "gqa"
  what = "GQA testdev, balanced: one word, equal"
  where = kit("GQA_TestDev_Balanced.tsv")
  section = "table 5"
  paper = {
    "flow": {"overall": {"384": 60.3, "256": 58.4}},
    "codes": {"overall": {"Janus": 59.1, "Pro-1B": 59.3, "Pro-7B": 62.0}},
  }
  file = "GQA_TestDev_Balanced.tsv"

  def prompt(self, row: Mapping[str, str]) -> str:
    return prompts.short(row)

  def judge(self, rows: Sequence[Mapping[str, str]]) -> Result:
    return rules.each(rows, lambda row: answers.exact(row["prediction"], row["answer"]))
