"""Transfer of weights between tensors on disk and jflow's nested parameters, one tensor at a time."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jflow.errors import UserError
from jflow.interop import budget, safetensors_io
from jflow.models import weights as names
from jflow.models.weights import Entry
from jflow.progress import Progress
from jflow.strict_json import shown

_BITS = {2: np.uint16, 4: np.uint32}


def check(
  wanted: Mapping[str, tuple[int, ...]],
  checkpoint: safetensors_io.Checkpoint,
  ignored: Callable[[str], bool] = lambda name: False,
) -> None:
  """Checks names, shapes and types of the tensors of a model or an adapter, before any is read.

  Args:
    wanted: name -> shape of those that must be there.
    checkpoint: with the headers of those that are.
    ignored: whether another tensor may be there too.

  Raises:
    UserError: a tensor is missing, unexpected, or of another shape or type; the first one is named.
  """
  present, where = checkpoint.tensors, checkpoint.directory
  missing = [name for name in wanted if name not in present]
  if missing:
    others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    raise UserError(
      f"{where} lacks tensor {missing[0]} {list(wanted[missing[0]])}{others}: cut short, or of another model?"
    )
  for name, tensor in present.items():
    if name in wanted and tensor.shape != wanted[name]:
      raise UserError(
        f"{tensor.file}: tensor {name} has the shape {list(tensor.shape)}, the model asks for {list(wanted[name])}"
      )
    if name in wanted and tensor.dtype not in safetensors_io.DTYPES:
      raise UserError(f"{tensor.file}: tensor {name} has the type {tensor.dtype}, weights are F32, BF16 or F16")
  unexpected = sorted(name for name in present if name not in wanted and not ignored(name))
  if unexpected:
    others = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
    name = shown(unexpected[0])[1:-1]
    raise UserError(f"{where} holds tensor {name}{others}, which the model does not have: of another model?")


def load(
  entries: Sequence[Entry],
  checkpoint: safetensors_io.Checkpoint,
  what: str,
  ignored: Callable[[str], bool] = lambda name: False,
  dtype: np.dtype | None = None,
) -> dict[str, np.ndarray]:
  """Reads tensors into parameters: `Weights.describe` and `Weights.read` in one."""
  weights = Weights.describe(entries, checkpoint, what, ignored)
  return weights.read(dtype)


@dataclasses.dataclass(frozen=True)
class Weights:
  """Tensors whose headers match a model, and the parameters that they become; not read yet."""

  entries: Sequence[Entry]  # the table
  checkpoint: safetensors_io.Checkpoint
  what: str  # name of the model in messages of progress

  @classmethod
  def describe(
    cls,
    entries: Sequence[Entry],
    checkpoint: safetensors_io.Checkpoint,
    what: str,
    ignored: Callable[[str], bool] = lambda name: False,
  ) -> "Weights":
    """Checks names, shapes and types; `ignored`: whether a tensor that the table does not name may be there.

    Raises:
      UserError: see `check`.
    """
    check({entry.name: entry.shape for entry in entries}, checkpoint, ignored)
    return cls(entries, checkpoint, what)

  def types(self, dtype: np.dtype | None) -> dict[str, np.dtype]:
    """Parameter -> the type of its array from `read`."""
    types: dict[str, np.dtype] = {}
    for entry in self.entries:
      own = safetensors_io.DTYPES[self.checkpoint.tensors[entry.name].dtype]
      own = np.dtype(np.float32) if own == np.float16 else own
      types[entry.path] = dtype or np.result_type(own, types.get(entry.path, own))
    return types

  def bytes(self, dtype: np.dtype | None) -> int:
    """The memory that `read` needs, in bytes: the parameters and the largest tensor."""
    types, tensors = self.types(dtype), self.checkpoint.tensors
    params = sum(math.prod(entry.part_shape) * types[entry.path].itemsize for entry in self.entries)
    return params + max((tensors[entry.name].bytes for entry in self.entries), default=0)

  def read(self, dtype: np.dtype | None) -> dict[str, np.ndarray]:
    """Reads the tensors into parameters. Host memory: the result plus the largest tensor.

    Args:
      dtype: of the parameters; None keeps each one's own (float16 becomes float32, exactly).

    Returns:
      Path, keys joined by "/", -> parameter.

    Raises:
      UserError: a file is damaged, or the parameters exceed this machine's memory.
    """
    entries, tensors = self.entries, self.checkpoint.tensors
    budget.check(self.bytes(dtype), self.checkpoint.directory)
    types, layers, by_name = self.types(dtype), {}, {}
    for entry in entries:
      layers[entry.path] = 0 if entry.layer is None else max(layers.get(entry.path, 0), entry.layer + 1)
      by_name.setdefault(entry.name, []).append(entry)
    order = sorted(by_name, key=lambda name: (tensors[name].file.name, tensors[name].start))
    params: dict[str, np.ndarray] = {}
    total = sum(tensors[n].bytes for n in by_name) / 2**20
    with Progress(total, 0, f"reading {self.what}", "MiB", delay=2) as progress:
      for name in order:
        tensor = self.checkpoint.read(name)
        for entry in by_name[name]:
          if entry.path not in params:
            lead = (layers[entry.path],) if layers[entry.path] else ()
            shape = lead + names.jflow_shape(entry.kind, entry.part_shape)
            params[entry.path] = _aligned(shape, types[entry.path])
          target = params[entry.path] if entry.layer is None else params[entry.path][entry.layer]
          _copy(target, names.to_jflow(entry.kind, entry.slice(tensor)))
        progress.count(tensors[name].bytes / 2**20)
    return params


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """An array aligned to 64 bytes, which XLA's CPU backend uses without a copy."""
  count = math.prod(shape) * dtype.itemsize
  try:
    raw = np.empty(count + 64, np.uint8)
  except MemoryError:
    raise UserError(f"a parameter of shape {list(shape)} takes {count:,} bytes, more memory than there is") from None
  start = -raw.ctypes.data % 64
  return raw[start : start + count].view(dtype).reshape(shape)


