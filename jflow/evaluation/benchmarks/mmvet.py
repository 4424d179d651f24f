"""MM-Vet: free answers, graded by an external language model."""

from collections.abc import Mapping, Sequence

from jflow.evaluation import prompts
from jflow.evaluation.report import Result
from jflow.evaluation.tables import TableBenchmark, kit


class MmVet(TableBenchmark):
  """MM-Vet: writes the file of answers to submit."""

  name = "mmvet"
  what = "MM-Vet: free answers for a language model to grade; writes the file to hand in"
  where = kit("MMVet.tsv")
  section = "table 5"
  paper = {
    "flow": {"GPT-4": {"384": 30.9, "256": 27.4}},
    "codes": {"GPT-4": {"Janus": 34.3, "Pro-1B": 39.8, "Pro-7B": 50.0}},
  }
  file = "MMVet.tsv"
  fields = ("index", "question")
  max_tokens = 2048
  system = (  # VLMEvalKit's
    "You are a helpful assistant. Please answer truthfully and write out your thinking step by step to be sure you get "
    "the right answer."
  )

  def prompt(self, row: Mapping[str, str]) -> str:
    return prompts.plain(row)

  def judge(self, rows: Sequence[Mapping[str, str]]) -> Result:
    notes = ["Graded by a language model: hand answers.json to the benchmark's own evaluator."]
    if published := self.papers("GPT-4"):
      notes.append(f"Published, graded by GPT-4: {published}.")
    return Result({}, notes, files={"answers.json": {f"v1_{row['index']}": row["prediction"] for row in rows}})
