"""Parameters in jflow's own checkpoints: locating, verifying, reading and writing without a trainer.

A run's directory (a "workdir") holds

  config.json            the whole config; `model` rebuilds the model
  tokenizer/             tokenizer.json, tokenizer_config.json
  checkpoints/<step>/    Orbax checkpointables `trained`, `frozen`, `ema`, `progress`, and manifest.json

A step without manifest.json is incomplete and is never restored. Orbax does not detect a flipped bit; the manifest,
sha256 hashes written last, does.
"""

import json
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import absl.logging
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from jflow import files
from jflow.errors import UserError
from jflow.interop import remote, steps
from jflow.interop.best import best_step
from jflow.interop.steps import MANIFEST, damage, steps_of
from jflow.models import lora
from jflow.strict_json import Malformed

FORMAT = 1  # version of a step's contents, written into its manifest
_HASHES = "hashes."  # prefix of the files that carry hashes from the other processes to process 0
_PATIENCE = 600.0  # seconds to wait for another process


def seal(step_dir: pathlib.Path, metadata: dict[str, Any], process: int = 0, processes: int = 1) -> None:
  """Writes the manifest: name, bytes and sha256 of every file of the step, and `metadata`.

  All processes call it. Each hashes the files that it wrote, which its page cache may still hold; process 0 waits for
  the hashes of the others.

  Raises:
    OSError: a file cannot be read or written, or the hashes of another process do not arrive.
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
  """The process that wrote a file of a step, from Orbax's path; shared files are process 0's."""
  found = re.search(r"process_(\d+)", name)
  return int(found[1]) if found else 0


def _wait_until(ready: Callable[[], bool], otherwise: str) -> None:
  """Waits for another process's change of the shared disk, which may become visible late."""
  until = time.monotonic() + _PATIENCE
  while not ready():
    if time.monotonic() > until:
      raise TimeoutError(f"{otherwise} (waited {_PATIENCE} s)")
    time.sleep(0.05)


def newest_valid(directory: pathlib.Path) -> int | None:
  """The newest step whose manifest verifies; reports on stderr why newer ones were skipped."""
  for step in steps_of(directory):
    why = damage(directory / str(step))
    if why is None:
      return step
    print(f"jflow: checkpoint {directory / str(step)} is not used: {why}", file=sys.stderr)
  return None


def load(step_dir: pathlib.Path, wanted: dict[str, Any]) -> dict[str, Any]:
  """Reads checkpointables of a step.

  Raises:
    UserError: they differ from `wanted`.
  """
  try:
    return ocp.load_checkpointables(step_dir.absolute(), wanted)
  except Exception as error:  # Orbax wraps every cause in one type; the first line of the root has the reason
    while error.__cause__ is not None:
      error = error.__cause__
    raise UserError(f"checkpoint {step_dir} does not fit this model: {str(error).splitlines()[0]}") from error


