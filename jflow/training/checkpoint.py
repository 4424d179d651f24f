"""Checkpoints: one Orbax directory per saved step, a sha256 manifest written last, the newest valid one restored.

A run's directory (a "workdir") holds

  config.json            the whole config; `model` rebuilds the model
  tokenizer/             tokenizer.json, tokenizer_config.json
  checkpoints/<step>/    Orbax checkpointables `trained`, `frozen`, `ema`, `progress`, and manifest.json

A step without manifest.json is not complete and is never restored. Orbax itself does not notice a flipped bit:
the manifest does. Several processes share the directory: each writes its shards, hashes what it wrote, and verifies
its share of a step to be restored; process 0 writes the manifest when all hashes are there.
"""

import json
import pathlib
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import absl.logging
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jflow import files
from jflow.errors import Stopped, UserError
from jflow.strict_json import Malformed
from jflow.training import hosts, steps
from jflow.training.state import TrainState
from jflow.training.steps import MANIFEST, damage, sealed_steps, steps_of

FORMAT = 1  # of what a step holds, written into its manifest
_HASHES = "hashes."  # beginning of the files that carry hashes from the other processes to process 0
_PATIENCE = 600.0  # seconds that a process may be later than process 0


def seal(step_dir: pathlib.Path, metadata: dict[str, Any], process: int = 0, processes: int = 1) -> None:
  """Writes the manifest: name, bytes and sha256 of every file of the step, and `metadata`.

  All processes call it. Each hashes the files that it wrote, which may still be in its memory; process 0 waits for
  the hashes of the others.

  Raises:
    OSError: a file cannot be read or written, or another process does not deliver.
  """
  _wait_until(step_dir.is_dir, f"{step_dir} does not appear: is the workdir shared by all processes?")
  found = sorted(p for p in step_dir.rglob("*") if p.is_file() and not p.name.startswith(_HASHES))
  names = [str(p.relative_to(step_dir)) for p in found if p.name != MANIFEST]
  own = [name for name in names if _writer(name) % processes == process]
  entries = {name: files.entry(step_dir / name) for name in own}
  if process:
    files.write_text(step_dir / f"{_HASHES}{process}.json", json.dumps(entries))
    return
  for other in range(1, processes):
    path = step_dir / f"{_HASHES}{other}.json"
    _wait_until(path.exists, f"process {other} did not finish its part of {step_dir}")
    entries |= files.read_object(path)
    path.unlink()
  for folder in (*(p for p in step_dir.rglob("*") if p.is_dir()), step_dir.parent):
    files.sync(folder)
  manifest = {"format": FORMAT, "files": dict(sorted(entries.items())), **metadata}
  files.write_text(step_dir / MANIFEST, json.dumps(manifest, indent=1))


def _writer(name: str) -> int:
  """The process that wrote a file of a step: Orbax names it in the path; what all share is of process 0."""
  found = re.search(r"process_(\d+)", name)
  return int(found[1]) if found else 0


def _wait_until(ready: Callable[[], bool], otherwise: str) -> None:
  """Waits for what another process does on the shared disk, which it may show late."""
  until = time.monotonic() + _PATIENCE
  while not ready():
    if time.monotonic() > until:
      raise TimeoutError(f"{otherwise} (waited {_PATIENCE} s)")
    time.sleep(0.05)


def newest_valid(directory: pathlib.Path, together: bool = False) -> int | None:
  """The newest step whose manifest verifies; says on stderr why a newer one was passed over.

  `together`: all processes of the run call it; each verifies its part, and they agree.
  """
  part = (jax.process_index(), jax.process_count()) if together else (0, 1)
  found = steps_of(directory)
  if together:
    found = hosts.from_first(found)
  for step in found:
    why = damage(directory / str(step), *part)
    if why is not None:
      print(f"jflow: checkpoint {directory / str(step)} is not used: {why}", file=sys.stderr)
    if not (hosts.any_of(why is not None) if together else why is not None):
      return step
  return None


