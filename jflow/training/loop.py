"""The training run: restore or start, step, log, save, stop."""

import contextlib
import errno
import functools
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import numpy as np
from PIL import Image

from jflow import compilation, sharding
from jflow.batch import Batch
from jflow.commit import commit
from jflow.config import RunConfig
from jflow.data import templates
from jflow.data.pipeline import Pipeline
from jflow.data.tokenizer import Tokenizer
from jflow.data.validation import HeldOut
from jflow.errors import Stopped, Terminated, Unscored
from jflow.models import lora
from jflow.models.unified import UnifiedModel
from jflow.progress import StepProgress
from jflow.training import best, data_record, encode, hosts, optim, remat, setup, tracking
from jflow.training import workdir as workdirs
from jflow.training.checkpoint import Checkpointer
from jflow.training.flops import mfu
from jflow.training.goodput import Goodput
from jflow.training.method import Method
from jflow.training.metrics import Rejected, amend, number, resumed
from jflow.training.program import abstract_batch, check_memory, make_program
from jflow.training.signals import StopFlag, answered
from jflow.training.state import TrainState
from jflow.training.tracing import Trace
from jflow.training.validation import Validation
from jflow.training.watchdog import Watchdog

# (model, tokenizer, nested parameters as numpy arrays, prompts) -> an image for each prompt.
Sampler = Callable[[UnifiedModel, Tokenizer, Any, Sequence[str]], list[Image.Image]]
_PROMPTS = 4  # captions of the data that pictures are generated for where the config names no prompts


def train(
  config: RunConfig,
  workdir: pathlib.Path,
  sampler: Sampler | None = None,
  accepted_data: str = "",
  rule: optim.Rule | None = None,
  method: Method | None = None,
) -> None:
  """Runs a stage to its last step, from its newest checkpoint if there is one.

  Several processes call it with the same arguments (but distributed.process_id) on a workdir that they share.

  Args:
    config: of the whole run.
    workdir: directory of the run; gets config.json, data.json, tokenizer/, metrics.jsonl, goodput.jsonl, checkpoints/.
    sampler: generates the sample images of `log.sample_every`.
    accepted_data: digest of changed data that the run may continue with; see `data_record.check`.
    rule: replaces AdamW, as `optax.lion`; it gets the run's rate, clipped gradients, and the parameters that
      `optimizer.trained` names. Every start of a run must give the same one.
    method: what the run learns from in place of the losses on its data.

  Raises:
    UserError: a mistake in config, data or workdir, found before compilation where possible.
    Stopped: the run cannot continue.
    Terminated: a signal ended the run, after its state was saved.
  """
  started = time.time()
  setup.check(config)
  config = setup.with_tokenizer(config, workdir)
  optim.check_rule(config.optimizer, rule)
  hosts.start(config.distributed)
  mesh = sharding.make_mesh(**vars(config.mesh))
  tokenizer = Tokenizer.load(config.data.tokenizer)
  templates.check_fits(config.data.template, tokenizer, config.model)
  held = hosts.first_alone(lambda: workdirs.claim(workdir, config, tokenizer))
  try:
    with answered("stopping after the compilation in progress ..."):
      _train(config, workdir, mesh, tokenizer, started, sampler, accepted_data, rule, method)
  except OSError as error:
    inside = os.path.join(os.path.abspath(workdir), "")
    named = isinstance(error.filename, str) and os.path.abspath(error.filename).startswith(inside)
    if not named and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
      raise
    where = error.filename if named else f"workdir {workdir}"
    raise Stopped(f"{where} cannot be written: {error.strerror}") from error
  finally:
    if held:
      workdirs.unlock(held)