def resolve(path: str | pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """(workdir, step directory) of a workdir, its `checkpoints` folder, or one step of it.

  Of a run that stops early it is the best step, as best.json names it, else the newest.

  Raises:
    UserError: the path does not exist, no step is intact, or a step's folder has an irregular number such as 007.
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
  elif (path / remote.ADAPTER).is_file():
    raise UserError(
      f"{path} holds an adapter alone: name its base, with --adapter={path} beside it; to train on, name the run that it "
      "comes from, whose adapters are merged"
    )
  else:
    raise UserError(f"{path} must be a jflow checkpoint: it has no checkpoints/ folder")
  if not (workdir / "config.json").is_file():
    raise UserError(f"{workdir} must be a jflow checkpoint: its config.json is missing")
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
  step = best_step(workdir)
  if step is not None and steps_of(folder)[0] != step:
    print(f"jflow: of {workdir}, step {step} is read, the best of its held-out records", file=sys.stderr)
  step = newest_valid(folder) if step is None else step
  if step is None:
    raise UserError(f"{folder} holds no complete checkpoint yet")
  return workdir, folder / str(step)


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
  """Reads config.json of a workdir.

  Raises:
    UserError: the file is missing or damaged, or has no section `model` or no field `data.template`.
  """
  path = workdir / "config.json"
  try:
    config = files.read_object(path)
  except (FileNotFoundError, Malformed) as error:
    raise UserError(f"{path} cannot be read: {error}") from error
  if not isinstance(config.get("model"), dict) or not config["model"]:
    raise UserError(f"{path} has no field model")
  if not isinstance(config.get("data"), dict) or config["data"].get("template") is None:
    raise UserError(f"{path} has no field data.template")
  return config


def param_shapes(step_dir: pathlib.Path, weights: str = "ema") -> dict[str, Any]:
  """The checkpointables with parameters, as nested shapes and types, from a step's metadata alone.

  Args:
    step_dir: from `resolve`.
    weights: see `load_params`.

  Raises:
    UserError: the metadata cannot be read, or there are no raw weights beside the averaged ones.
  """
  absl.logging.set_verbosity(absl.logging.FATAL)  # the UserError replaces Orbax's log of an unreadable file
  try:
    present = ocp.checkpointables_metadata(step_dir.absolute()).metadata
    average = weights == "ema" and "ema" in present  # a run without an average has its weights alone
    names = [name for name in ("frozen", "ema" if average else "trained") if name in present]
    raw = weights == "raw" and "ema" in present and "trained" not in present
    shape = lambda m: jax.ShapeDtypeStruct(tuple(m.shape), m.dtype)
    shapes = {name: jax.tree.map(shape, present[name], is_leaf=lambda m: hasattr(m, "dtype")) for name in names}
    if not all(isinstance(tree, dict) and jax.tree.leaves(tree) for tree in shapes.values()):
      raise ValueError("no arrays")
  except Exception as error:  # Orbax raises many types on damaged metadata
    reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
    raise UserError(f"checkpoint {step_dir} has no readable metadata ({reason})") from error
  if raw:
    raise UserError(f"checkpoint {step_dir} has no raw weights beside the averaged ones: use weights 'ema'")
  return shapes


def _parts(sizes: list[int]) -> list[list[int]]:
  """Groups arrays of these sizes in bytes into parts to read one after the other, each about a quarter of all.

  Orbax holds a second copy of all that it reads in one call.
  """
  parts, most = [[]], max(sum(sizes) // 4, 2**24)
  for i, size in enumerate(sizes):
    if parts[-1] and sum(sizes[j] for j in parts[-1]) + size > most:
      parts.append([])
    parts[-1].append(i)
  return parts


def load_params(step_dir: pathlib.Path, weights: str = "ema") -> dict[str, Any]:
  """Loads the nested parameters of a jflow checkpoint as numpy arrays, adapters merged into their matrices.

  Arguments and errors as of `load_parts`.
  """
  frozen, trained = load_parts(step_dir, weights)
  return lora.merged(unflatten_dict({**flatten_dict(frozen), **flatten_dict(trained)}))


def load_parts(step_dir: pathlib.Path, weights: str = "ema") -> tuple[dict[str, Any], dict[str, Any]]:
  """Loads the nested parameters (frozen, trained) of a jflow checkpoint as numpy arrays, adapters as they are.

  Args:
    step_dir: from `resolve`, which has verified its bytes: they are not hashed again.
    weights: "ema" (what inference and the next stage use) or "raw".

  Raises:
    UserError: the checkpoint was converted and has no raw weights beside the averaged ones.
  """
  shapes = param_shapes(step_dir, weights)
  leaves, structure = jax.tree.flatten(shapes)
  read: list[Any] = [None] * len(leaves)
  for part in _parts([leaf.size * leaf.dtype.itemsize for leaf in leaves]):
    # Orbax reads numpy arrays where the target has them (these take no memory), and skips placeholders.
    wanted = [ocp.PLACEHOLDER] * len(leaves)
    for i in part:
      wanted[i] = np.broadcast_to(np.zeros((), leaves[i].dtype), leaves[i].shape)
    found = structure.flatten_up_to(load(step_dir, structure.unflatten(wanted)))
    for i in part:
      read[i] = found[i]
  loaded = structure.unflatten(read)
  return loaded.get("frozen", {}), loaded.get("ema", loaded.get("trained", {}))


def save_params(workdir: str | pathlib.Path, params: dict[str, Any], config: dict[str, Any], tokenizer: Any) -> None:
  """Writes a converted model as a jflow checkpoint at step 0, for `load_params` and `train.init_from`.

  Args:
    workdir: directory to create; must not exist yet.
    params: nested parameters.
    config: content of config.json; at least `model` and `data.template`.
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
