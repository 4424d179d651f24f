"""ChartQA: questions about charts."""

from collections.abc import Mapping, Sequence

from jflow.evaluation import answers, prompts, rules, truths
from jflow.evaluation.report import Result
from jflow.evaluation.tables import TableBenchmark, kit


class ChartQa(TableBenchmark):
  """Relaxed accuracy: numbers may be 5 % off."""

  name = "chartqa"
  what = "ChartQA test: relaxed accuracy, people's and machine-made questions"
  where = kit("ChartQA_TEST.tsv")
  section = "table 5"
  paper = {"flow": {"overall": {"384": 64.6}}}
  file = "ChartQA_TEST.tsv"

  def prompt(self, row: Mapping[str, str]) -> str:
    return prompts.short(row)

  def truth(self, row: Mapping[str, str]) -> str:
    return truths.one_or_more(row)

  def judge(self, rows: Sequence[Mapping[str, str]]) -> Result:
    def right(row: Mapping[str, str]) -> bool:
      return any(answers.relaxed(row["prediction"], one) for one in truths.people_of(row["answer"]))

    return rules.each(rows, right)
