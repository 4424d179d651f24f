"""MMMU: college exams."""

from collections.abc import Mapping, Sequence

from jflow.evaluation import prompts, rules, truths
from jflow.evaluation.report import Result
from jflow.evaluation.tables import TableBenchmark, kit


class Mmmu(TableBenchmark):
  """Multiple choice and open questions of the validation split."""

  name = "mmmu"
  what = "MMMU-val: college exams, multiple choice and open"
  where = kit("MMMU_DEV_VAL.tsv")
  section = "table 5"
  paper = {
    "flow": {"overall": {"384": 29.3}},
    "codes": {"overall": {"Janus": 30.5, "Pro-1B": 36.3, "Pro-7B": 41.0}},
  }
  file = "MMMU_DEV_VAL.tsv"
  split = "validation"
  max_tokens = 2048

  def prompt(self, row: Mapping[str, str]) -> str:
    return prompts.choice(row)

  def truth(self, row: Mapping[str, str]) -> str:
    return truths.letter(row)

  def judge(self, rows: Sequence[Mapping[str, str]]) -> Result:
    return rules.choice(rows)
