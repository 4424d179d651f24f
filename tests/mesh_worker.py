"""Runs and compiles steps on several meshes over 16 virtual CPU devices; prints what test_mesh.py compares.

A process of its own, since the number of devices is fixed when jax starts.
"""

import json
import pathlib
import sys

import jax
import numpy as np
import plain
import tiny

from jflow import sharding
from jflow.batch import TASKS, Batch
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.generation.flow import convnext as generation
from jflow.models import build, fp8
from jflow.objectives import next_token
from jflow.perf import hlo
from jflow.perf.rows import most
from jflow.training import optim, setup
from jflow.training.checkpoint import Checkpointer
from jflow.training.program import abstract_batch, make_program
from jflow.training.state import TrainState
from jflow.training.step import make_step
from jflow.training.validation import Validation

MESHES = ((1, 1, 1), (2, 2, 2), (1, 4, 2))
HEAD_MESHES = ((4, 1, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2), (1, 1, 2))
COMPILED = ((2, 4, 1), (4, 4, 1))
ROWS = 2  # per device of those


CONFIG = tiny.configuration(train=dict(batch_size=8), optimizer=dict(muon=tiny.MUON))
OPTIMIZER = optim.make_optimizer(CONFIG.optimizer)


def state_of(params) -> TrainState:
  """The state of step 0."""
  return TrainState.create(*optim.partition(params, CONFIG.optimizer.trained, CONFIG.optimizer.frozen), OPTIMIZER)


class Run:
  """The tiny model's training on one mesh; `boxed`: the abstract state with its logical axes.

  The model has room for the images that the rows of a device hold, and not for more.
  """

  def __init__(self, sizes: tuple[int, int, int], boxed: TrainState, batch: Batch):
    devices = jax.devices()[: int(np.prod(sizes))]
    self.mesh = sharding.make_mesh(*sizes, devices=devices)
    self.where = sharding.shardings(self.mesh, boxed)
    shaped = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    self.abstract = jax.tree.map(shaped, sharding.unbox(boxed), self.where)
    self.state = jax.device_put(state_of(tiny.params()), self.where)
    out = (self.where, sharding.replicated(self.mesh))
    model = setup.with_room(tiny.model(), most(batch, sizes[0] * sizes[1], 1))
    self._step = jax.jit(make_step(model, OPTIMIZER, CONFIG), out_shardings=out)

  def step(self, batch) -> list[float]:
    """One step; returns the losses and the gradient's norm."""
    with jax.set_mesh(self.mesh):
      batch = jax.device_put(batch, sharding.batch_sharding(self.mesh))
      self.state, metrics = self._step(self.state, batch)
    return [float(metrics[name]) for name in ("loss", "loss_text", "loss_flow", "loss_alignment", "grad_norm")]


def collectives(sizes: tuple[int, int, int]) -> dict[str, float]:
  """Kind and mesh axes -> bytes per device in one step, with the convolution that TPU and GPU get. Nothing runs."""
  devices = int(np.prod(sizes))
  config = tiny.configuration(train=dict(batch_size=ROWS * devices))
  mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:devices])
  with jax.set_mesh(mesh):
    model = setup.with_room(tiny.model(), (2, 2, 4, 3))  # of six slots
    program = make_program(config, model, mesh)
    batch = abstract_batch(config, model, mesh)
    text = program.step.lower(program.state, batch).compile().as_text()
  counts = hlo.count(text, dict(mesh.shape), lambda loop: 1.0)
  return {f"{kind} {axes}": size for (kind, axes), size in counts.collective_bytes.items()}


def losses_of_codes(sizes: tuple[int, int, int], less: int = 0) -> list[list[float]]:
  """Losses and gradient's norm of two steps of a model that writes codes, on reading, writing and text.

  The model has room for the images to write of the fullest device, and for `less` fewer.
  """
  data = dict(sources=dict.fromkeys(TASKS, (("shapes", 1.0),)), mixture=((0, (1, 2, 1)),), plan_cache="")
  config = tiny.janus(train=dict(batch_size=8), data=data | dict(shapes=dict(size=60), prompt_drop=0.5))
  mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
  with jax.set_mesh(mesh):
    host = setup.open_data(config).batch(0)
    read, written, *rest = most(host, sizes[0] * sizes[1], 1)
    program = make_program(config, setup.with_room(tiny.model(tiny.JANUS), (read, written - less, *rest)), mesh)
    params = jax.tree.map(np.asarray, tiny.params(tiny.JANUS))
    state = jax.jit(program.state_of, out_shardings=program.shardings)(params)
    batch, out = jax.device_put(host, sharding.batch_sharding(mesh)), []
    for _ in range(2):
      state, metrics = program.step(state, batch)
      out.append([float(metrics[name]) for name in ("loss", "loss_text", "loss_codes", "grad_norm")])
  return out


