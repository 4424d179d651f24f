"""The step folders of a run: which exist, which are complete, and which may be deleted.

  checkpoints/STEP/             as checkpoint.py writes it, manifest.json last
  checkpoints/STEP.unfinished   a mark: STEP is being written or deleted, and may be removed
  unsaved                       beside `checkpoints`: no checkpoint of this run is complete yet

A step with neither a manifest nor a mark was complete once, so it is never deleted. A run that has lost all its
checkpoints is an error and never starts over.
"""

import contextlib
import os
import pathlib
import re
import shutil

from jflow import files
from jflow.errors import UserError
from jflow.strict_json import Malformed

MANIFEST = "manifest.json"
_STEP = re.compile("0|[1-9][0-9]{0,9}")
_LARGEST = 2**31 - 1  # a step is an int32
_UNSAVED = "unsaved"
_UNFINISHED = ".unfinished"
_TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a step while Orbax writes it


def number(name: str) -> int | None:
  """The step of a folder's name; None for a name that jflow would not write (007, other digits)."""
  return int(name) if _STEP.fullmatch(name) and int(name) <= _LARGEST else None


def damage(step_dir: pathlib.Path, part: int = 0, parts: int = 1) -> str | None:
  """The damage of a saved step in words, naming the file; None when every byte is as written.

  With `parts`, checks only every `parts`-th file, from number `part` on, the largest first.
  """
  try:
    manifest = files.read_object(step_dir / MANIFEST)["files"]
    entries = [(name, entry["bytes"], entry["sha256"]) for name, entry in manifest.items()]
    entries = sorted(entries, key=lambda entry: -entry[1])
  except FileNotFoundError:
    return f"it has no {MANIFEST}: the save did not finish, or the file was lost"
  except (ValueError, KeyError, TypeError, AttributeError):
    return f"{MANIFEST} is unreadable"
  if not entries:
    return f"{MANIFEST} lists no file"
  for name, size, digest in entries[part::parts]:
    path = step_dir / name
    try:
      if not path.is_file():
        return f"{name} is missing"
      if path.stat().st_size != size:
        return f"{name} holds {path.stat().st_size} bytes instead of {size}"
      if files.sha256(path) != digest:
        return f"{name} has changed since it was written (sha256 differs)"
    except OSError as error:
      return f"{name} cannot be read: {error.strerror}"
  return None


def steps_of(directory: pathlib.Path) -> list[int]:
  """The steps that have a folder, newest first, complete or not."""
  if not directory.is_dir():
    return []
  found = ((number(p.name), p) for p in directory.iterdir())
  return sorted((step for step, p in found if step is not None and p.is_dir()), reverse=True)


def sealed_steps(directory: pathlib.Path) -> list[int]:
  """The steps that have a manifest, newest first; does not verify their bytes."""
  return [step for step in steps_of(directory) if (directory / str(step) / MANIFEST).exists()]


def begin(workdir: pathlib.Path) -> None:
  """Marks the begin of a run without a complete checkpoint."""
  files.write_text(workdir / _UNSAVED, "No checkpoint of this run is complete yet; the first one removes this file.\n")


def check_not_lost(directory: pathlib.Path) -> None:
  """Checks that the workdir has no traces of a run whose checkpoints are gone. `directory`: its `checkpoints`.

  Raises:
    UserError: it has; the message names the traces and what to do.
  """
  workdir, shown = directory.parent, []
  if sealed_steps(directory):
    return
  for path in sorted(directory.iterdir()) if directory.is_dir() else ():
    step = any((path / name).exists() for name in (MANIFEST, "_CHECKPOINT_METADATA")) and _TEMPORARY not in path.name
    if (step or path.name.isdigit()) and not _mark(directory, path.name).exists():
      shown.append(f"{directory.name}/{path.name}")
  if not (workdir / _UNSAVED).exists():
    for name in ("metrics.jsonl", "goodput.jsonl"):
      path = workdir / name
      if path.is_dir() or (path.exists() and path.stat().st_size) or path.is_symlink():
        shown.append(name)
  if shown:
    named = ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")
    raise UserError(
      f"workdir {workdir} holds a run ({named}) and no complete checkpoint of it ({MANIFEST} in {directory.name}/STEP "
      f"is written last): bring back what is missing from a copy, or name another --workdir, or begin again after "
      f"`mv {workdir} {workdir}.old`; nothing was changed"
    )


