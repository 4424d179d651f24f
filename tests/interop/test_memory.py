"""The most memory that a float32 checkpoint takes on its way in: below 1.5 times its size, sharded or not."""

import json
import math
import os
import pathlib
import subprocess
import sys

import janus_checkpoint
import numpy as np
import official_checkpoint
import pytest
from safetensors.numpy import save_file

from jflow.interop import janus_transformers, janusflow

ROOT = pathlib.Path(__file__).parents[2]
# Sizes of the language model that make about 200 MB of the small checkpoint.
LARGE = dict(
  hidden_size=512,
  intermediate_size=2048,
  num_hidden_layers=8,
  num_attention_heads=8,
  num_key_value_heads=8,
  vocab_size=16384,
)
_RUN = """
import sys
from jflow.__main__ import main
if sys.argv[1] == "load":
  import jflow
  jflow.load(sys.argv[2], dtype=sys.argv[3])
  code = 0
else:
  code = main(sys.argv[1:])
print("peak", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), code)
"""


def _write(directory: pathlib.Path, shards: int, janus: bool, **sizes: int) -> int:
  """Writes a checkpoint of such a language model, of JanusFlow or of Janus as transformers has it; returns its
  bytes."""
  if janus:
    janus_checkpoint.write(directory, janus_checkpoint.TRANSFORMERS, tokenizer=True)
    layout, language = janus_transformers.LAYOUT, "text_config"
  else:
    official_checkpoint.write(directory, tokenizer=True)
    layout, language = janusflow.LAYOUT, "language_config"
  path = directory / "config.json"
  values = json.loads(path.read_text())
  values[language] |= sizes
  width = values[language]["hidden_size"]
  if janus:
    values["text_config"]["head_dim"] = width // values["text_config"]["num_attention_heads"]
    values["vision_config"]["projection_dim"] = width
    values["vq_config"] |= {"projection_dim": width, "image_token_embed_dim": width}
  else:
    for part in ("enc", "dec"):
      values[f"vision_gen_{part}_config"]["params"]["hidden_size"] = width
  path.write_text(json.dumps(values))
  (directory / "model.safetensors").unlink()
  rng = np.random.default_rng(0)
  shapes = {entry.name: entry.shape for entry in layout.entries(layout.read_config(values, "", None), False)}
  weight_map = {}
  for i in range(shards):
    file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
    part = list(shapes)[i::shards]
    save_file({name: 0.02 * rng.standard_normal(shapes[name], np.float32) for name in part}, directory / file)
    weight_map |= dict.fromkeys(part, file)
  if shards > 1:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  return 4 * sum(map(math.prod, shapes.values()))


def _peak(*argv: str) -> int:
  """The most bytes that a process had resident, which runs a command or loads a checkpoint."""
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "2"}
  done = subprocess.run(
    [sys.executable, "-c", _RUN, *argv], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
  )
  words = done.stdout.split()
  assert done.returncode == 0 and words[-1] in ("0", "1"), done.stderr  # 1: parity with a golden file of zeros
  return 1024 * int(words[words.index("peak") + 1])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, tuple[pathlib.Path, int, int]]:
  """Name -> directory, bytes, rows of the vocabulary."""
  root, out = tmp_path_factory.mktemp("memory"), {}
  for name, shards, sizes in (
    ("small", 1, {}),
    ("large", 1, LARGE),
    ("sharded", 3, LARGE),
    ("small janus", 1, {}),
    ("sharded janus", 3, LARGE),
  ):
    size = _write(root / name, shards, name.endswith("janus"), **sizes)
    out[name] = (root / name, size, sizes.get("vocab_size", 1024))
  return out


def _argv(command: str, directory: pathlib.Path, rows: int, tmp_path: pathlib.Path) -> list[str]:
  """The words that run a command on a published checkpoint, or on the one that jflow made of it in tmp_path/ours."""
  if command == "parity":
    arrays = {"text/input_ids": np.arange(8)[None], "text/logits": np.zeros((1, 8, rows), np.float32)}
    np.savez(tmp_path / "golden.npz", **arrays)
    return ["parity", f"--checkpoint={directory}", f"--golden={tmp_path / 'golden.npz'}"]
  source, *target = command.split()
  if source == "jflow":
    _peak("convert", f"--input={directory}", f"--output={tmp_path / 'ours'}")
    directory = tmp_path / "ours"
  if target[0] == "load":
    return ["load", str(directory), target[1]]
  return ["convert", f"--input={directory}", f"--output={tmp_path / 'out'}", *target]


@pytest.mark.process
@pytest.mark.parametrize(
  "command, name",
  [
    ("parity", "large"),
    ("official --to=jflow", "large"),
    ("jflow load bfloat16", "large"),
    ("transformers --to=official", "sharded janus"),
    *(
      pytest.param(*more, marks=pytest.mark.soak)
      for more in (
        ("official load float32", "sharded"),
        ("official --to=official --dtype=bfloat16", "sharded"),
        ("jflow load float32", "large"),
        ("jflow --to=official", "large"),
        ("jflow --to=jflow --dtype=bfloat16", "large"),
        ("transformers load float32", "sharded janus"),
        ("transformers --to=jflow", "sharded janus"),
      )
    ),
  ],
)
def test_the_peak_is_below_one_and_a_half_times_the_weights(checkpoints, tmp_path, command, name):
  """Beyond what the same command takes for a checkpoint of some hundred KB."""
  peaks = []
  for each in ("small janus" if name.endswith("janus") else "small", name):
    directory, size, rows = checkpoints[each]
    (tmp_path / each).mkdir()
    peaks.append(_peak(*_argv(command, directory, rows, tmp_path / each)))
  ratio = (peaks[1] - peaks[0]) / size
  print(f"{command}: {ratio:.2f} times {size:,} bytes")
  assert 0.4 < ratio < 1.5, f"{ratio:.2f} times {size:,} bytes"