def _train(
  config: RunConfig,
  workdir: pathlib.Path,
  mesh: jax.sharding.Mesh,
  tokenizer: Tokenizer,
  started: float,
  sampler: Sampler | None,
  accepted_data: str,
  rule: optim.Rule | None,
  method: Method | None,
) -> None:
  """Runs `train` once the workdir is locked. `started`: `time.time()` when it was called."""
  workdirs.check_shared(workdir)
  compilation.use_cache(config.compute.compilation_cache)

  open_data = functools.partial(setup.open_data, config, tokenizer)
  model = setup.undecided(config, mesh.devices.flat[0])
  rows = sharding.local_rows(mesh, config.train.batch_size)
  if method:
    pipeline: Any = method.open_data(tokenizer, rows)
  else:
    pipeline = open_data(rows)
    model = setup.with_room(model, pipeline.most(config.mesh.data * config.mesh.fsdp, config.train.accumulation))
  data = pipeline.identity()
  data_record.check(workdir, data, accepted_data)
  given, notes = config, pipeline.report()
  config, said = setup.with_steps(given, pipeline)
  held_out = setup.open_held_out(config, tokenizer, mesh)
  notes += said + (held_out.report() if held_out else [])

  with jax.set_mesh(mesh):
    make = lambda chosen: make_program(config, chosen, mesh, rule, method.make_step if method else None)
    program = make(remat.candidates(model, mesh.devices.flat[0].platform)[-1])
    check_memory(program, mesh)
    about = {
      "config": given.to_dict(),
      "data": data,
      "commit": commit(),
      "versions": workdirs.versions(),
    }
    about |= {"tokenizer": tokenizer.fingerprint}
    keep, keep_every = config.checkpoint.keep, config.checkpoint.keep_every
    keep_best = config.train.early_stop > 0
    checkpointer = Checkpointer(workdir / "checkpoints", keep, about, keep_every, keep_best)
    opened = time.time()
    state = checkpointer.restore(program.state)
    judged = state is None or checkpointer.is_judged(int(state.step))
    if state is not None:
      hosts.say(f"going on from step {int(state.step)} of {workdir / 'checkpoints'}")
      state = state.replace(best=best.found(state.best, workdir)) if keep_best else state
    else:
      state = jax.jit(program.state_of, out_shardings=program.shardings)(
        setup.start_params(config, program.model, mesh, open_data)
      )
    encode.check(pipeline.encoders(), state.frozen, model.config)
    if hosts.is_first():  # after the checks above, so that a mistake leaves no config in the workdir
      data_record.write(workdir, data)
      workdirs.write_config(workdir, given, tokenizer)
      best.write(workdir, jax.device_get(state.best) if keep_best else None)
    record = Goodput(workdir, started) if hosts.is_first() else None
    if record:
      record.mark("setup", at=opened)
      record.mark("restore", int(state.step))
    for line in notes:  # after the checks, so that a mistake prints only its own line
      hosts.say(line)
    bound = functools.partial(sampler, program.model, tokenizer) if sampler else None
    run = _Run(config, workdir, pipeline, checkpointer, record, sharding.batch_sharding(mesh), bound)
    if held_out:
      run.validate_on(held_out, program.model, mesh)
      state = state if judged else run.judged(state)
    step = program.step
    over = int(state.step) >= config.train.steps or best.is_over(state.best, config.train.early_stop)
    if not method and not over:
      batch, limit, micro = abstract_batch(config, model, mesh), config.compute.memory_gib, config.train.accumulation
      auto = model.remat == remat.AUTO
      first = remat.earlier(workdir, model, mesh, micro, limit) if auto else 0
      fitted = remat.fit_or_refuse(model, mesh, make, batch, micro, limit, first)
      if auto:
        remat.remember(workdir, fitted.model, mesh, micro, limit)
      step = fitted.compiled
    run(state, step)