def losses_of_held_out(sizes: tuple[int, int, int], accumulation: int) -> dict[str, float]:
  """The losses of held-out records of all types, of which one is said to be damaged."""
  sources = dict(sources=dict.fromkeys(TASKS, (("shapes", 1.0),)), mixture=((0, (1, 2, 1)),), plan_cache="")
  config = tiny.configuration(
    train=dict(batch_size=8, accumulation=accumulation, validation_every=1),
    data=sources | dict(validation=0.3, validation_rows=16, shapes=dict(size=60)),
  )
  mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
  with jax.set_mesh(mesh):
    held = setup.open_held_out(config, Tokenizer.load(config.data.tokenizer), mesh)
    held.batches[1].append("a damaged record")
    model = setup.with_room(tiny.model(), held.most(sizes[0] * sizes[1], accumulation))
    program = make_program(config, model, mesh)
    params = jax.tree.map(np.asarray, tiny.params())
    state = jax.jit(program.state_of, out_shardings=program.shardings)(params)
    place = lambda x: jax.device_put(x, sharding.batch_sharding(mesh))
    _, found = Validation(config, model, mesh, held, place)(state)
  return {name: float(value) for name, value in found.items()}


def check_head_loss() -> None:
  """Asserts that the head's loss and gradients are the plain ones on every mesh; devices have more and less to do."""
  rng = np.random.default_rng(0)
  hidden, kernel = rng.standard_normal((4, 24, 16), np.float32), rng.standard_normal((16, 50), np.float32)
  targets = rng.integers(0, 50, (4, 24)).astype(np.int32)
  mask = rng.random((4, 24)) < [[0.9], [0.1], [0.0], [0.5]]
  ours = lambda h, k: next_token.loss(h, k, targets, mask, 8)
  reference = lambda h, k: plain.next_token(h @ k, targets, mask)
  want = jax.value_and_grad(reference, argnums=(0, 1))(hidden, kernel)
  for sizes in HEAD_MESHES:
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    put = lambda x, *names: jax.device_put(x, sharding.named(mesh, names, x.shape))
    with jax.set_mesh(mesh):
      got = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(
        put(hidden, "batch", None, None), put(kernel, "embed", "vocab")
      )
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5, err_msg=str(sizes))
    jax.tree.map(same, got, want)


def check_products_in_8_bits() -> None:
  """Asserts that a product and its gradient are on a mesh what they are on one device: the scales are of whole
  tensors."""
  rng, axes = np.random.default_rng(0), ("embed", "mlp")
  x, kernel, dy = (rng.standard_normal(shape, np.float32) for shape in ((32, 64), (64, 48), (32, 48)))

  def computed(x, kernel, dy):
    y, back = jax.vjp(lambda x, kernel: fp8.product(x, kernel, axes), x, kernel)
    return y, *back(dy)

  want = computed(x, kernel, dy)
  mesh = sharding.make_mesh(2, 2, 2, devices=jax.devices()[:8])
  put = lambda x, *names: jax.device_put(x, sharding.named(mesh, names, x.shape))
  with jax.set_mesh(mesh):
    got = jax.jit(computed)(put(x, "batch", None), put(kernel, *axes), put(dy, "batch", "mlp"))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def main(directory: pathlib.Path) -> dict:
  """Returns losses per mesh, the share of a weight on one device, losses after a change of mesh, and collectives."""
  rows = [tiny.mixed(), tiny.mixed()._replace(tokens=tiny.mixed().tokens[:, ::-1].copy())]
  batch = jax.tree.map(lambda *x: np.concatenate(x), *rows)
  boxed = jax.eval_shape(lambda: state_of(build.initial_params(tiny.model(), 0)))
  runs = {sizes: Run(sizes, boxed, batch) for sizes in MESHES}
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
  check_head_loss()
  check_products_in_8_bits()
  out["codes"] = {str(sizes): losses_of_codes(sizes) for sizes in ((1, 1, 1), (2, 2, 2))}
  out["overfull"] = losses_of_codes((2, 2, 2), less=1)[0]
  out["held_out"] = [losses_of_held_out((1, 1, 1), 1), losses_of_held_out((2, 2, 2), 2)]
  generation.depthwise = generation.convolution
  out["collectives"] = [collectives(sizes) for sizes in COMPILED]
  return out


if __name__ == "__main__":
  print(json.dumps(main(pathlib.Path(sys.argv[1]))))
