"""The workdir of a run: one trainer at a time, one config, and where its code came from."""

import contextlib
import json
import os
import pathlib
import sys
import time
from typing import Any

import jax

from jflow import files
from jflow.config import RunConfig
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.interop import steps
from jflow.interop.native import read_config
from jflow.models.config import ModelConfig
from jflow.sections import completed, flat
from jflow.strict_json import Malformed
from jflow.training import data_record

# What may differ between a run and its continuation: all else would make it another run. How a step is laid out over
# devices and memory changes losses by rounding alone, another attention kernel by what that kernel rounds.
_MAY_CHANGE = (
  "size",  # a name; what it stands for is compared
  "train.steps",
  "train.watchdog_seconds",
  "train.init_fresh",
  "train.init_dropped",
  "checkpoint.",
  "distributed.",
  "log.",
  "objective.logged",
  "profile.",
  "mesh.",
  "train.accumulation",
  "compute.remat",
  "compute.attention",
  "compute.unroll",
  "compute.compilation_cache",
  "data.workers",
  "data.threads",
  "data.prefetch",
  "data.plan_cache",
  "data.tokenizer",  # a path; its files are compared instead
)

_LEASE = 120  # seconds after which a network disk has freed the lock of a host that died


def claim(workdir: pathlib.Path, config: RunConfig, tokenizer: Tokenizer) -> Any:
  """Locks the workdir and checks that it holds no other run; returns what `unlock` takes. For process 0."""
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
    unlock(handle)  # this start ends in order
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
  """Raises UserError where a folder stands in place of a file of the run, or no folder in place of one."""
  for name in ("config.json", "data.json", "metrics.jsonl", "goodput.jsonl", "goodput.json", "wandb_id", "unsaved"):
    if (workdir / name).exists() and not (workdir / name).is_file():
      raise UserError(f"{workdir / name} must be a file: move away what stands there")
  for name in ("checkpoints", "tokenizer", "samples", "profile", "tensorboard"):
    if os.path.lexists(workdir / name) and not (workdir / name).is_dir():
      raise UserError(f"{workdir / name} must be a folder: move away what stands there")


def lock(workdir: pathlib.Path) -> Any:
  """Holds the workdir against a second trainer until the process ends, however it ends."""
  path = workdir / "lock"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    handle = files.open_lock(path)
  except OSError as error:
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
      raise UserError(f"{path} must be a file, and no link: remove it") from error
    raise UserError(f"workdir {workdir} cannot be written: {error.strerror}") from error
  _wait_for_lock(handle, workdir)
  if before := _holder(handle):  # a trainer that ends in order leaves the file empty
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
  """Who wrote the lock last, as one line; "" for none. The file may hold anything."""
  handle.seek(0)
  text = " ".join(handle.read(400).split())
  return "".join(c for c in text if c.isprintable())[:200]


def _machine() -> str:
  """This machine since it was started; a name alone passes to another one, as that of a pod does."""
  boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
  return f"{os.uname().nodename} ({boot.read_text()[:8] if boot.exists() else 'no boot id'})"


def _wait_for_lock(handle: Any, workdir: pathlib.Path) -> None:
  """Locks an open file; waits for one that another host holds, since a network disk frees a dead host's late."""
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
  """Frees the workdir: this trainer ends by itself."""
  _empty(handle)
  handle.close()


def check_same_run(workdir: pathlib.Path, config: RunConfig, tokenizer: Tokenizer) -> None:
  """Checks that a run that has begun in this workdir has the same config and tokenizer; some fields may differ.

  A config.json or tokenizer that is lost is known by the newest manifest, and written again by `write_config`.

  Raises:
    UserError: naming every field that differs, or what is damaged.
  """
  manifest = _newest_manifest(workdir)
  before = _config_of_run(workdir, manifest)
  if before is None:
    return
  theirs = dict(flat(_as_now(before, workdir)))
  ours = dict(flat(_read_back(config.to_dict())))
  may_change = _MAY_CHANGE
  if data_record.read(workdir) is not None:
    may_change += ("data.sources.",)  # names: what they hold is compared instead, see data_record
  differ = []
  for field in sorted(set(ours) | set(theirs)):
    before, now = theirs.get(field), ours.get(field)
    same = before == now if field in ours else not before  # a field that jflow no longer has was off (0, empty)
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


def _as_now(values: dict[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
  """The plain values of a run's config, which an earlier version may have written, with the fields of this one."""
  try:
    model = ModelConfig.from_dict(values["model"]).to_dict()
  except UserError as error:
    raise UserError(f"workdir {workdir} holds a run with another model: {error}") from None
  return _read_back(completed(values, RunConfig) | {"model": model})


def _read_back(values: dict[str, Any]) -> dict[str, Any]:
  """The values as config.json gives them back: lists for tuples."""
  return json.loads(json.dumps(values))


def _newest_manifest(workdir: pathlib.Path) -> dict[str, Any]:
  """The newest manifest that can be read; empty where there is none."""
  for step in steps.sealed_steps(workdir / "checkpoints"):
    with contextlib.suppress(OSError, Malformed):
      return files.read_object(workdir / "checkpoints" / str(step) / steps.MANIFEST)
  return {}


def _config_of_run(workdir: pathlib.Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
  """The config of the run that has begun here, by config.json or else by a manifest; None if none has."""
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
  steps.check_not_lost(workdir / "checkpoints")  # nothing is saved yet: there is nothing to be true to
  return None


def write_config(workdir: pathlib.Path, config: RunConfig, tokenizer: Tokenizer) -> None:
  """Writes tokenizer/, then config.json: from here on the workdir belongs to this run, and both are whole."""
  try:
    same = Tokenizer.load(str(workdir / "tokenizer")).fingerprint == tokenizer.fingerprint
  except UserError:
    same = False
  if not same:
    tokenizer.save(str(workdir / "tokenizer"))
  files.write_text(workdir / "config.json", json.dumps(config.to_dict(), indent=1) + "\n")


def versions() -> dict[str, str]:
  """Versions of what a checkpoint depends on."""
  return {"jax": jax.__version__, "python": sys.version.split()[0]}
