"""The workdir of a run: one trainer at a time, one config, and where its code came from."""

import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from jflow import files
from jflow.config import RunConfig, renamed
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.interop import steps
from jflow.interop.native import read_config
from jflow.models.config import ModelConfig
from jflow.sections import completed, flat
from jflow.strict_json import Malformed
from jflow.training import data_record

# Fields that may differ between a run and its continuation. The layout of a step over devices and memory changes losses
# only by rounding, another attention kernel by that kernel's rounding.
_MAY_CHANGE = (
  "size",  # a name; its content is compared instead
  "train.steps",
  "train.epochs",
  "train.watchdog_seconds",
  "train.max_skipped",
  "train.init_fresh",
  "train.init_dropped",
  "train.validation_every",
  "train.early_stop",
  "checkpoint.",
  "distributed.",
  "log.",
  "objective.logged",
  "profile.",
  "sampling.",
  "mesh.",
  "train.accumulation",
  "compute.remat",
  "compute.attention",
  "compute.unroll",
  "compute.memory_gib",
  "compute.compilation_cache",
  "data.max_rejected_share",
  "data.workers",
  "data.threads",
  "data.prefetch",
  "data.plan_cache",
  "data.cache",  # and its size
  "data.tokenizer",  # a path; its files are compared instead
)

_LEASE = 120  # seconds until a network disk frees the lock of a dead host


def claim(workdir: pathlib.Path, config: RunConfig, tokenizer: Tokenizer) -> Any:
  """Locks the workdir and checks that it holds no other run; returns the lock, for `unlock`. For process 0."""
  if "://" in str(workdir) or str(workdir).startswith("gs:/"):
    raise UserError(
      f"workdir {workdir} must be a folder: mount the bucket (launch/gke/ does it with Cloud Storage FUSE)"
    )
  handle = lock(workdir)
  try:
    _check_kinds(workdir)
    check_same_run(workdir, config, tokenizer)
    steps.check_not_lost(workdir / "checkpoints")
  except UserError:
    unlock(handle)  # this start ends cleanly
    raise
  return handle


def check_shared(workdir: pathlib.Path) -> None:
  """Checks that every process sees the workdir of process 0.

  Raises:
    UserError: this process does not.
  """
  if not (workdir / "lock").exists():
    raise UserError(
      f"workdir {workdir} is not shared: process 0 has locked it, process {jax.process_index()} does not see it"
    )


def _check_kinds(workdir: pathlib.Path) -> None:
  """Raises UserError where a file of the run is a folder, or a folder of the run is not one."""
  for name in (
    "config.json",
    "data.json",
    "metrics.jsonl",
    "goodput.jsonl",
    "goodput.json",
    "best.json",
    "remat.json",
    "wandb_id",
    "unsaved",
  ):
    if (workdir / name).exists() and not (workdir / name).is_file():
      raise UserError(f"{workdir / name} must be a file: move away what stands there")
  for name in ("checkpoints", "tokenizer", "samples", "profile", "tensorboard"):
    if os.path.lexists(workdir / name) and not (workdir / name).is_dir():
      raise UserError(f"{workdir / name} must be a folder: move away what stands there")


def lock(workdir: pathlib.Path) -> Any:
  """Locks the workdir against a second trainer until the process ends, however it ends."""
  path = workdir / "lock"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    handle = files.open_lock(path)
  except OSError as error:
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
      raise UserError(f"{path} must be a file and not a link: remove it") from error
    raise UserError(f"workdir {workdir} cannot be written: {error.strerror}") from error
  _wait_for_lock(handle, workdir)
  if before := _holder(handle):  # a trainer that ends cleanly leaves the file empty
    print(f"jflow: {before} did not end in order; this one goes on in {workdir}", file=sys.stderr)
  now = time.strftime("%Y-%m-%d %H:%M:%S")
  try:
    _empty(handle)
    handle.write(f"pid {os.getpid()} on {_machine()} since {now}\n")
    handle.flush()
  except OSError as error:
    raise UserError(f"workdir {workdir} cannot be written: {error.strerror}") from error
  return handle


def _empty(handle: Any) -> None:
  handle.seek(0)
  handle.truncate()


def _holder(handle: Any) -> str:
  """Returns the last holder of the lock, as one line; "" for none. The file may hold any text."""
  handle.seek(0)
  text = " ".join(handle.read(400).split())
  return "".join(c for c in text if c.isprintable())[:200]


def _machine() -> str:
  """An identity of this machine since its boot; a host name alone may move to another machine, as a pod's does."""
  boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
  return f"{os.uname().nodename} ({boot.read_text()[:8] if boot.exists() else 'no boot id'})"


def _wait_for_lock(handle: Any, workdir: pathlib.Path) -> None:
  """Locks an open file; waits while another host holds it, since a network disk frees a dead host's lock late."""
  until, said = time.monotonic() + _LEASE, False
  while True:
    try:
      if files.lock(handle):
        return
    except OSError as error:  # a file system without locks
      print(
        f"jflow: {workdir} cannot be locked ({error.strerror}): take care that no second trainer uses it",
        file=sys.stderr,
        flush=True,
      )
      return
    holder = _holder(handle) or "unknown"
    if _machine() in holder or time.monotonic() > until:
      raise UserError(f"workdir {workdir} is in use by another trainer ({holder})")
    if not said:
      print(f"jflow: {workdir} is held by {holder}; waiting up to {_LEASE} s for it", file=sys.stderr, flush=True)
    said = True
    time.sleep(1)


