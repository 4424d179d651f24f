"""The interface of a benchmark: the tasks it gives a model, and the scores of the predictions.

A benchmark is a class with a few attributes that `--help` and the report print, constructed from the settings of one
evaluation. Most are a `ReadingBenchmark` or a `PaintingBenchmark`; a file of questions is a `tables.TableBenchmark`.
"""

import abc
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jflow.evaluation.report import Result
from jflow.evaluation.settings import Settings
from jflow.evaluation.tasks import Task

# Flags that only some benchmarks take.
FLAGS = ("data", "only", "split", "steps", "guidance", "pictures", "results", "features")


class Benchmark(abc.ABC):
  """A benchmark, opened for one evaluation.

  `__init__` reads and checks the data, before any model is loaded.

  Attributes:
    name: what --benchmark calls it.
    what: one line for --help and the report.
    where: what to download and where to put it.
    section: of the paper with its scores.
    paper: score -> {"384": value, "256": value}.
    flags: those of FLAGS that it takes.
    split: of the data, unless --split names another.
    settings: of this evaluation.
  """

  name: ClassVar[str]
  what: ClassVar[str]
  where: ClassVar[str] = ""
  section: ClassVar[str] = ""
  paper: ClassVar[Mapping[str, Mapping[str, float]]] = {}
  flags: ClassVar[frozenset[str]] = frozenset({"data"})
  split: ClassVar[str] = ""

  def __init__(self, settings: Settings):
    self.settings = settings

  @abc.abstractmethod
  def data_files(self) -> list[pathlib.Path]:
    """Files that the predictions and scores depend on; their hash is kept with the predictions."""

  @abc.abstractmethod
  def tasks(self) -> Sequence[Task]:
    """Everything to ask of the model, each task with a key of its own, always in the same order."""

  @abc.abstractmethod
  def score(self, records: Mapping[str, Mapping[str, Any]]) -> Result:
    """Scores of the predictions.

    Args:
      records: key -> record of every task: {"key", "answer"} or {"key", "file"}.

    Raises:
      UserError: records are missing, or what an outside scorer wrote does not fit.
    """

  def identity(self) -> dict[str, Any]:
    """Benchmark-specific settings that predictions depend on, as JSON values; one output directory holds one set."""
    return {}

  def sampling(self) -> dict[str, Any]:
    """Keywords of `Pipeline.generate`; empty where no image is generated."""
    return {}

  def changed(self) -> dict[str, Any]:
    """Flags whose value differs from the benchmark's default; the report lists them."""
    return {} if self.settings.limit is None else {"limit": self.settings.limit}

  @classmethod
  def swept(cls, settings: Settings) -> Settings:
    """The settings of one point of a sweep over guidance and steps.

    Raises:
      UserError: the scores do not depend on guidance and steps.
    """
    return settings


class ReadingBenchmark(Benchmark):
  """A benchmark of questions about images, answered greedily."""

  system: ClassVar[str] = ""  # prompt
  max_tokens: int = 512  # of an answer

  @abc.abstractmethod
  def prompt(self, row: Mapping[str, str]) -> str:
    """The user's turn of a question."""

  def identity(self) -> dict[str, Any]:
    row = {"question": "QUESTION", "hint": "HINT", "A": "OPTION A", "B": "OPTION B"}
    shown = {"prompt": self.prompt(row), "system": self.system, "decoding": "greedy"}
    return shown | {"max_tokens": self.max_tokens}


class PaintingBenchmark(Benchmark):
  """A benchmark of generated images."""

  flags = frozenset({"data", "steps", "guidance"})
  steps: int = 30  # of the solver
  guidance: float = 2.0
  pictures: int = 1  # per prompt

  def __init__(self, settings: Settings):
    super().__init__(settings)
    for name in ("steps", "guidance", "pictures"):
      if (value := getattr(settings, name)) is not None:
        setattr(self, name, value)

  def identity(self) -> dict[str, Any]:
    return {**self.sampling(), "pictures": self.pictures, "solver": "euler"}

  def sampling(self) -> dict[str, Any]:
    return {"steps": self.steps, "guidance": self.guidance}

  def changed(self) -> dict[str, Any]:
    own = {name: getattr(self, name) for name in ("guidance", "steps", "pictures")}
    return {name: value for name, value in own.items() if value != getattr(type(self), name)} | super().changed()
