"""The packing plan of a source, made once, cached (derived.py), and memory-mapped by all processes.

A plan is a folder `plan-HASH`: the arrays of `packing.Plan` as .npy files, and plan.json with their checksums and the
counts of records left out. HASH covers the records, the tokenizer, the template and the row's budgets. A plan by groups
(groups.py) also has groups.npy.
"""

import collections
import contextlib
import os
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jflow import files
from jflow.batch import RowShape
from jflow.data import held_out, packing
from jflow.data.examples import CAPTION_PROMPT
from jflow.data.packing import Plan
from jflow.data.records import Source
from jflow.data.store import derived, groups, parts
from jflow.data.store.groups import Wanted
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError

# To be raised when packing.py plans other rows.
_VERSION = 1
_PARTS = ".parts"  # of the folder of finished parts, behind the plan's name


class MappedPlan(Plan):
  """A plan whose arrays are memory-mapped files. Pickling sends the path, so that loader processes share the pages."""

  path: str

  def __reduce__(self):
    return _map, (self.path,)


class Planned(NamedTuple):
  """A plan, with the counts of records left out."""

  plan: Plan
  records: int
  tokens: int  # in all rows; the rest is padding
  rejected: collections.Counter  # reason -> records that no row has; "too_long" fit none
  groups: np.ndarray | None = None  # int64[groups]; the first row of each group of shards; None: planned at once

  def fill(self, row_tokens: int) -> float:
    """Share of the rows' slots that are not padding."""
    return self.tokens / max(self.plan.rows * row_tokens, 1)


def planned(
  source: Source,
  task: str,
  tokenizer: Tokenizer,
  template: str,
  shape: RowShape,
  cache: str,
  caption_prompt: str = CAPTION_PROMPT,
  validation: float = 0.0,
  side: str = held_out.TRAINING,
  group_records: int = 0,
) -> Planned:
  """Returns the plan of a source, from the cache or newly made.

  Documents (task "text") are cut where a row ends. Any other sample longer than a row, or with more images, is
  left out and counted as "too_long".

  Args:
    source: the records.
    task: "understanding", "generation" or "text".
    tokenizer: see `Tokenizer`.
    template: see `examples.build`.
    shape: the row's budgets.
    cache: folder for plans that cannot be kept beside the records; empty: none.
    caption_prompt: see `examples.build`.
    validation: share of the records that are held out.
    side: of held_out.py, whose records are planned.
    group_records: records of a group of shards at most, each of whose rows holds records of that group alone; 0:
      groups as large as memory allows, one of all records where they are few, or where their plan is kept so.

  Raises:
    UserError: a plan of so many records must be kept in a folder, and there is none.
  """
  folders = derived.places(source, cache)
  budgets = (shape.tokens, shape.images, shape.patches_of(task))
  if task == "generation" and shape.writer != "flow":  # plans cached by versions without a choice stay valid
    budgets += (shape.writer,)
  if task == "understanding" and caption_prompt != CAPTION_PROMPT:
    budgets += (caption_prompt,)
  if validation:
    budgets += (side, validation, held_out.VERSION)
  key = (getattr(source, "fingerprint", ""), task, tokenizer.fingerprint, template, budgets)
  wanted = Wanted(source, task, tokenizer, template, shape, cache, caption_prompt, validation, side, group_records)
  file = derived.name("plan", _VERSION, *key)
  if group_records or len(source) > parts.MOST_AT_ONCE and not derived.find(folders, file):
    file = derived.name("plan", _VERSION, *key, ("groups", groups.VERSION, group_records))
    make = _plan_groups
  else:
    make = _plan_at_once
  found = _read(folders, file, len(source))
  if found is None:
    if make is _plan_groups and len(source) > parts.MOST_AT_ONCE:
      _help(wanted, folders, file)
    with derived.alone(folders, file) as path:
      found = _read(folders, file, len(source)) or make(wanted, path, folders)
      if path:
        shutil.rmtree(path + _PARTS, ignore_errors=True)
  return found


def _help(wanted: Wanted, folders: list[str], file: str) -> None:
  """Plans parts beside all other machines that want the plan, in the first folder that can be written."""
  for folder in folders:
    with contextlib.suppress(OSError):  # told where the plan is written
      groups.make_parts(wanted, os.path.join(folder, file + _PARTS), lambda: derived.find(folders, file))
      return


