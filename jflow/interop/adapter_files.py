"""The two files of an adapter's folder, which jflow's layout and PEFT's have in common."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jflow import files
from jflow.interop import remote, safetensors_io
from jflow.progress import Progress

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
