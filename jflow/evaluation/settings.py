"""The settings of one evaluation: a field for each flag of `evaluate`."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of one evaluation; None leaves a value to the benchmark or the machine."""

  benchmark: str  # a name of `benchmarks`, or the path of a Python file with one
  checkpoint: str
  output: pathlib.Path  # directory of records and report
  vae: str | None = None  # SDXL-VAE, for a checkpoint that holds none
  template: str | None = None  # in place of the checkpoint's, see `data.templates`
  adapter: str | None = None  # folder of one of the checkpoint's, to merge
  data: pathlib.Path | None = None
  limit: int | None = None  # the first prompts and the first questions, of each split
  only: str | None = None  # "pictures" or "questions"
  split: str = ""
  batch_size: int = 16
  seed: int = 0  # added to the seeds of the pictures
  sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # settings of the model's way to write images
  pictures: int | None = None  # per prompt
  dtype: str | None = None  # "float32" or "bfloat16"
  weights: str = "ema"  # or "raw"
  part: tuple[int, int] = (0, 1)  # (number, parts): this process predicts every `parts`-th sample
  results: pathlib.Path | None = None  # what an outside scorer wrote
  features: pathlib.Path | None = None  # what launch/experiments/features.py wrote
  cache: str = "~/.cache/jflow"  # of compiled programs and of features of true pictures; empty: none

  def command(self, **more: Any) -> list[str]:
    """The words of the command with these settings, `more` replacing some; it runs in any folder.

    Leaves out --part: the command that scores is one for all parts.
    """
    words = ["python", "-m", "jflow", "evaluate"]
    for field in dataclasses.fields(self):
      value = more.get(field.name, getattr(self, field.name))
      if field.name == "sampling":
        for name, one in value.items():
          words += [f"--{name}", *map(str, one)] if isinstance(one, tuple | list) else [f"--{name}={one}"]
        continue
      if field.name == "part" or value == field.default:
        continue
      on_disk = value and field.name in ("checkpoint", "vae", "adapter", "cache") and pathlib.Path(value).exists()
      a_file = field.name == "benchmark" and value.endswith(".py")
      if isinstance(value, pathlib.Path) or on_disk or a_file:
        value = pathlib.Path(value).resolve()
      words.append(f"--{field.name}={value}")
    return words
