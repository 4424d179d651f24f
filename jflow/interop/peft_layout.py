"""Adapters of Janus in PEFT's format (https://github.com/huggingface/peft), over transformers' names of its layers.

adapter_model.safetensors  base_model.model.LAYER.lora_A.weight [rank, in] and .lora_B.weight [out, rank], with two
                           axes more where the layer is a convolution
adapter_config.json        PEFT's LoraConfig; `target_modules` lists the layers
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jflow.errors import UserError
from jflow.interop import adapter_files, layouts, safetensors_io, transfer
from jflow.interop.fields import Fields
from jflow.models import lora, weights
from jflow.models.config import ModelConfig
from jflow.models.weights import LINEAR, PATCH, Entry

_PREFIX = "base_model.model."
# Of LoraConfig: what changes nothing once adapters are trained, and what jflow does not compute, with its value when
# off.
_FREE = (
  "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules exclude_modules "
  "lora_dropout megatron_core qalora_group_size"
).split()
_OFF = {
  "fan_in_fan_out": False,
  "bias": "none",
  "rank_pattern": {},
  "alpha_pattern": {},
  "loftq_config": {},
} | dict.fromkeys(("use_dora", "use_qalora", "lora_bias", "ensure_weight_tying"), False)


class Pair(NamedTuple):
  """The two tensors of the adapter of one layer."""

  entry: Entry  # of the layer's weight
  a: str  # names of the tensors
  b: str

  def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
    """Their shapes."""
    out, *into = self.entry.part_shape
    return {self.a: (rank, *into), self.b: (out, rank, *(1 for _ in into[1:]))}

  @property
  def place(self) -> str:
    """The path of the parameter, up to its last "/"."""
    return self.entry.path.removesuffix("kernel")


def _pairs(config: ModelConfig) -> Iterator[Pair]:
  """Yields the layers that may have an adapter."""
  for entry in layouts.of(config, "transformers").entries(config, False):
    if entry.path.endswith("/kernel") and entry.kind in (LINEAR, PATCH):
      name = _PREFIX + entry.name.removesuffix(".weight")
      yield Pair(entry, f"{name}.lora_A.weight", f"{name}.lora_B.weight")


def save(directory: pathlib.Path, config: ModelConfig, leaves: Mapping[str, Any], rank: int, alpha: float) -> None:
  """Writes an adapter.

  Args:
    directory: must exist.
    config: of the model.
    leaves: `lora_a` and `lora_b` by path.
    rank, alpha: of all of them.

  Raises:
    UserError: transformers has no layout of the model, or a matrix has no layer there.
  """
  layouts.of(config, "transformers").write_config(config, "float32", None)  # refuses a base that it cannot hold
  tensors, modules, placed = {}, [], set()
  for pair in _pairs(config):
    if pair.place + "lora_a" not in leaves:
      continue
    placed.add(pair.place)
    modules.append(pair.a.removeprefix(_PREFIX).removesuffix(".lora_A.weight"))
    for (name, shape), leaf in zip(pair.shapes(rank).items(), lora.TRAINED, strict=True):
      x = np.asarray(leaves[pair.place + leaf], np.float32)
      x = x if pair.entry.layer is None else x[pair.entry.layer]
      tensors[name] = np.ascontiguousarray(weights.to_pytorch(pair.entry.kind, x, shape))
  unused = {path.rpartition("/")[0] + "/" for path in layouts.of(config, "transformers").unread(config)}
  if left := sorted({path.rpartition("/")[0] + "/" for path in leaves} - placed - unused):
    raise UserError(f"the adapter of {left[0]}kernel has no place in transformers' layout: use --to=jflow")
  body = {
    "peft_type": "LORA",
    "r": rank,
    "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
    "lora_dropout": 0.0,
    "target_modules": modules,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "base_model_name_or_path": None,
    "task_type": None,
  }
  adapter_files.save(directory, body, tensors)


def describe(
  f: Fields, checkpoint: safetensors_io.Checkpoint, config: ModelConfig
) -> Callable[[], dict[str, np.ndarray]]:
  """Checks adapter_config.json and the headers of the tensors, and returns what reads these into adapters' leaves.

  Raises:
    UserError: the adapter asks for something that jflow does not compute, or does not fit the model.
  """
  f.only("peft_type", "LORA")
  f.only("init_lora_weights", True, False, "gaussian", "orthogonal", "eva")  # the others change the base
  for name, value in _OFF.items():
    f.only(name, value)
  f.ignore(_FREE)
  f.only("use_rslora", False, True)
  rank, alpha = f.get("r", int), f.get("lora_alpha", float)
  scale = alpha / (rank**0.5 if f.values.get("use_rslora") else rank)
  f.close()
  present = {name.rpartition(".lora_")[0] for name in checkpoint.tensors}
  pairs = list(_pairs(config))
  places = {pair.place for pair in pairs if pair.a.rpartition(".lora_")[0] in present}
  chosen = [pair for pair in pairs if pair.place in places]  # of a stack with an adapter, every layer
  for pair in chosen:
    if rank > (least := min(pair.entry.part_shape[0], int(np.prod(pair.entry.part_shape[1:])))):
      raise UserError(f"{f.where}: r={rank} must be at most {least}, the smaller side of {pair.entry.name}")
  transfer.check({name: shape for pair in chosen for name, shape in pair.shapes(rank).items()}, checkpoint)
  if not chosen:
    raise UserError(f"{checkpoint.directory} holds no tensor of an adapter")

  def read() -> dict[str, np.ndarray]:
    layers: dict[str, list[np.ndarray]] = {}
    stacked = set()
    for pair in chosen:
      for name, leaf in zip((pair.a, pair.b), lora.TRAINED, strict=True):
        x = checkpoint.read(name).astype(np.float32, copy=False)
        layers.setdefault(pair.place + leaf, []).append(weights.to_jflow(pair.entry.kind, x))
      layers[pair.place + lora.SCALE] = [*layers.get(pair.place + lora.SCALE, []), np.full((), scale, np.float32)]
      if pair.entry.layer is not None:
        stacked.add(pair.place)
    joined = lambda path, parts: np.stack(parts) if path.rpartition("/")[0] + "/" in stacked else parts[0]
    return {path: np.array(joined(path, parts), order="C") for path, parts in layers.items()}

  return read