def clean(directory: pathlib.Path) -> None:
  """Removes temporary folders of killed saves, and marks without a step."""
  for path in directory.glob(f"*{_TEMPORARY}*"):
    if number(path.name.split(_TEMPORARY)[0]) is not None and not path.is_symlink():
      shutil.rmtree(path, ignore_errors=True)
  for step in _marked(directory):
    if not os.path.lexists(directory / str(step)):
      _remove_mark(_mark(directory, step))


def make_room(directory: pathlib.Path, step: int) -> str | None:
  """Marks that a step is about to be written, and renames what is in its place.

  An unfinished save and a damaged step that was skipped are overwritten instead.

  Returns:
    A message about the renaming, or None.
  """
  path, said = directory / str(step), None
  known = _mark(directory, step).exists() or _has_manifest(path)
  if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or not known):
    said = f"{path} is not what this run saved: it is now {files.set_aside(path, 'replaced').name}, remove it at will"
  _write_mark(directory, step)
  return said


def complete(directory: pathlib.Path, step: int) -> None:
  """Removes the mark of a step, whose manifest is on the disk now."""
  _remove_mark(_mark(directory, step))
  _remove_mark(directory.parent / _UNSAVED)


def retain(directory: pathlib.Path, saved: int, keep: int, keep_every: int, best: int | None = None) -> dict[int, str]:
  """Deletes complete steps except the newest `keep` up to `saved`, multiples of `keep_every`, and `best`.

  Later steps are damaged and do not count. Remains of killed saves and deletions are deleted too. Of a step that is a
  link, only the link is deleted.

  Returns:
    Step -> message: a link was removed, or the step could not be deleted.
  """
  sealed = sealed_steps(directory)
  left = [step for step in _marked(directory) if step < saved and step not in sealed]
  old = [step for step in sealed if step <= saved and step != best][keep:]
  told = {}
  for step in left + [step for step in old if not (keep_every and step % keep_every == 0)]:
    if note := _delete(directory, step):
      told[step] = note
  return told


def _delete(directory: pathlib.Path, step: int) -> str | None:
  path = directory / str(step)
  try:
    if path.is_symlink():
      target = os.readlink(path)
      path.unlink()
      return f"the link {path} is removed, as an old step; {target} is as it was"
    if os.path.ismount(path):
      return f"the old step {path} is a mount point and stays"
    _write_mark(directory, step)
    (path / MANIFEST).unlink(missing_ok=True)  # first: a half-deleted step is not a complete one
    files.remove(path)
    _remove_mark(_mark(directory, step))
    return None
  except OSError as error:
    return f"the old step {path} could not be deleted ({error.strerror or error}): delete it by hand"


def _mark(directory: pathlib.Path, step: int | str) -> pathlib.Path:
  return directory / f"{step}{_UNFINISHED}"


def _write_mark(directory: pathlib.Path, step: int) -> None:
  files.write_text(_mark(directory, step), f"Step {step} is being written or deleted: it may be removed.\n")


def _remove_mark(mark: pathlib.Path) -> None:
  with contextlib.suppress(IsADirectoryError):  # a folder of someone else
    mark.unlink(missing_ok=True)


def _marked(directory: pathlib.Path) -> list[int]:
  """The steps that have a mark."""
  found = (p for p in directory.iterdir() if p.name.endswith(_UNFINISHED) and p.is_file())
  return [step for p in found if (step := number(p.name.removesuffix(_UNFINISHED))) is not None]


def _has_manifest(step_dir: pathlib.Path) -> bool:
  """Whether a manifest exists and can be read."""
  try:
    return bool(files.read_object(step_dir / MANIFEST))
  except (OSError, Malformed):
    return False
