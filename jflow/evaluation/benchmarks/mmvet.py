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
    note = (
      "Graded by a language model: hand answers.json to the benchmark's own evaluator. The paper has 30.9 at 384 and "
      "27.4 at 256 by GPT-4."
    )
    return Result({}, [note], files={"answers.json": {f"v1_{row['index']}": row["prediction"] for row in rows}})
