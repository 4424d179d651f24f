"""Checkpoints: one Orbax directory per saved step, a sha256 manifest written last, the newest valid one restored.

All processes of a run share the directory: each writes and hashes its shards, and verifies its share of a step to be
restored; process 0 writes the manifest once all hashes are there.
"""

import pathlib
import sys
import threading
from typing import Any

import absl.logging
import jax
from orbax.checkpoint import v1 as ocp

from jflow import files
from jflow.errors import Stopped, UserError
from jflow.interop import steps
from jflow.interop.native import load, seal
from jflow.interop.steps import damage, sealed_steps, steps_of
from jflow.training import best, hosts
from jflow.training.state import TrainState


def _abstract(tree: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _items(state: TrainState) -> dict[str, Any]:
  """The items of a state to save, without empty trees, which Orbax refuses."""
  progress: dict[str, Any] = {"step": state.step, "skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
  if state.recent is not None:
    progress["recent"] = state.recent
  if state.best is not None:
    progress["best"] = state.best
  items = {
    "trained": state.trained,
    "frozen": state.frozen,
    "ema": state.ema,
    "reference": state.reference,
    "progress": {"optimizer": state.optimizer, **progress},
  }
  return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def newest_valid(directory: pathlib.Path) -> int | None:
  """Returns the newest step whose manifest verifies, and reports on stderr why a newer one was skipped.

  All processes of the run call it; each verifies its part, and all get the same step.
  """
  part = (jax.process_index(), jax.process_count())
  for step in hosts.from_first(steps_of(directory)):
    why = damage(directory / str(step), *part)
    if why is not None:
      print(f"jflow: checkpoint {directory / str(step)} is not used: {why}", file=sys.stderr)
    if not hosts.any_of(why is not None):
      return step
  return None


class Checkpointer:
  """Saves and restores the `TrainState` of one run. Saving is asynchronous."""

  def __init__(
    self,
    directory: pathlib.Path,
    keep: int,
    metadata: dict[str, Any],
    keep_every: int = 0,
    keep_best: bool = False,
  ):
    """Opens the directory, or creates it.

    Args:
      directory: the `checkpoints` folder of a workdir; the same for all processes.
      keep: newest steps to retain.
      metadata: is added to every manifest (config, commit, versions).
      keep_every: steps that are a multiple of it are never deleted; 0: none.
      keep_best: whether the best step of the held-out records is never deleted, and named in best.json.
    """
    self._directory, self._metadata = directory.absolute(), metadata
    self._keep, self._keep_every, self._keep_best = keep, keep_every, keep_best
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(f"{directory} cannot be used as a folder of checkpoints: {error.strerror}") from error
    absl.logging.set_verbosity(absl.logging.FATAL)  # Orbax raises its errors and would also print them
    self._thread: threading.Thread | None = None
    self._error: BaseException | None = None
    self._told: dict[int, str] = {}

  def save(self, state: TrainState, judged: bool = True) -> None:
    """Starts saving `state` under its step; raises the error of the previous save, if it failed.

    `judged`: see `is_judged`.
    """
    self.wait()
    step = int(state.step)
    try:
      if hosts.is_first() and (said := steps.make_room(self._directory, step)):
        hosts.say(said)
      # An existing folder is the incomplete save of a run that was killed.
      response = ocp.save_checkpointables_async(str(self._directory / str(step)), _items(state), overwrite=True)
    except OSError as error:
      raise self._stopped(step, error) from error
    found = jax.device_get(state.best) if self._keep_best else None
    self._thread = threading.Thread(target=self._finish, args=(step, response, found, judged), name="checkpoint")
    self._thread.start()

  def _finish(self, step: int, response: Any, found: best.Best | None, judged: bool) -> None:
    try:
      response.result()
      process, processes = jax.process_index(), jax.process_count()
      late = {} if judged else {"judged": False}
      seal(self._directory / str(step), {"step": step, **late, **self._metadata}, process, processes)
      if process == 0:
        steps.complete(self._directory, step)
        best.write(self._directory.parent, found)
        kept = int(found.step) if found is not None else None
        told = steps.retain(self._directory, step, self._keep, self._keep_every, kept)
        for note in told.keys() - self._told.keys():
          hosts.say(told[note])
        self._told |= told
    except BaseException as error:  # raised in the training thread by wait()
      self._error = self._stopped(step, error)

  def _stopped(self, step: int, error: BaseException) -> Stopped:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return Stopped(f"the checkpoint of step {step} could not be written ({reason}); {self.newest()}")

  def newest(self) -> str:
    """Returns the end of a message that names the newest complete checkpoint."""
    whole = sealed_steps(self._directory)
    return f"the last complete checkpoint is {self._directory / str(whole[0])}" if whole else "none was saved before"

  def wait(self) -> None:
    """Waits for the save in progress; raises its error, if it failed."""
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    self.check()

  def check(self) -> None:
    """Raises the error of the last save, if it has failed; does not wait."""
    if self._error is not None:
      error, self._error = self._error, None
      raise error

  def restore(self, state: TrainState) -> TrainState | None:
    """Returns the newest valid state with the shardings of `state`, or None where there is no checkpoint.

    Raises:
      UserError: there are checkpoints, and none of them is valid.
    """
    step = newest_valid(self._directory)
    if step is None:
      if sealed_steps(self._directory):
        raise UserError(
          f"{self._directory}: none of the saved steps is intact; start in a new workdir or bring back a copy"
        )
      hosts.first_alone(self._begin)
      return None
    loaded = load(self._directory / str(step), _abstract(_items(state)))
    counters = loaded.pop("progress")
    if int(counters["step"]) != step:
      held = int(counters["step"])
      raise UserError(f"checkpoint {self._directory / str(step)} holds step {held}: give the folder that name")
    if hosts.is_first():
      steps.complete(self._directory, step)
      steps.clean(self._directory)
    return state.replace(**loaded, **counters)

  def is_judged(self, step: int) -> bool:
    """Whether a saved step needs no loss of held-out records any more: a signal may have come before it."""
    return files.read_object(self._directory / str(step) / steps.MANIFEST).get("judged") is not False

  def _begin(self) -> None:
    steps.check_not_lost(self._directory)
    steps.clean(self._directory)
    steps.begin(self._directory.parent)
