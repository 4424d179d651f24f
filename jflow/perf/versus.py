"""The PyTorch side of `bench --versus`: the same weights, inputs and work in a process of its own."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from jflow.errors import Stopped, UserError, install_line
from jflow.generation.flow import weights as flow_weights
from jflow.interop import layouts, published, transfer
from jflow.models import lora
from jflow.models import weights as names
from jflow.models.config import ModelConfig
from jflow.perf import inference

_SHARD = 2**31
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.1}  # relative L2 error between the frameworks, after all steps
_SAME_CODES = 0.5  # least share in float32; after a near tie all later codes of an image differ


@dataclasses.dataclass(frozen=True)
class Work:
  """How PyTorch does the work of a way to write images.

  Attributes:
    check: raises UserError for a model or settings that the PyTorch side does not compute.
    export: (config, path -> f32 array, folder) writes the weights.
    request: settings -> the request of the first half, see tests/parity/torch_worker.py.
    inputs: (tokens [I, S], start) -> its arrays beside the lengths.
    moved: what the first half makes, in PyTorch's order of axes.
    differ: (ours, theirs, dtype) -> how far apart they are, None where that is not checked; raises Stopped where their
      times say nothing about each other.
    same_lengths: whether all prompts must have one length.
  """

  check: Callable[[ModelConfig, Any], None]
  export: Callable[[ModelConfig, Mapping[str, np.ndarray], pathlib.Path], None]
  request: Callable[[Any], dict[str, Any]]
  inputs: Callable[[np.ndarray, np.ndarray, Any], dict[str, np.ndarray]]
  moved: Callable[[np.ndarray], np.ndarray]
  differ: Callable[[np.ndarray, np.ndarray, str], float | None]
  same_lengths: bool = False


class Torch:
  """The PyTorch side; `call` returns when its work is done."""

  def __init__(self, program: pathlib.Path, work: Work, source: "inference.Source", dtype: str):
    self._folder = tempfile.TemporaryDirectory(prefix="jflow-bench-")
    self.folder = pathlib.Path(self._folder.name)
    params = transfer.flatten(lora.merged(source.params()))
    (self.folder / "config.json").write_text(json.dumps(source.config.to_dict()))
    work.export(source.config, {path: np.asarray(x, np.float32) for path, x in params.items()}, self.folder)
    del params
    command = [sys.executable, str(program), str(self.folder), dtype]
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    self.about = self._reply()

  def give(self, **arrays: np.ndarray) -> None:
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


def work_of(args: "inference.Settings", config: ModelConfig, settings: Any = None) -> Work | None:
  """The PyTorch side's work for a model, checked before its weights are read; None without --versus.

  Args:
    args: of the benchmark.
    config: of the model.
    settings: typed, of the sampler; None where no image is generated.

  Raises:
    UserError: the program does not exist, or PyTorch has no such model or setting here.
  """
  if not args.versus:
    return None
  if not args.versus.is_file():
    raise UserError(f"--versus={args.versus} does not exist: in a checkout of jflow it is tests/parity/torch_worker.py")
  kind = config.generation.kind
  if kind not in WORK:
    raise UserError(f"--versus knows no PyTorch model that writes images by {kind}")
  WORK[kind].check(config, settings)
  return WORK[kind]


@contextmanager
def torch_side(
  args: "inference.Settings", work: Work | None, source: "inference.Source", dtype: Any
) -> Iterator[Torch | None]:
  """The PyTorch side in a compute dtype, None without work for it."""
  side = Torch(args.versus, work, source, str(dtype)) if work else None
  try:
    yield side
  finally:
    if side:
      side.close()


def agree(what: str, ours: np.ndarray, theirs: np.ndarray, dtype: str) -> float:
  """The relative L2 error; raises Stopped where it exceeds TOLERANCE."""
  error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
  if not error <= TOLERANCE[dtype]:
    raise Stopped(f"{what}: jflow and PyTorch differ by {error:.1e} (relative L2), so their times say nothing")
  return error


def channels_first(x: np.ndarray) -> np.ndarray:
  """[I, H, W, C] as f32[I, C, H, W]."""
  return np.ascontiguousarray(np.asarray(x, np.float32).transpose(0, 3, 1, 2))


def _check_flow(config: ModelConfig, settings: Any) -> None:
  if config.autoencoder.kind != "autoencoder_kl":
    raise UserError("--versus needs a model with SDXL's kind of VAE: --config=configs/stage3.py:mid or :384")
  _need_published(settings, solver="euler", shift=1.0, interval=(0.0, 1.0), precision="exact")


def _check_codes(config: ModelConfig, settings: Any) -> None:
  layouts.of(config, "transformers").write_config(config, "float32", None)  # refuses what it cannot hold
  _need_published(settings, temperature=0.0, precision="exact")
  if settings is None:
    raise UserError("--versus of `bench understand` knows models that write images by flow")
  if settings.guidance <= 1:
    raise UserError(f"--guidance={settings.guidance} must be above 1 beside PyTorch, which always reads both halves")


def _need_published(settings: Any, **only: Any) -> None:
  for name, value in only.items():
    if settings is not None and (given := getattr(settings, name)) != value:
      raise UserError(f"--{name}={given} must be {value} beside PyTorch, which computes no other")


def _export_flow(c: ModelConfig, params: Mapping[str, np.ndarray], folder: pathlib.Path) -> None:
  """Writes the weights with the tensor names of transformers, diffusers and the release, a folder for each part."""
  around = ("vision_gen", "vision_und_enc_aligner", "beg_of_und_embed")
  parts = {
    "llm": names.language_model(c.language_model, "", tied=False),
    "siglip": names.siglip_transformers(c.understanding_encoder, "", head=True),
    "generation": [entry for entry in flow_weights.official(c) if entry.name.startswith(around)],
    "vae": names.autoencoder_kl(c.autoencoder),
  }
  for part, entries in parts.items():
    (folder / part).mkdir()
    transfer.save(list(entries), params, folder / part, "model", part, None, _SHARD)


def _export_codes(c: ModelConfig, params: Mapping[str, np.ndarray], folder: pathlib.Path) -> None:
  """Writes a directory of transformers' layout."""
  model = published.Loaded(c, dict(params), True, None, "chat")
  published.save(layouts.of(c, "transformers"), folder / "janus", model, None, np.dtype(np.float32), _SHARD)