class _Run:
  """The loop. The metrics of a step are fetched while the next one runs."""

  def __init__(
    self,
    config: RunConfig,
    workdir: pathlib.Path,
    pipeline: Pipeline,
    checkpointer: Checkpointer,
    record: Goodput | None,
    where: jax.sharding.NamedSharding,
    sampler: Callable[[Any, Sequence[str]], list[Image.Image]] | None = None,
  ):
    """`record` is None except on process 0; `where`: sharding of a batch; `sampler`: (parameters, prompts) to
    images."""
    self._validation: Validation | None = None
    self._sampler = sampler if config.log.sample_every else None
    self._prompts: Sequence[str] = config.log.sample_prompts
    self._config, self._workdir, self._where = config, workdir, where
    self._pipeline, self._checkpointer, self._record = pipeline, checkpointer, record
    self._pending: dict[str, Any] | None = None
    self._rejected = Rejected()

  def validate_on(self, held_out: HeldOut, model: UnifiedModel, mesh: jax.sharding.Mesh) -> None:
    """Computes the loss of held-out records along the run, which may paint their captions."""
    c = self._config
    model = setup.with_room(model, held_out.most(c.mesh.data * c.mesh.fsdp, c.train.accumulation))
    self._validation = Validation(self._config, model, mesh, held_out, self._place)
    if self._sampler:
      self._prompts = self._prompts or held_out.captions(_PROMPTS)

  def judged(self, state: TrainState) -> TrainState:
    """The state with the losses of held-out records at its step, which a signal came before; metrics get them, too."""
    step = int(state.step)
    state, found = cast("Validation", self._validation)(state)
    if self._record:
      resumed(self._workdir, step).close()
      amend(self._workdir, step, {name: number(value) for name, value in jax.device_get(found).items()})
      best.write(self._workdir, jax.device_get(state.best) if self._config.train.early_stop else None)
      self._record.mark("validate", step)
    return state

  def __call__(
    self,
    state: TrainState,
    step_fn: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]],
  ) -> None:
    """Runs the steps from the state's to the last one."""
    first, last = int(state.step), self._config.train.steps
    if self._sampler and not self._prompts:
      self._prompts = self._pipeline.captions(_PROMPTS)
      if not self._prompts:
        hosts.say("no sample pictures: the data hold none to paint, and log.sample_prompts names no prompt")
        self._sampler = None
    patience = self._config.train.early_stop
    if first >= last or best.is_over(state.best, patience):
      hosts.say(f"{self._workdir} is complete at step {first}{best.told(state.best, patience, self._workdir)}")
      return
    interval, every = self._config.checkpoint.interval, self._config.log.sample_every
    validated = self._config.train.validation_every
    main = hosts.is_first()
    self._trackers = tracking.trackers(self._config, self._workdir) if main else []
    self._metrics = resumed(self._workdir, first) if main else None
    self._progress = StepProgress(last, first, self._config.log.every_seconds, shown=main)
    self._watchdog = Watchdog(self._config.train.watchdog_seconds, self._pipeline.waiting_for)
    self._watchdog.beat("the start", slow=True)
    self._clock, self._compiled, self._trained = time.monotonic(), False, lora.parts(state.trained)
    exchange, stop, over = hosts.Exchange(), StopFlag(), False
    trace = Trace(self._config.profile, self._workdir / "profile")
    try:
      if not first and self._validation:
        loss = float(self._validation(state)[1]["val_loss"])
        hosts.say(f"held-out records have the loss {loss:.4f} before the first step")
        if self._record:
          self._record.mark("validate", first)
        self._clock = time.monotonic()
      batches = self._on_device(self._pipeline.batches(first, last))
      for step, (batch, info) in enumerate(batches, start=first + 1):
        trace.at(step)
        state, device = self._step(step_fn, state, batch)
        signum = self._flush()
        self._checkpointer.check()
        row = {"step": step, "packs": info["packs"], "rejected": info["rejected"]}
        self._rejected.name(f"step {step}", info["messages"])
        lost = sum(info["rejected"].values())
        self._pending = {"row": row, "device": device, "told": exchange(stop.signum, info["fill"], lost)}
        # A single process knows at once. Read once: a signal after this line stops the run after the next step.
        signum = stop.signum if jax.process_count() == 1 else signum
        wanted = (interval, every if self._sampler else 0, validated if self._validation else 0)
        save, sample, validate = (bool(n) and (step % n == 0 or step == last) for n in wanted)
        late = validate  # after a signal the state is saved first, and these losses are left to the continuation
        if validate and self._validation and not signum:
          state, late = self._validate(self._validation, state, step, stop)
          signum = self._flush() or (stop.signum or signal.SIGTERM if late else 0)
          over = best.is_over(state.best, patience)
          save |= over or best.is_kept(state.best, patience, step)
        if save or sample or signum:
          signum = self._flush() or signum
        if save or signum:
          self._save(state, step, judged=not late)
        if sample and not signum:
          self._sample(state, step)
        if signum:
          self._finish_saving(step)
          raise Terminated(signum, f"stopped at step {step}; the same command goes on from there")
        if over:
          last = step
          break
      self._finish_saving(last)
      if patience:
        hosts.say(
          f"{'stopped early' if over else 'ended'} at step {last}{best.told(state.best, patience, self._workdir)}"
        )
    finally:
      trace.stop()
      self._watchdog.stop()
      if jax.process_count() == 1:  # a save in progress may still complete after an error
        with contextlib.suppress(Stopped):
          self._checkpointer.wait()
      stop.restore()
      self._progress.close()
      for file in (self._metrics, self._record, *self._trackers):
        if file:
          file.close()

  def _step(self, step_fn: Callable[..., Any], state: TrainState, batch: Batch) -> Any:
    try:
      return step_fn(state, batch)
    except Unscored as error:
      self._checkpointer.wait()  # a save in progress is the one to go on from
      raise Stopped(f"{error}; {self._checkpointer.newest()}") from error

  def _flush(self) -> int:
    """Waits for the pending step, writes its metrics, and stops the run when too many steps were skipped.

    Returns:
      The signal that any process had received when that step started, or 0.
    """
    if self._pending is None:
      return 0
    pending, self._pending = self._pending, None
    row, device, told = pending["row"], *jax.device_get((pending["device"], pending["told"]))
    step, now = row["step"], time.monotonic()
    row["fill"] = float(told[:, 1].mean())
    if elsewhere := int(told[:, 2].sum()) - sum(row["rejected"].values()):
      row["rejected"] = row["rejected"] | {"other_processes": elsewhere}
    row |= {name: number(value) for name, value in device.items()}
    tokens = self._pipeline.tokens
    seconds, self._clock = max(now - self._clock, 1e-9), now
    row |= {"tokens_per_second": tokens / seconds, "mfu": mfu(self._config, self._trained, row, seconds)}
    in_a_row = row.pop("skipped_in_a_row")
    if self._metrics:
      self._metrics.write(row)
      for tracker in self._trackers:
        tracker.scalars(step, tracking.scalars(row))
    self._book(step)
    self._progress.update(row)
    self._watchdog.beat(f"step {step}")
    if in_a_row >= self._config.train.max_skipped:
      raise Stopped(
        f"{in_a_row} steps in a row were skipped (gradient not finite, or a spike), the last at step {step}; "
        f"{self._checkpointer.newest()}"
      )
    return int(told[:, 0].max())

  def _book(self, step: int, now: bool = False) -> None:
    """Books the time up to a step as training, or as compiling where it is the first of this start."""
    if self._record:
      self._record.steps(step, now) if self._compiled else self._record.mark("compile", step)
    self._compiled = True

  def _save(self, state: TrainState, step: int, judged: bool) -> None:
    self._book(step, now=True)
    if self._metrics:
      self._metrics.sync()
    self._watchdog.beat(f"step {step}", slow=True)  # an earlier save may still be going on
    self._checkpointer.save(state, judged)
    self._watchdog.beat(f"step {step}")
    if self._record:
      self._record.mark("save", step)

  def _sample(self, state: TrainState, step: int) -> None:
    """Generates the sample images with the averaged weights, on process 0."""
    self._book(step, now=True)
    self._watchdog.beat(f"step {step}", slow=True)
    params = hosts.on_host(optim.merge(state.frozen, state.averaged))
    if self._record and self._sampler:
      images = self._sampler(params, self._prompts)
      for tracker in self._trackers:
        tracker.pictures(step, self._prompts, images)
      self._record.mark("sample", step)
    self._watchdog.beat(f"step {step}")
    self._clock = time.monotonic()

  def _validate(self, validation: Validation, state: TrainState, step: int, stop: StopFlag) -> tuple[TrainState, bool]:
    """Adds the losses of the held-out records to the pending metrics of a step.

    Returns:
      The state with the best of them, and whether they are left out: a signal came to any process meanwhile.
    """
    pending = self._pending or {}
    jax.block_until_ready(pending["device"])
    self._book(step, now=True)
    self._watchdog.beat(f"step {step}", slow=True)
    began = time.monotonic()
    state, found = validation(state, lambda: hosts.any_of(bool(stop.signum)))
    pending["device"] |= jax.device_get(found)
    self._clock += time.monotonic() - began  # the step itself was as fast as ever
    if self._record:
      self._record.mark("validate", step)
    return state, not found

  def _finish_saving(self, step: int) -> None:
    self._watchdog.beat(f"step {step}", slow=True)
    self._checkpointer.wait()
    if self._record:
      self._record.mark("save", step)
      self._record.write_summary()

  def _on_device(self, batches: Iterator[tuple[Batch, Any]]) -> Iterator[tuple[Batch, Any]]:
    """Puts each host's rows on its shards of the global batch."""
    for batch, info in batches:
      yield jax.tree.map(self._place, batch), info

  def _place(self, x: np.ndarray) -> jax.Array:
    rows = self._config.train.batch_size
    return jax.make_array_from_process_local_data(self._where, np.asarray(x), (rows, *x.shape[1:]))