def unlock(handle: Any) -> None:
  """Unlocks the workdir of a trainer that ends cleanly."""
  _empty(handle)
  handle.close()


def check_same_run(workdir: pathlib.Path, config: RunConfig, tokenizer: Tokenizer) -> None:
  """Checks that the run in this workdir, if any, has the same config and tokenizer; some fields may differ.

  A lost config.json or tokenizer is taken from the newest manifest, and written again by `write_config`.

  Raises:
    UserError: fields differ, all of which the message names, or a file is damaged.
  """
  manifest = _newest_manifest(workdir)
  before = _config_of_run(workdir, manifest)
  if before is None:
    return
  theirs = dict(flat(_as_now(before, workdir)))
  ours = dict(flat(_read_back(config.to_dict())))
  may_change = _MAY_CHANGE
  if data_record.read(workdir) is not None:
    may_change += ("data.sources.",)  # names: their content is compared instead, see data_record
  differ = []
  for field in sorted(set(ours) | set(theirs)):
    before, now = theirs.get(field), ours.get(field)
    same = before == now if field in ours else not before  # a removed field that was off (0, empty) makes no difference
    if not same and not field.startswith(may_change):
      was = f"no {field} yet" if field not in theirs else f"{field}={before!r}"
      differ.append(f"{was}, now {'gone' if field not in ours else repr(now)}")
  if differ:
    raise UserError(
      f"workdir {workdir} holds a run with {'; '.join(differ)}: use another --workdir or the same "
      f"value{'s' * (len(differ) > 1)}"
    )
  kept, problem = workdir / "tokenizer", None
  try:
    if Tokenizer.load(str(kept)).fingerprint == tokenizer.fingerprint:
      return
  except UserError as error:
    problem = str(error)
  mendable = not kept.is_symlink() and not any(path.is_dir() for path in kept.glob("*"))
  if manifest.get("tokenizer") == tokenizer.fingerprint and mendable:
    print(f"jflow: {kept} is not as the run left it: it is written again", file=sys.stderr)
  elif problem:
    raise UserError(
      f"workdir {workdir} has lost its tokenizer ({problem}): bring back the run's tokenizer.json and "
      "tokenizer_config.json"
    )
  else:
    raise UserError(
      f"workdir {workdir} holds a run with another tokenizer than {config.data.tokenizer}; use another "
      f"--workdir or --config.data.tokenizer={kept}"
    )


def own_tokenizer(workdir: pathlib.Path) -> pathlib.Path | None:
  """Returns the run's copy of its tokenizer; None where it is not the one of the newest checkpoint, or there is
  none."""
  kept, wanted = workdir / "tokenizer", _newest_manifest(workdir).get("tokenizer")
  try:
    return kept if wanted and Tokenizer.load(str(kept)).fingerprint == wanted else None
  except UserError:
    return None


def _as_now(values: dict[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
  """Converts the plain values of a run's config, perhaps of an earlier version, to this version's fields."""
  try:
    model = ModelConfig.from_dict(values["model"]).to_dict()
  except UserError as error:
    raise UserError(f"workdir {workdir} holds a run with another model: {error}") from None
  if isinstance(log := values.get("log"), Mapping):  # of sample pictures alone, and of codes more than they have
    values = values | {"log": {name: x for name, x in log.items() if name not in ("sample_steps", "sample_guidance")}}
  return _read_back(completed(renamed(values), RunConfig) | {"model": model})


def _read_back(values: dict[str, Any]) -> dict[str, Any]:
  """Returns the values as they are after JSON: lists for tuples."""
  return json.loads(json.dumps(values))


def _newest_manifest(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the newest readable manifest; empty where there is none."""
  for step in steps.sealed_steps(workdir / "checkpoints"):
    with contextlib.suppress(OSError, Malformed):
      return files.read_object(workdir / "checkpoints" / str(step) / steps.MANIFEST)
  return {}


def _config_of_run(workdir: pathlib.Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
  """Returns the config of the run in this workdir, from config.json or else a manifest; None without a run."""
  path, problem = workdir / "config.json", "is missing"
  try:
    if path.exists():
      return read_config(workdir)
  except UserError as error:
    problem = str(error).removeprefix(f"{path} ")
  if isinstance(manifest.get("config"), dict):
    print(f"jflow: {path} {problem}; the run's config is taken from its newest checkpoint", file=sys.stderr)
    return manifest["config"]
  if steps.sealed_steps(workdir / "checkpoints"):
    raise UserError(f"{path} {problem}, and no checkpoint holds the run's config: bring back a copy of the file")
  steps.check_not_lost(workdir / "checkpoints")  # nothing is saved yet, so any config may start
  return None


def write_config(workdir: pathlib.Path, config: RunConfig, tokenizer: Tokenizer) -> None:
  """Writes tokenizer/, then config.json, which marks the workdir as this run's: by then both are complete."""
  try:
    same = Tokenizer.load(str(workdir / "tokenizer")).fingerprint == tokenizer.fingerprint
  except UserError:
    same = False
  if not same:
    tokenizer.save(str(workdir / "tokenizer"))
  files.write_text(workdir / "config.json", json.dumps(config.to_dict(), indent=1) + "\n")


def versions() -> dict[str, str]:
  """Versions of the packages that a checkpoint depends on."""
  return {"jax": jax.__version__, "python": sys.version.split()[0]}
