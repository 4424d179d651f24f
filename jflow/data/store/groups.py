"""A plan by groups of shards, each planned alone: of any number of records in little memory, on all cores.

Each part (parts.py) is measured and planned by one process and kept in a file, so that a start after a kill goes on;
the files are joined into the arrays of a plan. A row holds records of one group alone.
"""

import collections
import concurrent.futures
import concurrent.futures.process
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from jflow import files
from jflow.batch import RowShape
from jflow.data import held_out, packing
from jflow.data.packing import Plan
from jflow.data.processes import end_with_parent
from jflow.data.records import Source
from jflow.data.store import derived, lengths, parts
from jflow.data.store.parts import Part
from jflow.data.tokenizer import Tokenizer
from jflow.errors import Stopped
from jflow.progress import Progress

# To be raised when other groups or rows come of the same lengths.
VERSION = 1
# The order among records of one size. A run's own seed shuffles the rows, not the plan, which all runs share.
_SEED = 0
_FIELDS = (*Plan._fields, "groups")
_Given = tuple[np.ndarray, collections.Counter]  # lengths of a part, and the counts of records left out
_Work = tuple[Part, str, _Given | None]  # a part, its file, and its lengths where they are known


class Wanted(NamedTuple):
  """The choices that determine a plan; see `plans.planned`. Picklable."""

  source: Source
  task: str
  tokenizer: Tokenizer
  template: str
  shape: RowShape
  cache: str
  caption_prompt: str
  validation: float
  side: str
  group_records: int

  def plan(self) -> tuple[Plan, collections.Counter]:
    """The plan of all records at once, and the counts of those left out."""
    sizes, rejected = self.sizes()
    return self.plan_of(sizes), rejected

  def sizes(self, part: Part | None = None) -> tuple[np.ndarray, collections.Counter]:
    """Tokens and images of all records, or of a part's, int32[N, 2]; 0 where a record gets no row; counts of those."""
    sizes, rejected = lengths.measure(
      self.source,
      self.task,
      self.tokenizer,
      self.template,
      self.shape.patches_of(self.task),
      self.shape.writer,
      self.cache,
      self.caption_prompt,
      part,
    )
    if self.validation:
      held = held_out.held_out(self.source, self.validation, part)
      sizes[held != (self.side == held_out.VALIDATION)] = 0
    if self.task != "text":
      too_long = (sizes[:, 0] > self.shape.tokens) | (sizes[:, 1] > self.shape.images)
      rejected.update(too_long=int(too_long.sum()))
    return sizes, +rejected

  def plan_of(self, sizes: np.ndarray) -> Plan:
    """The plan of records of these sizes."""
    if self.task == "text":
      return packing.plan_documents(sizes[:, 0], self.shape.tokens, _SEED)
    return packing.plan(sizes, self.shape, _SEED)


def write(wanted: Wanted, folder: str, kept: str | None) -> collections.Counter:
  """Writes the arrays of a plan by groups into a folder, and groups.npy; returns the counts of records left out.

  Args:
    wanted: see `Wanted`.
    folder: empty.
    kept: folder where finished parts wait for the others, also over a kill, and stay; None: none.
  """
  inside = os.path.join(folder, "parts")
  paths = make_parts(wanted, kept or inside)
  rejected = sum((_join(paths, field, folder) for field in _FIELDS), collections.Counter())
  files.remove(inside)
  return rejected


def make_parts(wanted: Wanted, kept: str, enough: Callable[[], object] = lambda: False) -> list[str]:
  """Plans the parts that are missing; returns their files in order.

  Several machines may do it at once: each takes the parts in an order of its own, and none that another is at.

  Args:
    wanted: see `Wanted`.
    kept: folder of the files.
    enough: whether to stop, since another machine has the plan.
  """
  most = max(parts.PART_RECORDS, wanted.group_records)
  shards = parts.lengths_of(wanted.source, wanted.group_records or most)
  todo = parts.parts(shards, most)
  os.makedirs(kept, exist_ok=True)
  paths = [os.path.join(kept, f"{i:05d}-of-{len(todo):05d}.npz") for i in range(len(todo))]
  given: list[_Given | None] = [None] * len(todo)
  if len(wanted.source) <= parts.MOST_AT_ONCE:
    sizes, rejected = wanted.sizes()
    given = [(sizes[part.first : part.stop], collections.Counter()) for part in todo]
    given[:1] = [(sizes, rejected) for sizes, _ in given[:1]]  # counted once
  work = list(zip(todo, paths, given, strict=True))
  made = _in_processes if len(todo) > 1 else _here
  with Progress(len(wanted.source), 0, f"plan {wanted.task}", delay=2) as bar:
    for records in made(wanted, shards, work):
      bar.count(records)
      if enough():
        break
  return paths


