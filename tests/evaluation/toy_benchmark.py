"""A benchmark in one file, as anybody could write it: is a picture of one color named by its color?"""

from PIL import Image

from jflow.evaluation import answers, benchmarks, prompts, scores
from jflow.evaluation.benchmark import ReadingBenchmark
from jflow.evaluation.report import Result
from jflow.evaluation.tasks import Question

COLORS = ("red", "green", "blue")


@benchmarks.register
class Colors(ReadingBenchmark):
  """One question per color."""

  name = "colors"
  what = "one color, one word"
  where = "made by itself"
  flags = frozenset()
  max_tokens = 4

  def prompt(self, row):
    return prompts.short(row)

  def data_files(self):
    return []

  def tasks(self):
    ask = self.prompt({"question": "What color is it?"})
    image = lambda color: lambda: [Image.new("RGB", (8, 8), color)]
    return [Question(color, ask, image(color), max_tokens=self.max_tokens) for color in self._colors()]

  def score(self, records):
    right = [answers.exact(records[color]["answer"], color) for color in self._colors()]
    return Result({"overall": scores.accuracy(right, 100)})

  def _colors(self):
    return COLORS[: self.settings.limit]
