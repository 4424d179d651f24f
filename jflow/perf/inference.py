"""Common parts of `bench generate` and `bench understand`: the model, the chip, the clock, the report."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import chips, sharding
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.inference.loading import load, usual_dtype
from jflow.inference.pipeline import Pipeline
from jflow.interop import checkpoints
from jflow.models import build
from jflow.models.config import ModelConfig
from jflow.models.unified import UnifiedModel
from jflow.perf.timing import spread
from jflow.progress import Progress
from jflow.training import config_files


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of both workloads."""

  checkpoint: str | None = None  # None: random weights of the size of `config`
  vae: str | None = None
  dtype: str | None = None
  weights: str = "ema"
  config: str | None = None  # None: stage3:mid, where there is no checkpoint
  versus: pathlib.Path | None = None  # program that does the same work with the same weights, in alternation
  repeats: int = 5  # timed rounds


class Source(NamedTuple):
  """A model whose weights are not read yet."""

  config: ModelConfig
  params: Callable[[], Any]  # reads or draws them, nested, as training has them
  pipeline: Callable[[], Pipeline]


def open_source(args: Settings) -> Source:
  """The checkpoint of the settings, or random weights of the size of their config.

  Raises:
    UserError: the checkpoint or the config is wrong.
  """
  if args.repeats < 1:
    raise UserError(f"--repeats={args.repeats} must be at least 1")
  if args.checkpoint:
    if args.config:
      raise UserError(f"--config={args.config} is of random weights: leave it out, or --checkpoint")
    config = checkpoints.read_config(args.checkpoint)
    read = lambda: checkpoints.read_checkpoint(args.checkpoint, vae=args.vae, weights=args.weights).params
    return Source(config, read, lambda: load(args.checkpoint, vae=args.vae, dtype=args.dtype, weights=args.weights))
  if args.vae or args.weights != "ema":
    raise UserError("--vae and --weights belong to a --checkpoint: name one, or leave them out")
  config = config_files.load(args.config or "stage3:mid").model
  dtype = jnp.dtype(args.dtype or usual_dtype())
  model = UnifiedModel(config, dtype, remat="none", unroll=1, attention="xla")
  tokenizer = Tokenizer.load(config_files.load("stage3:tiny").data.tokenizer)
  draw = lambda: random_params(model)
  return Source(config, draw, lambda: Pipeline(model, draw(), tokenizer, "chat"))


def open_pipeline(args: Settings) -> Pipeline:
  """The pipeline of `open_source`."""
  return open_source(args).pipeline()


def random_params(model: UnifiedModel) -> Any:
  """Random f32 parameters, no leaf all zeros or ones, so that a comparison covers every leaf."""
  rng = np.random.default_rng(0)

  def leaf(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> np.ndarray:
    noise = rng.standard_normal(x.shape, np.float32)
    name, owner = path[-1].key, path[-2].key if len(path) > 1 else ""
    if name == "scale" and owner != "response_norm":
      return 1.0 + 0.1 * noise
    if name.endswith("kernel"):  # a convolution's or a matrix's, which may stand in a stack
      inputs = 49 if "depthwise" in name else np.prod(x.shape[-4:-1] if len(x.shape) == 4 else x.shape[-2:-1])
      return noise / np.sqrt(np.float32(inputs))
    return 0.1 * noise

  shapes = sharding.unbox(jax.eval_shape(lambda: build.initial_params(model, 0)))
  return jax.tree_util.tree_map_with_path(leaf, shapes)


def first(call: Callable[[], Any]) -> tuple[Any, float]:
  """The result of a first call and its seconds, compilation included."""
  start = time.perf_counter()
  return call(), time.perf_counter() - start


def in_turn(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, Any]]:
  """Times calls in alternation, round by round; a first round warms up and is not counted.

  The times of a call that returns {"seconds", "cpu_seconds"} are those.

  Returns:
    name -> {"seconds": spread, "cpu_seconds": spread}.
  """
  rounds: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
  with Progress((repeats + 1) * len(calls), 0, "measure", "calls") as bar:
    for _ in range(repeats + 1):
      for name, call in calls.items():
        start, cpu = time.perf_counter(), time.process_time()
        told = call()
        took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        rounds[name].append(told if isinstance(told, dict) else took)
        bar.count(1)
  return {
    name: {
      "seconds": spread([x["seconds"] for x in values[1:]]),
      "cpu_seconds": spread([x["cpu_seconds"] for x in values[1:]]),
    }
    for name, values in rounds.items()
  }


def median(measured: Mapping[str, Any], clock: str = "seconds") -> float:
  """The median of one call's times from `in_turn`."""
  return measured[clock]["median"]


def chip() -> chips.Chip | None:
  """The vendor's figures for this device; None for a CPU."""
  return chips.of(jax.devices()[0].device_kind)


def about(workload: str, pipeline: Pipeline) -> dict[str, Any]:
  """The head of a report."""
  device = jax.devices()[0]
  return {"workload": workload, "device": device.device_kind, "dtype": str(pipeline.model.dtype)}


def peak_bytes() -> int | None:
  """The peak of the device's memory in bytes; None where the device does not report it."""
  stats = jax.devices()[0].memory_stats()
  return stats and stats.get("peak_bytes_in_use")
