"""The packing plan of a source, made once, cached (derived.py), and memory-mapped by all processes.

A plan is a folder `plan-HASH`: the arrays of `packing.Plan` as .npy files, and plan.json with their checksums and the
counts of records left out. HASH covers the records, the tokenizer, the template and the row's budgets.
"""

import collections
import contextlib
import os
import shutil
import uuid
import zlib
from typing import Any, NamedTuple

import numpy as np

from jflow import files
from jflow.batch import RowShape
from jflow.data import held_out, packing
from jflow.data.examples import CAPTION_PROMPT
from jflow.data.packing import Plan
from jflow.data.records import Source
from jflow.data.store import derived, lengths
from jflow.data.tokenizer import Tokenizer

# To be raised when packing.py plans other rows.
_VERSION = 1
# The order among records of one size. A run's own seed shuffles the rows, not the plan, which all runs share.
_SEED = 0


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
  """
  folders = derived.places(source, cache)
  budgets = (shape.tokens, shape.images, shape.patches_of(task))
  if task == "generation" and shape.writer != "flow":  # plans cached by versions without a choice stay valid
    budgets += (shape.writer,)
  if task == "understanding" and caption_prompt != CAPTION_PROMPT:
    budgets += (caption_prompt,)
  if validation:
    budgets += (side, validation, held_out.VERSION)
  file = derived.name(
    "plan", _VERSION, getattr(source, "fingerprint", ""), task, tokenizer.fingerprint, template, budgets
  )
  found = _read(folders, file, len(source))
  if found is None:
    with derived.alone(folders, file) as path:
      found = _read(folders, file, len(source))
      if found is None:
        wanted = None
        if validation:
          wanted = held_out.held_out(source, validation) == (side == held_out.VALIDATION)
        found = _plan(source, task, tokenizer, template, shape, cache, caption_prompt, wanted)
        if path and _write(path, found):
          found = _read(folders, file, len(source)) or found
  return found


def _plan(
  source: Source,
  task: str,
  tokenizer: Tokenizer,
  template: str,
  shape: RowShape,
  cache: str,
  caption_prompt: str,
  wanted: np.ndarray | None,
) -> Planned:
  """Makes a plan; `wanted`: bool[N], the records that get a row; None: all."""
  sizes, rejected = lengths.measure(
    source, task, tokenizer, template, shape.patches_of(task), shape.writer, cache, caption_prompt
  )
  if wanted is not None:
    sizes[~wanted] = 0
  if task == "text":
    plan = packing.plan_documents(sizes[:, 0], shape.tokens, _SEED)
  else:
    too_long = (sizes[:, 0] > shape.tokens) | (sizes[:, 1] > shape.images)
    rejected.update(too_long=int(too_long.sum()))
    plan = packing.plan(sizes, shape, _SEED)
  return Planned(plan, len(source), _tokens(plan), +rejected)


def _read(folders: list[str], file: str, records: int) -> Planned | None:
  """Returns the cached plan; None where there is none, or it was damaged and has been removed."""
  path = derived.find(folders, file)
  if path is None:
    return None
  try:
    header = files.read_object(os.path.join(path, "plan.json"))
    plan = _map(path)
    if header["checksums"] == _checksums(plan) and header["records"] == records and _fits(plan, records):
      return Planned(plan, records, _tokens(plan), derived.counts(header["rejected"]))
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
    and bool((np.diff(offsets) >= 0).all())
    and (not len(plan.record_ids) or 0 <= plan.record_ids.min() <= plan.record_ids.max() < records)
  )


def _tokens(plan: Plan) -> int:
  """The number of tokens in all rows; a piece that continues a document has a BOS of its own."""
  return int((plan.stops - plan.starts).sum(dtype=np.int64) + (plan.starts > 0).sum())


def _write(path: str, found: Planned) -> bool:
  """Writes a folder atomically; returns False where it cannot be written."""
  temporary = f"{path}.{uuid.uuid4().hex}"
  try:
    os.mkdir(temporary)
    for field, array in zip(Plan._fields, found.plan):
      np.save(os.path.join(temporary, field + ".npy"), array)
    header: dict[str, Any] = found._asdict() | {"checksums": _checksums(found.plan)}
    header.pop("plan")
    files.write_json(os.path.join(temporary, "plan.json"), header)
    files.remove(path)  # a link to nowhere, or what could not be removed when it was read
    files.publish(temporary, path)
    return True
  except OSError:
    shutil.rmtree(temporary, ignore_errors=True)
    return False


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
