"""Common parts of `bench generate` and `bench understand`: the model, the PyTorch side, the chip, the report."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow import chips, sharding
from jflow.data.tokenizer import Tokenizer
from jflow.errors import Stopped, UserError, install_line
from jflow.generation.flow import weights as flow_weights
from jflow.inference.loading import load, usual_dtype
from jflow.inference.pipeline import Pipeline
from jflow.interop import transfer
from jflow.models import build
from jflow.models import weights as names
from jflow.models.unified import UnifiedModel
from jflow.perf.timing import spread
from jflow.progress import Progress
from jflow.training import config_files

_SHARD = 2**31
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.1}  # relative L2 error between the frameworks, after all steps


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of both workloads."""

  checkpoint: str | None = None  # None: random weights of the size of `config`
  vae: str | None = None
  dtype: str | None = None
  weights: str = "ema"
  config: str = "stage3:mid"
  versus: pathlib.Path | None = None  # program that does the same work with the same weights, in alternation
  repeats: int = 5  # timed rounds


def open_pipeline(args: Settings) -> Pipeline:
  """The checkpoint of the settings, or random weights of the size of their config."""
  if args.repeats < 1:
    raise UserError(f"--repeats={args.repeats} must be at least 1")
  if args.checkpoint:
    return load(args.checkpoint, vae=args.vae, dtype=args.dtype, weights=args.weights)
  config = config_files.load(args.config)
  dtype = jnp.dtype(args.dtype or usual_dtype())
  model = UnifiedModel(config.model, dtype, remat="none", unroll=1, attention="xla")
  tokenizer = Tokenizer.load(config_files.load("stage3:tiny").data.tokenizer)
  return Pipeline(model, random_params(model), tokenizer, "chat")


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


class Torch:
  """The PyTorch side, in its own process; `call` returns when its work is done."""

  def __init__(self, program: pathlib.Path, pipeline: Pipeline):
    if not program.is_file():
      raise UserError(f"--versus={program} does not exist: in a checkout of jflow it is tests/parity/torch_worker.py")
    if pipeline.model.config.autoencoder.kind != "autoencoder_kl":
      raise UserError("--versus needs a model with SDXL's kind of VAE: --config=configs/stage3.py:mid or :384")
    self._folder = tempfile.TemporaryDirectory(prefix="jflow-bench-")
    self.folder = pathlib.Path(self._folder.name)
    _export(pipeline, self.folder)
    command = [sys.executable, str(program), str(self.folder), str(pipeline.model.dtype)]
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    self.about = self._reply()

  def load(self, **arrays: np.ndarray) -> None:
    """Sends the inputs of the following calls."""
    np.savez(self.folder / "inputs.npz", **arrays)
    self.call(do="load", file=str(self.folder / "inputs.npz"))

  def call(self, **request: Any) -> dict[str, float]:
    """Sends a request to torch_worker.py; returns its {"seconds", "cpu_seconds"}."""
    self._process.stdin.write(json.dumps(request) + "\n")
    self._process.stdin.flush()
    return self._reply()

  def result(self, **request: Any) -> np.ndarray:
    """As `call`, but returns the computed array."""
    file = self.folder / "output.npz"
    self.call(save=str(file), **request)
    return np.load(file)["out"]

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait(timeout=60)
    self._folder.cleanup()

  def _reply(self) -> dict[str, Any]:
    line = self._process.stdout.readline()
    if not line:
      raise UserError(f"the PyTorch side ended (its message stands above); it needs: {install_line('parity')}")
    return json.loads(line)


@contextmanager
def torch_side(args: Settings, pipeline: Pipeline) -> Iterator[Torch | None]:
  """The PyTorch side if --versus is given, else None."""
  side = Torch(args.versus, pipeline) if args.versus else None
  try:
    yield side
  finally:
    if side:
      side.close()


def _export(pipeline: Pipeline, folder: pathlib.Path) -> None:
  """Writes the weights in f32 with the tensor names of transformers, diffusers and the release."""
  c = pipeline.model.config
  params = {path: np.asarray(x, np.float32) for path, x in transfer.flatten(pipeline.params).items()}
  for i in range(c.language_model.num_layers):
    prefix = f"language_model/layers_{i}/"
    for path in [path for path in params if path.startswith(prefix)]:
      stack = params.setdefault("language_model/layers/" + path.removeprefix(prefix), [])
      stack.append(params.pop(path))
  around = ("vision_gen", "vision_und_enc_aligner", "beg_of_und_embed")
  parts = {
    "llm": names.language_model(c.language_model, "", tied=False),
    "siglip": names.siglip_transformers(c.understanding_encoder, "", head=True),
    "generation": [entry for entry in flow_weights.official(c) if entry.name.startswith(around)],
    "vae": names.autoencoder_kl(c.autoencoder),
  }
  (folder / "config.json").write_text(json.dumps(c.to_dict()))
  params = {path: np.stack(x) if isinstance(x, list) else x for path, x in params.items()}
  for part, entries in parts.items():
    (folder / part).mkdir()
    transfer.save(list(entries), params, folder / part, "model", part, None, _SHARD)


def agree(what: str, ours: np.ndarray, theirs: np.ndarray, dtype: str) -> float:
  """The relative L2 error; raises Stopped where it exceeds TOLERANCE."""
  error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
  if not error <= TOLERANCE[dtype]:
    raise Stopped(f"{what}: jflow and PyTorch differ by {error:.1e} (relative L2), so their times say nothing")
  return error


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
