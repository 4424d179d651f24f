"""Writes the small Janus of tests/golden/janus_tiny, in the official layout or in transformers'.

python tests/janus_checkpoint.py official|transformers DIR
"""

import functools
import json
import pathlib
import shutil
import sys

import numpy as np
import official_checkpoint
from safetensors.numpy import save_file

GOLDEN = official_checkpoint.TESTS / "golden"
PROCESSOR = GOLDEN / "janus_processor"
OFFICIAL, TRANSFORMERS = GOLDEN / "janus_tiny", GOLDEN / "janus_hf_tiny"
_ROWS = 1024  # of the vocabulary where a tokenizer is wanted


def config(layout: pathlib.Path = OFFICIAL) -> dict:
  """Its config.json."""
  return json.loads((layout / "config.json").read_text())


@functools.cache
def _official(rows: int) -> dict[str, np.ndarray]:
  shapes = json.loads((OFFICIAL / "manifest.json").read_text())
  for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
    shapes[name][0] = rows
  return {name: official_checkpoint.tensor(name, tuple(shape)) for name, shape in shapes.items()}


def tensors(layout: pathlib.Path = OFFICIAL, rows: int = 256) -> dict[str, np.ndarray]:
  """Every tensor by name, f32, deterministic; transformers' are slices of the official ones."""
  if layout == OFFICIAL:
    return dict(_official(rows))
  out = {}
  for name, entry in json.loads((layout / "manifest.json").read_text()).items():
    first, last = entry.get("rows", (None, None))
    source = _official(rows)[entry["from"]][first:last]
    same = source.size == np.prod(entry["shape"])  # else it has a row for each token
    out[name] = np.ascontiguousarray(source.reshape(entry["shape"]) if same else source)
  return out


def write(
  directory: pathlib.Path,
  layout: pathlib.Path = OFFICIAL,
  dtype: type = np.float32,
  shards: int = 1,
  tokenizer: bool = False,
) -> pathlib.Path:
  """Writes the checkpoint; several shards get an index. A tokenizer, Janus-Pro's, brings a vocabulary of 1024."""
  directory.mkdir(parents=True)
  values, rows = config(layout), 256
  if tokenizer:
    rows = values["language_config" if layout == OFFICIAL else "text_config"]["vocab_size"] = _ROWS
    for name in ("tokenizer.json", "tokenizer_config.json"):
      shutil.copyfile(PROCESSOR / name, directory / name)
  (directory / "config.json").write_text(json.dumps(values))
  made, weight_map = {name: x.astype(dtype) for name, x in tensors(layout, rows).items()}, {}
  for i in range(shards):
    file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
    part = list(made)[i::shards]
    save_file({name: made[name] for name in part}, directory / file, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(part, file)
  if shards > 1:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  return directory


if __name__ == "__main__":
  print(write(pathlib.Path(sys.argv[2]), {"official": OFFICIAL, "transformers": TRANSFORMERS}[sys.argv[1]]))
