"""The training run: restore or start, step, log, save, stop."""

import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jflow import sharding
from jflow.batch import Batch
from jflow.data.pipeline import Pipeline
from jflow.data.tokenizer import Tokenizer
from jflow.errors import Stopped, UserError
from jflow.training import optim, setup
from jflow.training.checkpoint import Checkpointer
from jflow.training.metrics import MetricsFile, Progress, number
from jflow.training.state import TrainState
from jflow.training.step import make_step


class Terminated(Exception):
  """SIGTERM or SIGINT came, and the state of the current step has been saved."""

  def __init__(self, signum: int, message: str):
    super().__init__(message)
    self.signum = signum


def train(config: dict[str, Any], workdir: pathlib.Path) -> None:
  """Runs a stage to its last step, from where an earlier start left off.

  Args:
    config: nested plain values, as configs/base.py has them.
    workdir: directory of the run; gets config.json, tokenizer/, metrics.jsonl, checkpoints/.

  Raises:
    UserError: a mistake in config, data or workdir, found before compilation where possible.
    Stopped: the run cannot go on.
    Terminated: it was asked to stop, and saved first.
  """
  model_config = setup.check(config)
  mesh = sharding.make_mesh(**config["mesh"])
  tokenizer = Tokenizer.load(config["data"]["tokenizer"])
  if tokenizer.vocabulary_size > model_config.language_model.vocabulary_size:
    raise UserError(
      f"{config['data']['tokenizer']} has {tokenizer.vocabulary_size} ids, more than "
      f"model.language_model.vocabulary_size={model_config.language_model.vocabulary_size}"
    )
  held = setup.lock(workdir)
  setup.check_same_run(workdir, config)
  if config["compute"]["compilation_cache"]:
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config["compute"]["compilation_cache"]))

  shape = setup.row_shape(config, model_config)
  batch_size, seed = config["train"]["batch_size"], config["train"]["seed"]
  pipeline = Pipeline(
    config["data"], tokenizer, shape, batch_size, seed, jax.process_index(), jax.process_count()
  )
  if jax.process_index() == 0:
    for line in pipeline.report():
      print(f"jflow: {line}", file=sys.stderr)
  model = setup.build(config)
  optimizer = optim.make_optimizer(config["optimizer"])

  def state_of(params: Any) -> TrainState:
    trained, frozen = optim.partition(params, config["optimizer"]["trained"], config["optimizer"]["frozen"])
    return TrainState.create(trained, frozen, optimizer)

  with jax.set_mesh(mesh):
    boxed = jax.eval_shape(lambda: state_of(setup.initial_params(model, seed)))
    where = sharding.shardings(mesh, boxed)
    abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), sharding.unbox(boxed), where
    )
    versions = {"jax": jax.__version__, "python": sys.version.split()[0]}
    checkpointer = Checkpointer(workdir / "checkpoints", config["checkpoint"]["keep"], {"versions": versions})
    state = checkpointer.restore(abstract)
    if state is None:
      state = jax.jit(state_of, out_shardings=where)(setup.start_params(config, model, mesh, pipeline))
    else:
      print(f"jflow: going on from step {int(state.step)} of {workdir / 'checkpoints'}", file=sys.stderr)
    setup.write_config(workdir, config, tokenizer)  # late, so that a first mistake leaves the workdir free
    step_fn = jax.jit(
      make_step(model, optimizer, config), donate_argnums=0, out_shardings=(where, sharding.replicated(mesh))
    )
    _run(config, workdir, pipeline, checkpointer, state, step_fn, sharding.batch_sharding(mesh))
  held.close()


def _run(
  config: dict[str, Any],
  workdir: pathlib.Path,
  pipeline: Pipeline,
  checkpointer: Checkpointer,
  state: TrainState,
  step_fn: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]],
  where: jax.sharding.NamedSharding,
) -> None:
  """Steps from the state's step to the last one. Metrics of a step are fetched while the next one runs."""
  first, last = int(state.step), config["train"]["steps"]
  if first >= last:
    print(f"jflow: {workdir} is complete at step {first}", file=sys.stderr)
    return
  interval = config["checkpoint"]["interval"]
  metrics = MetricsFile(workdir / "metrics.jsonl", first + 1)
  progress = Progress(last, first, config["log"]["every_seconds"])
  row_tokens = config["train"]["batch_size"] * config["data"]["row_tokens"]
  clock = time.monotonic()
  pending: dict[str, Any] | None = None

  def flush() -> None:
    """Waits for the pending step's metrics, writes them, and stops the run when too many steps were skipped."""
    nonlocal pending, clock
    if pending is None:
      return
    row, device = pending["row"], jax.device_get(pending["device"])
    pending = None
    now = time.monotonic()
    row |= {name: number(value) for name, value in device.items()}
    row |= {"tokens_per_second": row_tokens / max(now - clock, 1e-9), "mfu": None}
    clock = now
    in_a_row = row.pop("skipped_in_a_row")
    metrics.write(row)
    progress.update(row)
    if in_a_row >= config["train"]["max_skipped"]:
      raise Stopped(
        f"{in_a_row} steps in a row had a gradient that is not finite, the last at step {row['step']}; "
        f"the checkpoints in {workdir / 'checkpoints'} were saved before or between"
      )

  stop = _StopFlag()
  batches = _on_device(pipeline.batches(first, last), where)
  try:
    for step, (batch, info) in enumerate(batches, start=first + 1):
      state, device = step_fn(state, batch)
      flush()
      row = {"step": step, "fill": float(info["fill"]), "packs": info["packs"], "rejected": info["rejected"]}
      pending = {"row": row, "device": device}
      # Read once: a signal after this line stops after the next step, which is then saved.
      signum = stop.signum
      if step % interval == 0 or step == last or signum:
        flush()
        checkpointer.save(state)
      if signum:
        checkpointer.wait()
        raise Terminated(signum, f"stopped at step {step}; the same command goes on from there")
    checkpointer.wait()
  finally:
    stop.restore()
    progress.close()
    metrics.close()


def _on_device(batches: Iterator[tuple[Batch, Any]], where: Any) -> Iterator[tuple[Batch, Any]]:
  """Puts each host's rows on its shards of the global batch."""
  for batch, info in batches:
    yield jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, np.asarray(x)), batch), info


class _StopFlag:
  """Remembers SIGTERM and SIGINT until the step in progress is done; a second one changes nothing."""

  def __init__(self) -> None:
    self.signum = 0
    self._old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}

  def _note(self, signum: int, frame: Any) -> None:
    self.signum = self.signum or signum
    print("jflow: saving before exit ...", file=sys.stderr, flush=True)

  def restore(self) -> None:
    for signum, handler in self._old.items():
      signal.signal(signum, handler)
