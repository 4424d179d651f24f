"""`python -m jflow train` with a toy in place of the model: the loop, its hosts, checkpoints and faults are real.

  python tests/hosts_worker.py [FAULT STEP PROCESS] -- --workdir=DIR --config.FIELD=VALUE ...

A model of one matrix compiles in a tenth of a second, so that many ways to fail can be tried.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from jax.sharding import NamedSharding, PartitionSpec
from tools.faults import struck

from jflow import __main__, sharding
from jflow.config import RunConfig
from jflow.models import flops as model_flops
from jflow.training import hosts, loop, optim, setup
from jflow.training import workdir as workdirs
from jflow.training.checkpoint import Checkpointer
from jflow.training.goodput import Goodput
from jflow.training.state import TrainState


class Data:
  """Rows that are a function of (step, place): f32[rows, 16]."""

  tokens = 8 * 16  # of a batch

  def __init__(self, rows: list[int], fault: list[str]):
    self._rows, self._fault = rows, fault

  def _rejected(self, step: int) -> dict[str, int]:
    """One in the row at place 7, the last, at step 2 (counted from 0)."""
    return {"checksum": 1} if step == 2 and 7 in self._rows else {}

  def waiting_for(self) -> str:
    return ""

  def batches(self, start: int, stop: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    made = (
      (
        np.stack([np.random.default_rng([step, row]).standard_normal(16, np.float32) for row in self._rows]),
        {"fill": 0.5, "packs": {}, "rejected": self._rejected(step), "messages": []},
      )
      for step in range(start, stop)
    )
    if not self._fault:
      return made
    fault, step, process = self._fault
    return struck(made, start, fault, int(step), int(process))


class Packed(Data):
  """The rows of a pipeline as f32[rows, 16], means of their tokens."""

  def __init__(self, config: RunConfig, rows: list[int]):
    self._pipeline = setup.open_data(config, share=rows)

  def batches(self, start: int, stop: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    for batch, info in self._pipeline.batches(start, stop):
      yield (batch.tokens.reshape(len(batch.tokens), 16, -1) / 256).mean(2).astype(np.float32), info


def step(optimizer, state: TrainState, x: jax.Array):
  """One step of a regression."""

  def loss_fn(trained):
    return jnp.mean((x @ trained["kernel"] - jnp.roll(x, 1, axis=1)) ** 2)

  loss, grads = jax.value_and_grad(loss_fn)(state.trained)
  updates, moments = optimizer.update(grads, state.optimizer, state.trained)
  trained = jax.tree.map(jnp.add, state.trained, updates)
  new = state.replace(
    step=state.step + 1, trained=trained, ema=optim.update_ema(state.ema, trained, 0.9), optimizer=moments
  )
  work = {f"work_{field.name}": jnp.zeros(()) for field in dataclasses.fields(model_flops.Work)}
  return new, {"loss": loss, "skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row} | work


def train(config: RunConfig, workdir: pathlib.Path, fault: list[str]) -> None:
  """`loop.train` for the toy."""
  started = time.time()
  hosts.start(config.distributed)
  mesh = sharding.make_mesh(**vars(config.mesh))
  held = hosts.first_alone(lambda: workdirs.lock(workdir))
  try:
    workdirs.check_shared(workdir)
    optimizer = optim.make_optimizer(config.optimizer)
    initial = lambda: TrainState.create({"kernel": jnp.eye(16) * 0.5}, {}, optimizer)
    cut = lambda x: NamedSharding(mesh, PartitionSpec("fsdp") if x.ndim == 2 else PartitionSpec())
    where = jax.tree.map(cut, jax.eval_shape(initial))
    with jax.set_mesh(mesh):
      checkpointer = Checkpointer(workdir / "checkpoints", config.checkpoint.keep, {})
      shaped = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
      state = checkpointer.restore(jax.tree.map(shaped, jax.eval_shape(initial), where))
      if state is None:
        state = jax.jit(initial, out_shardings=where)()
      else:
        hosts.say(f"going on from step {int(state.step)}")
      record = Goodput(workdir, started) if hosts.is_first() else None
      if record:
        record.mark("restore", int(state.step))
      rows = sharding.local_rows(mesh, config.train.batch_size)
      out = (where, sharding.replicated(mesh))
      step_fn = jax.jit(lambda state, x: step(optimizer, state, x), donate_argnums=0, out_shardings=out)
      data = Packed(config, rows) if config.data.order == "blocks" else Data(rows, fault)
      run = loop._Run(config, workdir, data, checkpointer, record, sharding.batch_sharding(mesh))
      run(state, step_fn)
  finally:
    if held:
      workdirs.unlock(held)


if __name__ == "__main__":
  at = sys.argv.index("--")
  fault = sys.argv[1:at]
  loop.train = lambda config, workdir, *_, **__: train(config, workdir, fault)
  sys.exit(__main__.main(["train", f"--config={ROOT}/configs/stage1.py:tiny", *sys.argv[at + 1 :]]))
