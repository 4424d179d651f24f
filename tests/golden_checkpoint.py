"""The checkpoint of a run as format N of jflow wrote it, kept in tests/golden: later versions must read it.

  python tests/golden_checkpoint.py        writes tests/golden/checkpoint_<format>, once per format, never again

Every leaf is a function of its path, so that a reader knows each bit of it without asking the file.
"""

import copy
import json
import pathlib
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict

from jflow.config import RunConfig
from jflow.interop import native
from jflow.models.config import ModelConfig
from jflow.training import checkpoint, optim
from jflow.training.state import TrainState

GOLDEN = tiny.ROOT / "tests" / "golden"
STEP = 7


def config() -> RunConfig:
  """The smallest model that has every part."""
  model = copy.deepcopy(tiny.DICT)
  model["language_model"] |= dict(vocab_size=48, embed_dim=8, mlp_dim=12, num_heads=2, num_kv_heads=1, head_dim=4)
  model["understanding_encoder"] |= dict(embed_dim=8, mlp_dim=8, num_heads=2)
  model["generation"] |= dict(channels=8)
  model["objectives"]["alignment"]["hidden_dim"] = 8
  return tiny.configuration(model=ModelConfig.from_dict(model), train=dict(spike_sigmas=6.0, spike_window=4))


def params(salt: str) -> dict:
  """Nested f32 parameters, each leaf a function of its path and `salt`."""
  shapes = flatten_dict(tiny.shapes(config().model), sep="/")
  leaf = lambda path, shape: np.random.default_rng(zlib.crc32(f"{salt}/{path}".encode())).standard_normal(shape) / 4
  flat = {path: jnp.asarray(leaf(path, x.shape), jnp.float32) for path, x in shapes.items()}
  return unflatten_dict(flat, sep="/")


def state() -> TrainState:
  """The state that the checkpoint holds."""
  fields = config()
  patterns = fields.optimizer.trained, fields.optimizer.frozen
  trained, frozen = optim.partition(params("raw"), *patterns)
  averaged, _ = optim.partition(params("ema"), *patterns)
  optimizer = optim.make_optimizer(fields.optimizer)
  made = TrainState.create(trained, frozen, optimizer, spike_window=4)
  count = lambda x: jnp.full_like(x, STEP) if x.dtype == jnp.int32 else x + 0.25
  return jax.tree.map(count, made).replace(trained=trained, frozen=frozen, ema=averaged)


def main() -> None:
  """Writes the golden checkpoint of the current format."""
  workdir = GOLDEN / f"checkpoint_{native.FORMAT}"
  if workdir.exists():
    sys.exit(f"{workdir} exists: it is what an older jflow wrote, and stays as it is")
  checkpointer = checkpoint.Checkpointer(workdir / "checkpoints", 1, {"versions": {"jax": jax.__version__}})
  checkpointer.save(state())
  checkpointer.wait()
  fields = config().replace(data=dict(tokenizer="configs/tokenizer"))
  (workdir / "config.json").write_text(json.dumps(fields.to_dict(), indent=1) + "\n")
  size = sum(p.stat().st_size for p in pathlib.Path(workdir).rglob("*") if p.is_file())
  print(f"{workdir}: {size:,} bytes")


if __name__ == "__main__":
  main()
