"""Writes the tiny checkpoint of tests/golden/tiny in the published layout, with the safetensors library.

python tests/official_checkpoint.py DIR
"""

import importlib.util
import json
import pathlib
import shutil
import sys

import numpy as np
from safetensors.numpy import save_file

TESTS = pathlib.Path(__file__).parent
TINY = TESTS / "golden" / "tiny"
PROCESSOR = TESTS / "golden" / "processor"
_spec = importlib.util.spec_from_file_location("parity_weights", TESTS / "parity" / "weights.py")
_weights = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_weights)


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """The tensor of an official name and its shape, f32, deterministic."""
  return _weights.tensor(name, shape).astype(np.float32)


def tensors(vocabulary: int = 256) -> dict[str, np.ndarray]:
  """Every tensor of the published names, f32, deterministic."""
  shapes = json.loads((TINY / "manifest.json").read_text())
  for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
    shapes[name][0] = vocabulary
  return {name: tensor(name, tuple(shape)) for name, shape in shapes.items()}


def write(directory: pathlib.Path, dtype: type = np.float32, shards: int = 1, tokenizer: bool = False) -> pathlib.Path:
  """Writes the checkpoint; several shards get an index. A tokenizer brings a vocabulary of 1024."""
  directory.mkdir(parents=True)
  config = json.loads((TINY / "config.json").read_text())
  if tokenizer:
    config["language_config"]["vocab_size"] = 1024
    for name in ("tokenizer.json", "tokenizer_config.json"):
      shutil.copyfile(PROCESSOR / name, directory / name)
  (directory / "config.json").write_text(json.dumps(config, indent=1))
  values = {name: x.astype(dtype) for name, x in tensors(1024 if tokenizer else 256).items()}
  if shards == 1:
    save_file(values, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
  weight_map = {}
  for i in range(shards):
    file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
    part = list(values)[i::shards]
    save_file({name: values[name] for name in part}, directory / file, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(part, file)
  index = {"metadata": {"total_size": sum(x.nbytes for x in values.values())}, "weight_map": weight_map}
  (directory / "model.safetensors.index.json").write_text(json.dumps(index))
  return directory


if __name__ == "__main__":
  print(write(pathlib.Path(sys.argv[1])))
