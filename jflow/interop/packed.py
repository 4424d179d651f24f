"""A jflow model in one flat folder, to ship and to read anywhere: the layout of `world`, which comes with jflow.

  config.json          `model`, `data.template`, `has_vae` and `sampling`, as in a workdir
  model.safetensors    tensors named as the parameters, keys joined by "/"
  tokenizer.json, tokenizer_config.json

It holds what inference and the next stage read: the averaged weights, without heads that only training uses.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jflow.data.tokenizer import Tokenizer
from jflow.interop import budget, own_layout, safetensors_io
from jflow.models.build import parameter_shapes
from jflow.models.config import ModelConfig
from jflow.progress import Progress
from jflow.strict_json import read_object

_STEM = "model"
_LARGEST = 4 * 2**30  # bytes of a file


def is_packed(directory: pathlib.Path) -> bool:
  """Whether a folder has this layout."""
  if not (directory / "config.json").is_file() or (directory / "checkpoints").exists():
    return False
  names = (f"{_STEM}.safetensors", f"{_STEM}.safetensors.index.json")
  flat = any((directory / name).is_file() for name in names)
  return flat and isinstance(read_object(directory / "config.json").get("model"), dict)


def describe(directory: pathlib.Path) -> tuple[own_layout.Settings, safetensors_io.Checkpoint]:
  """Reads config.json and the headers of the weights, which must fit each other.

  Raises:
    UserError: a file is missing or damaged, or they are of two models.
  """
  settings = own_layout.read_settings(directory)
  checkpoint = safetensors_io.Checkpoint(directory, (_STEM,))
  dtype = lambda tensor: safetensors_io.DTYPES.get(tensor.dtype, np.int8)  # which no weights have
  found = {name: jax.ShapeDtypeStruct(tensor.shape, dtype(tensor)) for name, tensor in checkpoint.tensors.items()}
  own_layout.check_names(settings, found, directory)
  return settings, checkpoint


def read(checkpoint: safetensors_io.Checkpoint) -> dict[str, np.ndarray]:
  """Reads the parameters, keys joined by "/"; float16 becomes float32."""
  tensors = checkpoint.tensors
  budget.check(2 * sum(tensor.bytes for tensor in tensors.values()), checkpoint.directory)
  read = {name: checkpoint.read(name) for name in tensors}
  return {name: x.astype(np.float32) if x.dtype == np.float16 else x for name, x in read.items()}


def save(
  directory: pathlib.Path,
  config: ModelConfig,
  template: str,
  params: Mapping[str, Any],
  tokenizer: Tokenizer,
  has_vae: bool,
  dtype: np.dtype,
  sampling: Mapping[str, Any] = {},
) -> None:
  """Writes a model to a folder, which must exist.

  Args:
    directory: of the files.
    config: of the model.
    template: see `checkpoints.Checkpoint`.
    params: flat, keys joined by "/".
    tokenizer: of the model.
    has_vae: whether `params` have one.
    dtype: of the tensors.
    sampling: settings in place of the family's defaults.
  """
  model = ModelConfig.from_dict(config.to_dict() | {"objectives": {}})
  settings = {"model": model.to_dict(), "data": {"template": template}, "has_vae": has_vae}
  settings |= {"sampling": dict(sampling)} if sampling else {}
  (directory / "config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
  tokenizer.save(directory)
  kept = {name: np.asarray(params[name]) for name in sorted(parameter_shapes(model)) if name in params}
  shapes = {name: (tuple(x.shape), dtype) for name, x in kept.items()}
  with Progress(sum(x.size for x in kept.values()) * dtype.itemsize / 2**20, 0, "writing", "MiB", delay=2) as progress:
    safetensors_io.write(directory, _STEM, shapes, lambda name: kept[name].astype(dtype), _LARGEST, progress)