def _abstract(tree: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _items(state: TrainState) -> dict[str, Any]:
  """The checkpointables of a state, those without a leaf left out: Orbax does not take an empty tree."""
  progress = {"step": state.step, "skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
  if state.recent is not None:
    progress["recent"] = state.recent
  items = {
    "trained": state.trained,
    "frozen": state.frozen,
    "ema": state.ema,
    "progress": {"optimizer": state.optimizer, **progress},
  }
  return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


class Checkpointer:
  """Saves and restores the `TrainState` of one run. Saving is asynchronous: the loop goes on meanwhile."""

  def __init__(self, directory: pathlib.Path, keep: int, metadata: dict[str, Any], keep_every: int = 0):
    """Opens the directory, or makes it.

    Args:
      directory: the `checkpoints` folder of a workdir; the same for all processes.
      keep: newest steps to retain.
      metadata: goes into every manifest (config, commit, versions).
      keep_every: steps that are a multiple of it are retained for good; 0: none.
    """
    self._directory, self._metadata = directory.absolute(), metadata
    self._keep, self._keep_every = keep, keep_every
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(f"{directory} cannot be used as a folder of checkpoints: {error.strerror}") from error
    absl.logging.set_verbosity(absl.logging.FATAL)  # Orbax's errors come as exceptions; it would print them as well
    self._thread: threading.Thread | None = None
    self._error: BaseException | None = None
    self._told: dict[int, str] = {}

  def save(self, state: TrainState) -> None:
    """Starts saving `state` under its step; raises the error of the save before, if it had one."""
    self.wait()
    step = int(state.step)
    try:
      if hosts.is_first() and (said := steps.make_room(self._directory, step)):
        hosts.say(said)
      # What still stands there is half a save of a run that was killed.
      response = ocp.save_checkpointables_async(self._directory / str(step), _items(state), overwrite=True)
    except OSError as error:
      raise self._stopped(step, error) from error
    self._thread = threading.Thread(target=self._finish, args=(step, response), name="checkpoint")
    self._thread.start()

  def _finish(self, step: int, response: Any) -> None:
    try:
      response.result()
      process, processes = jax.process_index(), jax.process_count()
      seal(self._directory / str(step), {"step": step, **self._metadata}, process, processes)
      if process == 0:
        steps.complete(self._directory, step)
        told = steps.retain(self._directory, step, self._keep, self._keep_every)
        for note in told.keys() - self._told.keys():
          hosts.say(told[note])
        self._told |= told
    except BaseException as error:  # handed to the training thread by wait()
      self._error = self._stopped(step, error)

  def _stopped(self, step: int, error: BaseException) -> Stopped:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return Stopped(f"the checkpoint of step {step} could not be written ({reason}); {self.newest()}")

  def newest(self) -> str:
    """Where the newest complete checkpoint is, as the end of a message."""
    whole = sealed_steps(self._directory)
    return f"the last complete checkpoint is {self._directory / str(whole[0])}" if whole else "none was saved before"

  def wait(self) -> None:
    """Waits for the save in progress and raises its error."""
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    self.check()

  def check(self) -> None:
    """Raises the error of the last save, if it has ended with one; waits for nothing."""
    if self._error is not None:
      error, self._error = self._error, None
      raise error

  def restore(self, state: TrainState) -> TrainState | None:
    """Returns the newest valid state with the shardings of `state`, or None where a run may begin.

    Raises:
      UserError: a run has been here, and none of its steps is valid.
    """
    step = newest_valid(self._directory, together=True)
    if step is None:
      if sealed_steps(self._directory):
        raise UserError(
          f"{self._directory}: none of the saved steps is intact; start in a new workdir or bring back a copy"
        )
      hosts.first_alone(self._begin)
      return None
    loaded = _load(self._directory / str(step), _abstract(_items(state)))
    counters = loaded.pop("progress")
    if int(counters["step"]) != step:
      held = int(counters["step"])
      raise UserError(f"checkpoint {self._directory / str(step)} holds step {held}: give the folder that name")
    if hosts.is_first():
      steps.complete(self._directory, step)
      steps.clean(self._directory)
    return state.replace(**loaded, **counters)

  def _begin(self) -> None:
    steps.check_not_lost(self._directory)
    steps.clean(self._directory)
    steps.begin(self._directory.parent)


def _load(step_dir: pathlib.Path, wanted: dict[str, Any]) -> dict[str, Any]:
  try:
    return ocp.load_checkpointables(step_dir.absolute(), wanted)
  except Exception as error:  # Orbax wraps every cause in one type; the first line of the root says it
    while error.__cause__ is not None:
      error = error.__cause__
    raise UserError(f"checkpoint {step_dir} does not fit this model: {str(error).splitlines()[0]}") from error


def resolve(path: str | pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Finds (workdir, step directory) from a workdir, its `checkpoints` folder, or one step of it.

  Raises:
    UserError: nothing is there, no step is intact, or a number that is no step stands among them.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise UserError(f"checkpoint {path} does not exist")
  if (path / "checkpoints").is_dir():
    workdir, folder = path, path / "checkpoints"
  elif path.name == "checkpoints":
    workdir, folder = path.parent, path
  elif steps.number(path.name) is not None and path.parent.name == "checkpoints":
    workdir, folder = path.parent.parent, path
  else:
    raise UserError(f"{path} is no jflow checkpoint: it holds no checkpoints/ folder")
  if not (workdir / "config.json").is_file():
    raise UserError(f"{workdir} is no jflow checkpoint: config.json is missing")
  if folder is path and path.name != "checkpoints":
    why = damage(folder)
    if why:
      raise UserError(f"checkpoint {folder}: {why}")
    return workdir, folder
  odd = sorted(each.name for each in folder.iterdir() if each.name.isdigit() and steps.number(each.name) is None)
  if odd:  # which checkpoint is the newest cannot be told
    raise UserError(
      f"{folder / odd[0]} must be named as a step, as in 0 or 1000: rename it, move it away, or name a step"
    )
  step = newest_valid(folder)
  if step is None:
    raise UserError(f"{folder} holds no complete checkpoint yet")
  return workdir, folder / str(step)


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
  """Reads config.json of a workdir."""
  path = workdir / "config.json"
  try:
    config = files.read_object(path)
  except (FileNotFoundError, Malformed) as error:
    raise UserError(f"{path} cannot be read: {error}") from error
  if not isinstance(config.get("model"), dict) or not config["model"]:
    raise UserError(f"{path} has no field model")
  if not isinstance(config.get("data"), dict) or not isinstance(config["data"].get("template"), str):
    raise UserError(f"{path} has no field data.template")
  return config


def param_shapes(step_dir: pathlib.Path, weights: str = "ema") -> dict[str, Any]:
  """The checkpointables that hold parameters, each nested shapes and types, from a step's metadata alone.

  Args:
    step_dir: as `resolve` gives it.
    weights: see `load_params`.

  Raises:
    UserError: no readable metadata, or no raw weights beside the averaged ones.
  """
  absl.logging.set_verbosity(absl.logging.FATAL)  # what Orbax says of a file that it cannot read, is said here
  try:
    present = ocp.checkpointables_metadata(step_dir.absolute()).metadata
    names = [name for name in ("frozen", "ema" if weights == "ema" else "trained") if name in present]
    raw = weights == "raw" and "ema" in present and "trained" not in present
    shape = lambda m: jax.ShapeDtypeStruct(tuple(m.shape), m.dtype)
    shapes = {name: jax.tree.map(shape, present[name], is_leaf=lambda m: hasattr(m, "dtype")) for name in names}
    if not all(isinstance(tree, dict) and jax.tree.leaves(tree) for tree in shapes.values()):
      raise ValueError("no arrays")
  except Exception as error:  # Orbax raises what it likes on damaged metadata
    reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
    raise UserError(f"checkpoint {step_dir} has no readable metadata ({reason})") from error
  if raw:
    raise UserError(f"checkpoint {step_dir} has no raw weights beside the averaged ones: use weights 'ema'")
  return shapes


def _parts(sizes: list[int]) -> list[list[int]]:
  """Splits arrays of so many bytes into parts to be read one after the other, each about a quarter of all.

  Orbax holds a second copy of what it reads at once, with many cores of everything.
  """
  parts, most = [[]], max(sum(sizes) // 4, 2**24)
  for i, size in enumerate(sizes):
    if parts[-1] and sum(sizes[j] for j in parts[-1]) + size > most:
      parts.append([])
    parts[-1].append(i)
  return parts


def load_params(step_dir: pathlib.Path, weights: str = "ema") -> dict[str, Any]:
  """Loads the nested parameters of a jflow checkpoint as numpy arrays.

  Args:
    step_dir: as `resolve` gives it: its bytes have been verified there, and are not hashed again.
    weights: "ema" (what inference and the next stage use) or "raw".

  Raises:
    UserError: the checkpoint was converted and has no raw weights beside the averaged ones.
  """
  from jflow.training.optim import merge

  shapes = param_shapes(step_dir, weights)
  leaves, structure = jax.tree.flatten(shapes)
  read: list[Any] = [None] * len(leaves)
  for part in _parts([leaf.size * leaf.dtype.itemsize for leaf in leaves]):
    # Orbax reads into numpy what is asked for by numpy arrays (these take no memory), and leaves placeholders out.
    wanted = [ocp.PLACEHOLDER] * len(leaves)
    for i in part:
      wanted[i] = np.broadcast_to(np.zeros((), leaves[i].dtype), leaves[i].shape)
    found = structure.flatten_up_to(_load(step_dir, structure.unflatten(wanted)))
    for i in part:
      read[i] = found[i]
  loaded = structure.unflatten(read)
  return merge(loaded.get("frozen", {}), loaded.get("ema", loaded.get("trained", {})))


def save_params(workdir: str | pathlib.Path, params: dict[str, Any], config: dict[str, Any], tokenizer: Any) -> None:
  """Writes a converted model as a jflow checkpoint at step 0: what `load_params` and `train.init_from` read.

  Args:
    workdir: directory to create; must not exist yet.
    params: nested parameters.
    config: what config.json holds; `model` and `data.template` at least.
    tokenizer: a `jflow.data.tokenizer.Tokenizer`, copied into tokenizer/.
  """
  workdir = pathlib.Path(workdir)
  part = workdir.with_name(workdir.name + ".part")
  shutil.rmtree(part, ignore_errors=True)
  try:
    part.mkdir(parents=True)
    files.write_text(part / "config.json", json.dumps(config, indent=1))
    if tokenizer is not None:
      tokenizer.save(part / "tokenizer")
    step_dir = (part / "checkpoints" / "0").absolute()
    ocp.save_checkpointables(step_dir, {"ema": params})
    seal(step_dir, {"step": 0})
    files.publish(part, workdir)
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    raise