def _codes_differ(ours: np.ndarray, theirs: np.ndarray, dtype: str) -> float | None:
  """The share of other codes; None in bfloat16, whose ties are so many that it says nothing."""
  if ours.shape != theirs.shape:
    raise Stopped(f"codes: jflow draws {list(ours.shape)} and PyTorch {list(theirs.shape)}")
  if dtype != "float32":
    return None
  same = float(np.mean(ours == theirs))
  if same < _SAME_CODES:
    raise Stopped(f"codes: jflow and PyTorch draw {same:.0%} alike, so their times say nothing")
  return 1.0 - same


# Way to write images -> the PyTorch side's work.
WORK = {
  "flow": Work(
    check=_check_flow,
    export=_export_flow,
    request=lambda s: {"do": "solve", "steps": s.steps, "guidance": s.guidance},
    inputs=lambda tokens, start, tokenizer: {"tokens": tokens, "noise": channels_first(start)},
    moved=channels_first,
    differ=lambda ours, theirs, dtype: agree("latents", ours, theirs, dtype),
  ),
  "codes": Work(
    check=_check_codes,
    export=_export_codes,
    request=lambda s: {"do": "draw", "guidance": s.guidance},
    inputs=lambda tokens, start, tokenizer: {
      "tokens": np.pad(tokens, ((0, 0), (0, 1)), constant_values=tokenizer.image_start),
      "ids": np.asarray([tokenizer.bos, tokenizer.image_start, tokenizer.pad]),
    },
    moved=np.asarray,
    differ=_codes_differ,
    same_lengths=True,
  ),
}
