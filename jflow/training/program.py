"""The program of a run: the step, compiled for a mesh, and the shapes and shardings of its arguments.

Training, `bench train` and `compile` share it, so that benchmarks measure the step that trains.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict

from jflow import memory, sharding
from jflow.batch import Batch, empty
from jflow.config import RunConfig
from jflow.errors import UserError
from jflow.generation.base import family
from jflow.models.unified import UnifiedModel
from jflow.sections import refusal
from jflow.training import optim, setup
from jflow.training.state import TrainState
from jflow.training.step import make_step

# Platform -> options of the compiler for the step.
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
  # Weights are gathered whole, layer by layer: in pieces that overlap with their own product ("windowed einsum") they
  # take many small permutes, which the compiler itself estimates to be slower.
  "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
  # Collectives start early and end late: the default on newer GPUs, and needed on A100.
  "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
}

# Further options on a GPU where a loop over layers keeps products: this pass writes a product into the stack by a copy
# of the product, which then runs twice (openxla/xla PR 45799).
KEPT_OPTIONS = {"xla_gpu_enable_dynamic_slice_fusion": False}


class Program(NamedTuple):
  """The compiled step of a mesh, with its shapes and initial state."""

  step: Any  # jitted (state, batch) -> (state, metrics); the state's buffers are donated
  state: TrainState  # of ShapeDtypeStruct with shardings
  shardings: TrainState
  state_of: Callable[[Any], TrainState]  # parameters -> state of step 0
  model: UnifiedModel


def make_program(
  config: RunConfig,
  model: UnifiedModel,
  mesh: jax.sharding.Mesh,
  rule: optim.Rule | None = None,
  make: Callable[..., Any] | None = None,
) -> Program:
  """Builds the program of a config; nothing is compiled or allocated. Call it, and the step, under `mesh`.

  Args:
    config: of the run.
    model: see `setup.build`.
    mesh: of the run.
    rule: see `optim.make_optimizer`.
    make: (model, optimizer, shardings of the state, options of the compiler) -> the step, in place of `step.make_step`.
  """
  optimizer = optim.make_optimizer(config.optimizer, rule)
  train = config.train
  spike_window = train.spike_window if train.spike_sigmas else 0

  def state_of(params: Any) -> TrainState:
    optim.check_muon(params, config.optimizer.muon)
    trained, frozen = optim.partition(params, config.optimizer.trained, config.optimizer.frozen)
    for part in family(config.model.generation).frozen:
      if part in trained:
        what = f"must not match {part}, which no loss reaches: name it in optimizer.frozen"
        raise refusal("optimizer.trained", config.optimizer.trained, what)
    optim.rate_factors(flatten_dict(trained, sep="/"), config.optimizer.rates)
    validated = bool(config.data.validation)
    referred = config.rl.refers and not config.lora.rank  # adapters have their base as reference
    return TrainState.create(trained, frozen, optimizer, spike_window, bool(train.ema), validated, referred)

  boxed = jax.eval_shape(lambda: state_of(setup.initial_params(config, model)))
  where = sharding.shardings(mesh, boxed)
  shaped = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  platform = mesh.devices.flat[0].platform
  kept = KEPT_OPTIONS if platform == "gpu" and model.remat not in ("none", "full") else {}
  options = {**COMPILER_OPTIONS.get(platform, {}), **kept} or None
  step = (
    make(model, optimizer, where, options)
    if make
    else jax.jit(
      make_step(model, optimizer, config),
      donate_argnums=0,
      out_shardings=(where, sharding.replicated(mesh)),
      compiler_options=options,
    )
  )
  return Program(step, jax.tree.map(shaped, sharding.unbox(boxed), where), where, state_of, model)


def check_memory(program: Program, mesh: jax.sharding.Mesh) -> None:
  """Checks that the state of a run fits its devices; the memory of the step itself is not counted.

  Raises:
    UserError: it does not fit.
  """
  there = memory.of_device(mesh.local_devices[0], len(mesh.local_devices))
  leaves = jax.tree.leaves(program.state)
  needed = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
  if there is not None and needed // mesh.size > there:
    raise UserError(
      f"parameters, their averages and the optimizer's state take {needed / 2**30:,.0f} GiB, more than the "
      f"{mesh.size * there / 2**30:,.0f} GiB of {mesh.size} devices: the fields config.model.* must be smaller, or "
      "the mesh larger"
    )


def abstract_batch(config: RunConfig, model: UnifiedModel, mesh: jax.sharding.Mesh) -> Batch:
  """The shapes and shardings of the global batch of a config."""
  where = sharding.batch_sharding(mesh)
  one, rows = empty(1, setup.row_shape(config, model.config)), config.train.batch_size
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=where), one)
