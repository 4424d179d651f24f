"""TextVQA: text in photographs."""

from collections.abc import Mapping, Sequence

from jflow.evaluation import answers, prompts, rules, truths
from jflow.evaluation.report import Result
from jflow.evaluation.tables import TableBenchmark, kit


class TextVqa(TableBenchmark):
  """The VQA score against ten answers."""

  name = "textvqa"
  what = "TextVQA val: VQA score of ten answers, no recognised text given"
  where = kit("TextVQA_VAL.tsv")
  section = "table 5"
  paper = {"flow": {"overall": {"384": 55.5}}}
  file = "TextVQA_VAL.tsv"

  def prompt(self, row: Mapping[str, str]) -> str:
    return prompts.short(row)

  def truth(self, row: Mapping[str, str]) -> str:
    return truths.people(row)

  def judge(self, rows: Sequence[Mapping[str, str]]) -> Result:
    return rules.each(rows, lambda row: answers.vqa_score(row["prediction"], truths.people_of(row["answer"])))
