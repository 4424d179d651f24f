"""bench data --hosts: what each host of a run reads, by counting the shards that the rows of its steps lie in.

The data sets are drawn as lengths (planning.py), planned and ordered as `train` would; nothing is decoded. A host keeps
whole shards in a cache, the least recently used removed first, as data/store/cache.py does.
"""

import collections
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jflow.batch import TASKS, RowShape
from jflow.config import DataConfig
from jflow.data import mixture, packing
from jflow.data.order import Blocks, Global, Order, Scattered
from jflow.perf.planning import SHARD, Drawn

# Bytes of a record in a shard: a JPEG of half a megapixel with its text, a document of 10 kB as gzip has it.
RECORD_BYTES = dict(understanding=100_000, generation=100_000, text=4_000)
_CHUNK = 64  # steps whose rows are looked up at once
_BITS = 42  # of the number of a shard, the upper two of which are its type


class Reads(NamedTuple):
  """The different shards that the rows of steps lie in, each once per step and host, by step, then by host."""

  step: np.ndarray  # int64[n]
  host: np.ndarray  # int64[n]
  shard: np.ndarray  # int64[n], the number of its type * 2**40 + its own
  records: np.ndarray  # int64[n] of that shard


class Simulated:
  """The rows of a run on drawn data sets, one per type, with their plans on disk."""

  def __init__(
    self,
    config: DataConfig,
    records: Mapping[str, int],
    shape: RowShape,
    batch_size: int,
    seed: int,
    drawn: int = 2**17,
  ):
    """Plans the rows.

    Args:
      config: mixture and order of the run; its sources are not opened.
      records: of each type.
      shape: the row's budgets.
      batch_size: rows of a batch over all hosts.
      seed: of the run.
      drawn: records whose lengths are drawn and planned, whole groups of them; the others are like these.
    """
    schedule = tuple((start, tuple(w * bool(records[t]) for w, t in zip(row, TASKS))) for start, row in config.mixture)
    self.batch_size, self._step_plan = batch_size, mixture.StepPlan(schedule, batch_size, 2**40)
    self._folder = tempfile.TemporaryDirectory()
    self._plans: list[packing.Plan | None] = []
    self._orders: list[Order | None] = []
    for number, task in enumerate(TASKS):
      plan = order = None
      if records[task]:
        plan, order = self._planned(number, records[task], config, shape, seed, drawn)
      self._plans.append(plan)
      self._orders.append(order)

  def _planned(
    self, number: int, records: int, config: DataConfig, shape: RowShape, seed: int, drawn: int
  ) -> tuple[packing.Plan, Order]:
    blocks = config.order == "blocks"
    copies = max(1, records // (max(1, drawn // config.block_records) * config.block_records))
    wanted = Drawn.of(TASKS[number], records // copies, shape, config.block_records if blocks else 0)
    folder = os.path.join(self._folder.name, TASKS[number])
    os.mkdir(folder)
    plan, begins = _repeated(*wanted.made(folder), records // copies, copies)
    seed = mixture.seed_of_part(mixture.seed_of_part(seed, number), 0)
    if begins is None or not blocks:
      return plan, (Global if plan.rows < 2**22 else Scattered)(plan.rows, seed, number)
    one = mixture.Interleave([1.0], 0)
    lanes = mixture.Lanes(self._step_plan, one, self.batch_size, config.block_lanes, number, 0)
    return plan, Blocks(begins, plan.rows, seed, number, config.block_window, config.block_lanes, lanes)

  @property
  def rows(self) -> dict[str, int]:
    """Rows of each type."""
    return {task: plan.rows for task, plan in zip(TASKS, self._plans, strict=True) if plan}

  def counts(self, step: int) -> dict[str, int]:
    """Returns the rows of each type of a step."""
    return self._step_plan.counts(step)

  def shards(self, start: int, stop: int, hosts: int) -> Iterator[Reads]:
    """Yields the reads of the steps [start, stop) in pieces, for a number of hosts that have equal shares of a
    batch."""
    for first in range(start, stop, _CHUNK):
      yield self._reads(range(first, min(first + _CHUNK, stop)), hosts)

  def _reads(self, steps: range, hosts: int) -> Reads:
    keys = []
    for number, (plan, order) in enumerate(zip(self._plans, self._orders, strict=True)):
      if plan is None or order is None:
        continue
      drawn = [
        ((at - steps.start) * hosts + place * hosts // self.batch_size, order(*divmod(row, plan.rows)))
        for at in steps
        for place, (task, row) in enumerate(self._step_plan[at])
        if task == number
      ]
      who, rows = np.array(drawn, np.int64).reshape(-1, 2).T
      begins, counts = plan.row_offsets[rows], plan.row_offsets[rows + 1] - plan.row_offsets[rows]
      pieces = np.repeat(begins - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
      keys.append(np.repeat(who, counts) << _BITS | plan.record_ids[pieces] // SHARD | number << _BITS - 2)
    found, records = np.unique(np.concatenate(keys), return_counts=True)
    who = found >> _BITS
    return Reads(who // hosts + steps.start, who % hosts, found & (1 << _BITS) - 1, records)


def _repeated(
  plan: packing.Plan, begins: np.ndarray | None, records: int, copies: int
) -> tuple[packing.Plan, np.ndarray | None]:
  """Returns the plan of so many times the records, and its groups; without groups a row's lie anywhere among them."""
  kinds = np.arange(copies)[:, None]
  offsets = (plan.row_offsets[:-1] + kinds * plan.row_offsets[-1]).ravel()
  ids = plan.record_ids * copies + kinds if begins is None else plan.record_ids + kinds * records
  whole = plan._replace(
    row_offsets=np.append(offsets, plan.row_offsets[-1] * copies),
    record_ids=ids.ravel().astype(packing.index_type(records * copies)),
  )
  return whole, None if begins is None else (begins + kinds * plan.rows).ravel()


class Hosts:
  """The caches of a run's hosts, and what they have read."""

  def __init__(self, count: int, cache_bytes: float):
    self._held: list[collections.OrderedDict[int, int]] = [collections.OrderedDict() for _ in range(count)]
    self._bytes, self._most = np.zeros(count, np.int64), cache_bytes
    self.records = self.read_bytes = self.shards = 0
    self.peak_bytes = 0

  def kept(self, hosts: Sequence[int]) -> "Hosts":
    """Returns some of the hosts with what lies in their caches, numbered anew in this order, and nothing read."""
    left = Hosts(len(hosts), self._most)
    left._held, left._bytes = [self._held[host] for host in hosts], self._bytes[list(hosts)]
    return left

  def read(self, reads: Reads) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Reads what a piece of `Simulated.shards` holds; yields (step, shards fetched, bytes fetched), int64[hosts]."""
    bytes_of = [RECORD_BYTES[task] for task in TASKS]
    edges = [0, *(np.flatnonzero(np.diff(reads.step)) + 1).tolist(), len(reads.step)]
    for first, stop in zip(edges, edges[1:]):
      fetched, moved = np.zeros(len(self._held), np.int64), np.zeros(len(self._held), np.int64)
      columns = (reads.host[first:stop], reads.shard[first:stop], reads.records[first:stop])
      for host, shard, records in zip(*(column.tolist() for column in columns)):
        each = bytes_of[shard >> _BITS - 2]
        self.records, self.read_bytes, self.shards = (
          self.records + records,
          self.read_bytes + records * each,
          self.shards + 1,
        )
        held = self._held[host]
        if shard in held:
          held.move_to_end(shard)
          continue
        size = each * SHARD
        while held and self._bytes[host] + size > self._most:
          self._bytes[host] -= held.popitem(last=False)[1]
        held[shard] = size
        self._bytes[host] += size
        fetched[host] += 1
        moved[host] += size
      self.peak_bytes = max(self.peak_bytes, int(self._bytes.max()))
      yield int(reads.step[first]), fetched, moved


def count(
  config: DataConfig,
  records: Mapping[str, int],
  shape: RowShape,
  batch_size: int,
  hosts: int,
  steps: int,
  cache_bytes: float,
) -> dict[str, Any]:
  """Counts what a run's hosts read in its first steps, in the order of its config.

  Returns:
    Per step and host: `records` and their `record_bytes`, different `shards`, `requests` (shards that the cache had to
    fetch) and `fetched_bytes`; `cache_bytes`, the most that a host kept; of the batch of all hosts, `shards_of_step`
    and the share of those that the step before has read, `of_the_step_before`: among many shards next to 0 in a global
    shuffle.
  """
  run, caches = Simulated(config, records, shape, batch_size, 0), Hosts(hosts, cache_bytes)
  fetched = moved = shards = again = 0
  before: set[int] = set()
  for reads in run.shards(0, steps, hosts):
    for step, of_hosts, bytes_of_hosts in caches.read(reads):
      now = set(reads.shard[reads.step == step].tolist())
      shards, again, before = shards + len(now), again + len(now & before), now
      fetched, moved = fetched + int(of_hosts.sum()), moved + int(bytes_of_hosts.sum())
  each = steps * hosts
  return {
    "records": caches.records / each,
    "record_bytes": caches.read_bytes / each,
    "shards": caches.shards / each,
    "requests": fetched / each,
    "fetched_bytes": moved / each,
    "cache_bytes": caches.peak_bytes,
    "shards_of_step": shards / steps,
    "of_the_step_before": again / shards,
  }
