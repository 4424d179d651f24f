"""Runs three steps on several meshes over eight virtual CPU devices; prints what test_mesh.py compares.

A process of its own, since the number of devices is fixed when jax starts.
"""

import json
import pathlib
import sys

import jax
import numpy as np
import tiny

from jflow import sharding
from jflow.errors import UserError
from jflow.training import optim, setup
from jflow.training.checkpoint import Checkpointer
from jflow.training.state import TrainState
from jflow.training.step import make_step

MESHES = ((1, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 4, 2))


class Run:
  """The tiny model's training on one mesh."""

  def __init__(self, sizes: tuple[int, int, int]):
    config = tiny.configuration(train=dict(batch_size=8), optimizer=dict(muon=tiny.MUON))
    devices = jax.devices()[: int(np.prod(sizes))]
    self.mesh = sharding.make_mesh(*sizes, devices=devices)
    optimizer = optim.make_optimizer(config["optimizer"])
    patterns = config["optimizer"]["trained"], config["optimizer"]["frozen"]
    state_of = lambda params: TrainState.create(*optim.partition(params, *patterns), optimizer)
    boxed = jax.eval_shape(lambda: state_of(setup.initial_params(tiny.model(), 0)))
    self.where = sharding.shardings(self.mesh, boxed)
    shaped = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    self.abstract = jax.tree.map(shaped, sharding.unbox(boxed), self.where)
    self.state = jax.device_put(state_of(tiny.params()), self.where)
    out = (self.where, sharding.replicated(self.mesh))
    self._step = jax.jit(make_step(tiny.model(), optimizer, config), out_shardings=out)

  def step(self, batch) -> list[float]:
    """One step; returns the losses and the gradient's norm."""
    with jax.set_mesh(self.mesh):
      batch = jax.device_put(batch, sharding.batch_sharding(self.mesh))
      self.state, metrics = self._step(self.state, batch)
    return [
      float(metrics[name]) for name in ("loss", "loss_text", "loss_flow", "loss_alignment", "grad_norm")
    ]


def main(directory: pathlib.Path) -> dict:
  """Returns losses per mesh, the share of a weight on one device, and losses after a change of mesh."""
  rows = [tiny.mixed(), tiny.mixed()._replace(tokens=tiny.mixed().tokens[:, ::-1].copy())]
  batch = jax.tree.map(lambda *x: np.concatenate(x), *rows)
  runs = {sizes: Run(sizes) for sizes in MESHES}
  out = {"losses": {}, "restored": {}, "same_bits": {}}
  for sizes, run in runs.items():
    losses = [run.step(batch) for _ in range(2)]
    if sizes == (2, 2, 2):
      checkpointer = Checkpointer(directory, 1, {})
      checkpointer.save(run.state)
      checkpointer.wait()
      saved = jax.tree.map(np.asarray, run.state)
      kernel = run.state.trained["language_model"]["layers"]["mlp"]["up"]["kernel"]
      out["share"] = kernel.addressable_shards[0].data.size / kernel.size
    out["losses"][str(sizes)] = losses + [run.step(batch)]
  for sizes in ((1, 1, 1), (1, 4, 2)):
    run = runs[sizes]
    run.state = Checkpointer(directory, 1, {}).restore(run.abstract)
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == b.tobytes(), run.state, saved)
    out["same_bits"][str(sizes)] = jax.tree.all(same)
    out["restored"][str(sizes)] = run.step(batch)
  try:
    sharding.make_mesh(2, 2, 1)
  except UserError as error:
    out["refused"] = str(error)
  return out


if __name__ == "__main__":
  print(json.dumps(main(pathlib.Path(sys.argv[1]))))