def _here(wanted: Wanted, shards: list[int], work: list[_Work]) -> Iterator[int]:
  """Makes the parts in this process; yields the records of each."""
  for part in work:
    yield _make_part(wanted, shards, *part)


def _in_processes(wanted: Wanted, shards: list[int], work: list[_Work]) -> Iterator[int]:
  """Makes the parts, a process per core; yields the records of each."""
  count = min(os.cpu_count() or 1, len(work))
  work = random.SystemRandom().sample(work, len(work))
  # Threads of the parent would not survive a fork.
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(count, context, _begin, (wanted, shards)) as pool:
    try:
      yield from pool.map(_make_given_part, work)
    except GeneratorExit:
      pool.shutdown(cancel_futures=True)
      raise
    except concurrent.futures.process.BrokenProcessPool:
      raise Stopped(f"a process that planned {wanted.task} was killed (out of memory?): start again") from None


_shared: tuple[Wanted, list[int]]  # of a process of `_in_processes`


def _begin(wanted: Wanted, shards: list[int]) -> None:
  global _shared
  end_with_parent()
  _shared = wanted, shards


def _make_given_part(work: _Work) -> int:
  return _make_part(*_shared, *work)


def _make_part(wanted: Wanted, shards: list[int], part: Part, path: str, given: _Given | None) -> int:
  """Plans a part, unless it is there, of lengths that are given or measured now; returns its records."""
  folder, file = os.path.split(path)
  if not _is_whole(path):
    with derived.alone([folder], file):
      if not _is_whole(path):  # another machine may just have made it
        _write_part(wanted, shards, part, path, *(given or wanted.sizes(part)))
  return part.stop - part.first


def _write_part(
  wanted: Wanted, shards: list[int], part: Part, path: str, sizes: np.ndarray, rejected: collections.Counter
) -> None:
  """Plans the groups of a part and writes them atomically, with the numbers that records have in the source."""
  groups = [part]
  if wanted.group_records:
    inside = shards[part.first_shard : part.stop_shard]
    groups = parts.parts(inside, wanted.group_records, part.first, part.first_shard)
  ids = packing.index_type(len(wanted.source))
  plans = [wanted.plan_of(sizes[group.first - part.first : group.stop - part.first]) for group in groups]
  arrays = Plan(
    np.concatenate([[0], *(np.diff(plan.row_offsets) for plan in plans)]).cumsum(),
    np.concatenate([plan.record_ids.astype(ids) + ids(group.first) for group, plan in zip(groups, plans)]),
    np.concatenate([plan.starts for plan in plans]),
    np.concatenate([plan.stops for plan in plans]),
  )._asdict()
  begins = np.cumsum([0, *(plan.rows for plan in plans)])[:-1]
  arrays["groups"] = begins[[plan.rows > 0 for plan in plans]]
  arrays["reasons"] = np.array(list(rejected), np.str_)
  arrays["counts"] = np.array(list(rejected.values()), np.int64)
  with files.replacing(path) as new, open(new, "wb") as file:
    np.savez(file, **arrays)


def _is_whole(path: str) -> bool:
  """Whether the file of a part is there and undamaged."""
  try:
    with np.load(path) as arrays:
      return all(len(arrays[name]) >= 0 for name in (*_FIELDS, "reasons", "counts"))
  except Exception:  # damage to a zip file raises many types
    return False


def _join(paths: list[str], field: str, folder: str) -> collections.Counter:
  """Joins one array of all parts in a file, a part at a time; returns the counts of the records left out, once."""
  rejected: collections.Counter = collections.Counter()
  with open(os.path.join(folder, field + ".npy"), "wb") as file:
    total = added = 0
    for path in paths:
      with np.load(path) as arrays:
        array, pieces = arrays[field], arrays["row_offsets"]
        if field == "row_offsets":
          array, added = array[min(total, 1) :] + added, added + int(pieces[-1])
          rejected.update(derived.counts(dict(zip(arrays["reasons"].tolist(), arrays["counts"].tolist(), strict=True))))
        elif field == "groups":
          array, added = array + added, added + len(pieces) - 1
      if not file.tell():
        _write_header(file, array.dtype, 0)  # of the same size for any length, so that it can be written again
      file.write(np.ascontiguousarray(array).data)
      total += len(array)
    file.seek(0)
    _write_header(file, array.dtype, total)
  return rejected


def _write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
  header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
  np.lib.format.write_array_header_1_0(file, header)