def _copy(target: np.ndarray, source: np.ndarray) -> None:
  """Assigns target[...] = source, as integers to keep all bits, in blocks where axes are swapped (for the cache)."""
  if target.dtype != source.dtype:
    step = max(1, 2**24 // source[0].size)
    for i in range(0, len(source), step):
      target[i : i + step] = source[i : i + step].astype(target.dtype)
    return
  bits = _BITS[target.dtype.itemsize]
  target, source = target.view(bits), source.view(bits)
  if source.ndim == 2 and not source.flags.c_contiguous:
    for i in range(0, source.shape[0], 256):
      for j in range(0, source.shape[1], 256):
        target[i : i + 256, j : j + 256] = source[i : i + 256, j : j + 256]
  else:
    target[...] = source


def tensor(parts: Sequence[Entry], params: Mapping[str, np.ndarray], dtype: np.dtype) -> np.ndarray:
  """A PyTorch tensor from the parameters; `parts` are all entries of its name."""
  out = np.empty(parts[0].shape, dtype)
  for entry in parts:
    leaf = params[entry.path] if entry.layer is None else params[entry.path][entry.layer]
    _copy(entry.slice(out), names.to_pytorch(entry.kind, np.asarray(leaf), entry.part_shape))
  return out


def save(
  entries: Sequence[Entry],
  params: Mapping[str, np.ndarray],
  directory: pathlib.Path,
  stem: str,
  what: str,
  dtype: np.dtype | None,
  shard_bytes: int,
) -> None:
  """Writes parameters as tensors; `dtype` None keeps each one's own.

  Raises:
    UserError: a parameter is missing, or its shape differs from the configuration's.
  """
  by_name: dict[str, list[Entry]] = {}
  for entry in entries:
    if entry.path not in params:
      raise UserError(f"the checkpoint has no parameter {entry.path}, which the {what} needs")
    leaf = params[entry.path].shape if entry.layer is None else params[entry.path].shape[1:]
    if tuple(leaf) != names.jflow_shape(entry.kind, entry.part_shape):
      raise UserError(
        f"parameter {entry.path} has the shape {list(params[entry.path].shape)}, the configuration gives "
        f"{list(names.jflow_shape(entry.kind, entry.part_shape))} per layer"
      )
    by_name.setdefault(entry.name, []).append(entry)
  shapes = {name: (parts[0].shape, np.dtype(dtype or params[parts[0].path].dtype)) for name, parts in by_name.items()}
  total = sum(int(np.prod(shape)) * kind.itemsize for shape, kind in shapes.values())
  get = lambda name: tensor(by_name[name], params, shapes[name][1])
  with Progress(total / 2**20, 0, f"writing {what}", "MiB", delay=2) as progress:
    safetensors_io.write(directory, stem, shapes, get, shard_bytes, progress)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """{"a/b": x} -> {"a": {"b": x}}."""
  out: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, leaf = path.split("/")
    node = out
    for key in parents:
      node = node.setdefault(key, {})
    node[leaf] = value
  return out


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Undoes `nest`."""
  out: dict[str, Any] = {}
  for key, value in tree.items():
    out |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
  return out