def _plan_at_once(wanted: Wanted, path: str | None, folders: list[str]) -> Planned:
  """Makes a plan of all records and keeps it at `path` if that can be written."""
  plan, rejected = wanted.plan()
  found = Planned(plan, len(wanted.source), packing.tokens(plan), rejected)

  def write(temporary: str) -> Planned:
    for field, array in zip(Plan._fields, plan):
      np.save(os.path.join(temporary, field + ".npy"), array)
    return found

  return path and _write(path, write) and _read(folders, os.path.basename(path), found.records) or found


def _plan_groups(wanted: Wanted, path: str | None, folders: list[str]) -> Planned:
  """Makes a plan of groups part by part; in a folder of its own where there is no `path` to keep it at."""
  records = len(wanted.source)
  large = records > parts.MOST_AT_ONCE

  def write(temporary: str) -> Planned:
    rejected = groups.write(wanted, temporary, path + _PARTS if path and large else None)
    plan = _map(temporary)
    return Planned(plan, records, packing.tokens(plan), rejected, np.load(os.path.join(temporary, "groups.npy")))

  if path and _write(path, write) and (found := _read(folders, os.path.basename(path), records)):
    return found
  if large:
    places = " or ".join(folders) or "no folder, since data.plan_cache is empty"
    raise UserError(
      f"the plan of {records:,} records must be kept on disk, some 30 bytes each, and cannot be written to {places}: "
      "set --config.data.plan_cache to a folder with room"
    )
  with tempfile.TemporaryDirectory() as temporary:
    found = write(temporary)
    return found._replace(plan=Plan(*map(np.array, found.plan)))


def _read(folders: list[str], file: str, records: int) -> Planned | None:
  """Returns the cached plan; None where there is none, or it was damaged and has been removed."""
  path = derived.find(folders, file)
  if path is None:
    return None
  try:
    header = files.read_object(os.path.join(path, "plan.json"))
    plan = _map(path)
    begins = None
    if "groups" in header:
      begins = np.load(os.path.join(path, "groups.npy"))
      if header["groups"] != zlib.crc32(np.ascontiguousarray(begins)) or not _are_groups(begins, plan.rows):
        raise ValueError("not groups of these rows")
    if header["checksums"] == _checksums(plan) and header["records"] == records and _fits(plan, records):
      return Planned(plan, records, packing.tokens(plan), derived.counts(header["rejected"]), begins)
  except Exception:  # damage to an array's header raises many types; the plan is made again
    pass
  with contextlib.suppress(OSError):
    files.remove(path)
  return None


def _fits(plan: Plan, records: int) -> bool:
  """Whether the arrays are a valid plan of so many records, since checksums do not cover types and shapes."""
  offsets, *columns = plan
  return (
    all(array.ndim == 1 and array.dtype.kind == "i" for array in plan)
    and len({len(column) for column in columns}) == 1
    and len(offsets) > 0
    and offsets[0] == 0
    and offsets[-1] == len(plan.record_ids)
    and all((np.diff(offsets[s.start : s.stop + 1]) >= 0).all() for s in packing.slices(len(offsets)))
    and all(0 <= ids.min() <= ids.max() < records for ids in map(plan.record_ids.__getitem__, plan.slices()))
  )


def _are_groups(begins: np.ndarray, rows: int) -> bool:
  """Whether an array holds the first row of each group, of which none is empty."""
  if begins.ndim != 1 or begins.dtype != np.int64 or bool(len(begins)) != bool(rows):
    return False
  return not rows or begins[0] == 0 and bool((np.diff(begins, append=rows) > 0).all())


def _write(path: str, write: Callable[[str], Planned]) -> bool:
  """Writes a folder atomically, its arrays by `write`; returns False where it cannot be written."""
  temporary = f"{path}.{uuid.uuid4().hex}"
  try:
    os.mkdir(temporary)
    header: dict[str, Any] = (found := write(temporary))._asdict() | {"checksums": _checksums(found.plan)}
    header.pop("plan")
    if header.pop("groups") is not None:
      header["groups"] = zlib.crc32(np.ascontiguousarray(found.groups))
    files.write_json(os.path.join(temporary, "plan.json"), header)
    files.remove(path)  # a link to nowhere, or what could not be removed when it was read
    files.publish(temporary, path)
    return True
  except OSError:
    return False
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _map(path: str) -> MappedPlan:
  paths = [os.path.join(path, field + ".npy") for field in Plan._fields]
  if not all(map(os.path.isfile, paths)):  # opening a pipe would wait for its writer
    raise FileNotFoundError(path)
  arrays = (np.load(file, mmap_mode="r") for file in paths)
  plan = MappedPlan(*(array.view(np.ndarray) for array in arrays))
  plan.path = path
  return plan


def _checksums(plan: Plan) -> list[int]:
  return [zlib.crc32(np.ascontiguousarray(array)) for array in plan]
