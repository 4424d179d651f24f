"""The interface of a benchmark: the tasks it gives a model, and the scores of the predictions.

A benchmark is a class with a few attributes that `--help` and the report print, constructed from the settings of one
evaluation. Most are a `ReadingBenchmark` or a `GenerationBenchmark`; a file of questions is a `tables.TableBenchmark`.
"""

import abc
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from jflow.evaluation.report import Result
from jflow.evaluation.settings import Settings
from jflow.evaluation.tasks import Generation, Task
from jflow.generation.base import family

if TYPE_CHECKING:
  from jflow.evaluation.runs import Run
  from jflow.interop.checkpoints import Described
  from jflow.models.config import ModelConfig

# Flags that only some benchmarks take; "sampling" stands for all settings of a way to write images.
FLAGS = ("data", "only", "split", "sampling", "pictures", "results", "features")


class Benchmark(abc.ABC):
  """A benchmark, opened for one evaluation.

  `__init__` reads and checks the data, before any model is loaded.

  Attributes:
    name: what --benchmark calls it.
    what: one line for --help and the report.
    where: what to download and where to put it.
    section: of JanusFlow's paper with its scores.
    paper: way to write images -> score -> {size or model: value}; of the papers of JanusFlow (flow) and Janus (codes).
    goals: score -> value to reach.
    flags: those of FLAGS that it takes.
    split: of the data, unless --split names another.
    settings: of this evaluation.
    writes: the model's way to write images, a name of `generation.base.FAMILIES`; `meet` sets it.
    encodes: whether the model encodes images to write them.
    run: what the model's run knows of its data; `meet_run` sets it.
  """

  name: ClassVar[str]
  what: ClassVar[str]
  where: ClassVar[str] = ""
  section: ClassVar[str] = ""
  paper: ClassVar[Mapping[str, Mapping[str, Mapping[str, float]]]] = {}
  goals: ClassVar[Mapping[str, float]] = {}
  flags: ClassVar[frozenset[str]] = frozenset({"data"})
  split: ClassVar[str] = ""
  writes: str = "flow"
  encodes: bool = True
  run: "Run"

  def __init__(self, settings: Settings):
    self.settings = settings

  def meet(self, config: "ModelConfig") -> None:
    """Tells the benchmark which model it will score, before it is asked for tasks."""
    self.writes, self.encodes = config.generation.kind, family(config.generation).stored is not None

  def meet_run(self, run: "Run", described: Callable[[], "Described"]) -> None:
    """Tells the benchmark, before it is asked for tasks, what the model's run knows of its data.

    Args:
      run: of the checkpoint.
      described: reads the checkpoint but for its weights.
    """
    self.run = run

  @property
  def reported(self) -> Mapping[str, Mapping[str, float]]:
    """The paper's scores for models that write images as this one does."""
    return self.paper.get(self.writes, {})

  def papers(self, score: str) -> str:
    """The paper's values of a score, as "79.8 (384), 76.3 (256)"; empty where it has none for such models."""
    return ", ".join(f"{value:g} ({size})" for size, value in self.reported.get(score, {}).items())

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

  def changed(self) -> dict[str, Any]:
    """Flags whose value differs from the benchmark's default; the report lists them."""
    return {} if self.settings.limit is None else {"limit": self.settings.limit}

  @classmethod
  def swept(cls, settings: Settings) -> Settings:
    """The settings of one point of a sweep over sampling settings.

    Raises:
      UserError: the scores do not depend on them.
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


class GenerationBenchmark(Benchmark):
  """A benchmark of generated images.

  Attributes:
    usual: way to write images -> settings in which the benchmark differs from the defaults of that way.
    pictures: per prompt.
  """

  flags = frozenset({"data", "sampling"})
  usual: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
  pictures: int = 1

  def __init__(self, settings: Settings):
    super().__init__(settings)
    if settings.pictures is not None:
      self.pictures = settings.pictures

  def of_each(self, prompts: Mapping[str, str], file: str) -> list[Generation]:
    """One task per picture, prompt by prompt, with the seeds that follow the run's.

    Args:
      prompts: name -> text.
      file: of a picture, a format of the name and the picture's number.
    """
    return [
      Generation(f"{name}/{j}", prompt, self.settings.seed + j, file.format(name, j))
      for name, prompt in prompts.items()
      for j in range(self.pictures)
    ]

  def identity(self) -> dict[str, Any]:
    return {"pictures": self.pictures}

  def changed(self) -> dict[str, Any]:
    own = {"pictures": self.pictures} if self.pictures != type(self).pictures else {}
    return own | super().changed()
