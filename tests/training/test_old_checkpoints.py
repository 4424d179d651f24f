"""Checkpoints of every format that jflow has written still load: weights, state and logits (tests/golden)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from golden_checkpoint import GOLDEN, STEP, params, state

from jflow.interop import native
from jflow.models.config import ModelConfig
from jflow.training import checkpoint

WORKDIRS = sorted(GOLDEN.glob("checkpoint_*"))


def test_there_is_one_of_the_current_format():
  assert [int(re.search(r"\d+$", path.name)[0]) for path in WORKDIRS] == list(range(1, native.FORMAT + 1))


@pytest.mark.parametrize("workdir", WORKDIRS, ids=lambda path: path.name)
def test_its_weights_and_logits_are_what_they_were(workdir):
  found, step_dir = native.resolve(workdir)
  assert step_dir.name == str(STEP)
  model = tiny.model(ModelConfig.from_dict(native.read_config(found)["model"]))
  tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12) % 48
  positions = jnp.broadcast_to(jnp.arange(12), (2, 12))

  @jax.jit
  def logits(params):
    apply = lambda *args, method: model.apply({"params": params}, *args, method=method)
    out = apply(apply(tokens, method="embed"), positions, jnp.ones_like(positions), method="backbone")
    return apply(out.hidden, method="logits")

  for weights in ("ema", "raw"):
    loaded, wanted = native.load_params(step_dir, weights), params(weights)
    frozen = {path for path in flatten_dict(wanted, sep="/") if path.startswith(("understanding_encoder", "vae"))}
    flat = flatten_dict(wanted, sep="/") | {p: flatten_dict(params("raw"), sep="/")[p] for p in frozen}
    got = flatten_dict(loaded, sep="/")
    assert got.keys() == flat.keys()
    assert all(np.asarray(got[path]).tobytes() == np.asarray(flat[path]).tobytes() for path in flat)
    np.testing.assert_allclose(logits(loaded), logits(wanted), atol=1e-6)
    assert float(jnp.std(logits(loaded))) > 0.01


@pytest.mark.parametrize("workdir", WORKDIRS, ids=lambda path: path.name)
def test_a_run_goes_on_from_it(workdir, tmp_path):
  wanted = state()
  shaped = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
  restored = checkpoint.Checkpointer(workdir / "checkpoints", 1, {}).restore(shaped)
  assert int(restored.step) == int(restored.recent.count) == STEP
  same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), restored, wanted)
  assert jax.tree.all(same)
