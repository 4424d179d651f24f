"""The two files of an adapter's folder, which jflow's layout and PEFT's have in common."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jflow import files
from jflow.errors import UserError
from jflow.interop import remote, safetensors_io
from jflow.progress import Progress
from jflow.strict_json import shown

CONFIG, STEM = remote.ADAPTER, "adapter_model"


def is_adapter(directory: pathlib.Path) -> bool:
  """Whether a folder holds an adapter, of either layout."""
  return (directory / CONFIG).is_file()


def save(directory: pathlib.Path, body: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
  """Writes an adapter's configuration and its tensors, in their order, to a folder, which must exist."""
  files.write_json(directory / CONFIG, body)
  shapes = {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}
  size = sum(x.nbytes for x in tensors.values())
  with Progress(size / 2**20, 0, "writing the adapter", "MiB", delay=2) as progress:
    safetensors_io.write(directory, STEM, shapes, tensors.__getitem__, size, progress)


def check(checkpoint: safetensors_io.Checkpoint, wanted: Mapping[str, tuple[int, ...]]) -> None:
  """Checks names, shapes and types of an adapter's tensors, before any is read.

  Raises:
    UserError: one is missing, unexpected, or of another shape or type; it is named.
  """
  present = checkpoint.tensors
  for name, shape in wanted.items():
    if name not in present:
      raise UserError(f"{checkpoint.directory} lacks tensor {name} {list(shape)}: is the adapter complete?")
    found = present[name]
    if found.shape != shape:
      raise UserError(
        f"{found.file}: tensor {name} has the shape {list(found.shape)}, the model asks for {list(shape)}"
      )
    if found.dtype not in safetensors_io.DTYPES:
      raise UserError(f"{found.file}: tensor {name} has the type {found.dtype}, weights are F32, BF16 or F16")
  if unexpected := sorted(set(present) - set(wanted)):
    name = shown(unexpected[0])[1:-1]
    raise UserError(
      f"{checkpoint.directory} holds tensor {name}, which is of no adapter that {CONFIG} and the model know"
    )
