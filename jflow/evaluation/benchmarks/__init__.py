"""Registry of benchmarks by name. Each is one file with a `Benchmark`, imported on first use.

Choices that papers leave open are fixed here and printed in every report: the sampling defaults of the model's way to
write images (flow: 30 Euler steps, w = 2; codes: w = 5), 4 images per prompt with seeds 0 to 3 (each image of the
built-in world and of MJHQ has its own noise), greedy answers without a system prompt (except MM-Vet). Answers scored by
a closed rule end after 512 tokens; free ones after 2,048, as in VLMEvalKit.
"""

import importlib.util
import pathlib
import sys

from jflow import registry
from jflow.errors import UserError
from jflow.evaluation.benchmark import Benchmark

_HERE = "jflow.evaluation.benchmarks"
# Name -> "module:class".
_KNOWN: dict[str, str | type[Benchmark]] = {
  "records": f"{_HERE}.records:Records",
  "shapes": "jflow.world.benchmark:WorldBenchmark",
  "lone": "jflow.world.benchmark:LoneBenchmark",
  "pope": f"{_HERE}.pope:Pope",
  "mme": f"{_HERE}.mme:Mme",
  "mmbench": f"{_HERE}.mmbench:MmBench",
  "seed": f"{_HERE}.seed:Seed",
  "mmmu": f"{_HERE}.mmmu:Mmmu",
  "gqa": f"{_HERE}.gqa:Gqa",
  "chartqa": f"{_HERE}.chartqa:ChartQa",
  "textvqa": f"{_HERE}.textvqa:TextVqa",
  "mmvet": f"{_HERE}.mmvet:MmVet",
  "vqav2": f"{_HERE}.vqav2:Vqav2",
  "geneval": f"{_HERE}.geneval:Geneval",
  "dpg": f"{_HERE}.dpg:Dpg",
  "mjhq": f"{_HERE}.mjhq:Mjhq",
  "mjhq10k": f"{_HERE}.mjhq:Mjhq10k",
}


def register(benchmark: type[Benchmark]) -> type[Benchmark]:
  """Registers a benchmark under its name in this process; usable as a decorator.

  Raises:
    TypeError: it is not a subclass of `Benchmark`, or lacks its name or a method.
  """
  if not (isinstance(benchmark, type) and issubclass(benchmark, Benchmark)):
    raise TypeError(f"{benchmark!r} must be a subclass of jflow.evaluation.benchmark.Benchmark")
  lacks = sorted(benchmark.__abstractmethods__) + [x for x in ("name", "what") if not hasattr(benchmark, x)]
  if lacks:
    raise TypeError(f"{benchmark.__name__} lacks {', '.join(lacks)}")
  _KNOWN[benchmark.name] = benchmark
  return benchmark


def names() -> tuple[str, ...]:
  """The name of every benchmark."""
  return tuple(_KNOWN)


def get(name: str) -> type[Benchmark]:
  """The benchmark registered under a name, or by the Python file at this path.

  Raises:
    UserError: no such name, or the file registers none or fails.
  """
  if name.endswith(".py"):
    return _of_file(pathlib.Path(name))
  if name not in _KNOWN:
    raise UserError(f"--benchmark={name} must be one of {', '.join(_KNOWN)}, or the path of a Python file with one")
  return registry.load(_KNOWN[name])


def _of_file(path: pathlib.Path) -> type[Benchmark]:
  before = dict(_KNOWN)
  spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses look their module up
  try:
    spec.loader.exec_module(module)
  except (Exception, SystemExit) as error:
    said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    raise UserError(f"--benchmark={path} fails: {said}") from error
  found = [one for name, one in _KNOWN.items() if one is not before.get(name)]
  if len(found) != 1:
    raise UserError(f"--benchmark={path} must register one benchmark (@benchmarks.register), got {len(found)}")
  return found[0]
