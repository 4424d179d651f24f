"""A rehearsal of stage 2's data on many hosts: what each reads, waits for and holds; ten die, fewer go on.

  python launch/experiments/rehearsal.py --output=launch/experiments/results/rehearsal.json   # half an hour on one core

The data sets are drawn (jflow/perf/reads.py), planned and ordered as `train` would; every host's cache of shards is
counted, and the loader of one host runs on pictures of its own, so that its CPU seconds are real. Waits follow from
them by a model: a host fetches one shard after the other, at most `ahead` steps before it needs it, and each step waits
for the slowest host.
"""

import argparse
import collections
import json
import pathlib
import sys
import time

import numpy as np

from jflow.batch import TASKS
from jflow.perf import data, reads
from jflow.training import config_files, setup


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("--hosts", type=int, default=256)
  add("--resumed_on", type=int, default=128, help="hosts after the kill")
  add("--killed", type=int, default=10, help="hosts that die")
  add("--steps", type=int, default=10_000)
  add("--killed_at", type=int, default=6_100, help="the step; the last checkpoint is 100 before")
  add("--records", type=int, nargs=3, default=(40_000_000, 40_000_000, 10_000_000), metavar=TASKS)
  add("--orders", nargs="+", choices=("blocks", "global"), default=("blocks", "global"))
  add("--drawn", type=int, default=2**18, help="records of each type that are planned; the others are like them")
  add("--block_records", type=int, default=8192)
  add("--cache_gib", type=float, default=100.0, help="of a host")
  add("--gib_per_second", type=float, default=1.0, help="from the store to a host")
  add("--latency", type=float, default=0.1, help="seconds of a request")
  add(
    "--step_seconds",
    type=float,
    default=0.25,
    help="of the accelerators of all hosts: 8,192 tokens of each at 32,000 a second",
  )
  add("--cores", type=int, default=16, help="of a host's loader")
  add("--ahead", type=int, default=16, help="steps that a host loads ahead")
  add("--output", type=pathlib.Path)
  args = parser.parse_args()
  if args.resumed_on > args.hosts - args.killed:
    parser.error(f"--resumed_on={args.resumed_on} must be at most the {args.hosts - args.killed} hosts that are left")

  config = config_files.load("stage2")
  shape = setup.row_shape(config, config.model)
  report = {"settings": {k: str(v) for k, v in vars(args).items()}, "loader": loader(), "orders": {}}
  for order in args.orders:
    began = time.process_time()
    own = config.data.replace(order=order, block_records=args.block_records, block_lanes=args.hosts)
    run = reads.Simulated(own, dict(zip(TASKS, args.records)), shape, config.train.batch_size, 0, args.drawn)
    planned = time.process_time() - began
    found = {"planning_cpu_seconds": planned, "rows": run.rows} | rehearse(run, args, report["loader"])
    report["orders"][order] = found
    print(json.dumps({order: found}, indent=1), file=sys.stderr)
  text = json.dumps(report, indent=1) + "\n"
  if args.output:
    args.output.write_text(text, encoding="utf-8")
  else:
    print(text)


def loader() -> dict[str, float]:
  """CPU seconds per row of each type of a loader that runs for real, pictures decoded, records verified."""
  found = data.run(data.Settings(pictures=64, repeats=2))
  return {task: 1 / found[task]["rows_per_cpu_second"] for task in ("understanding", "generation")}


def rehearse(run: reads.Simulated, args: argparse.Namespace, row_seconds: dict[str, float]) -> dict[str, object]:
  """A run to the kill on all hosts, and from its last checkpoint to the end on fewer, whose disks were kept."""
  before, after = args.hosts, args.resumed_on
  caches = reads.Hosts(before, args.cache_gib * 2**30)
  first = Phase(run, caches, 0, args.killed_at, before, args, row_seconds)
  alive = [host for host in range(before) if host >= args.killed][:after]
  caches = caches.kept(alive)
  second = Phase(run, caches, args.killed_at - 100, args.steps, after, args, row_seconds)
  steps = range(args.killed_at - 50, args.killed_at, 7)
  same = all(shards_of(run, step, before) == shards_of(run, step, after) for step in steps)
  return {"before": first.report(), "resumed": second.report(), "the_same_batches": same}


def shards_of(run: reads.Simulated, step: int, hosts: int) -> collections.Counter:
  """Records of a step by shard, of all hosts together."""
  total: collections.Counter = collections.Counter()
  for found in run.shards(step, step + 1, hosts):
    for shard, records in zip(found.shard.tolist(), found.records.tolist()):
      total[shard] += records
  return total


class Phase:
  """Steps on one number of hosts: reads counted, waits by the model."""

  def __init__(self, run, caches, start, stop, hosts, args, row_seconds):
    self._caches, self._steps, self._hosts = caches, stop - start, hosts
    counts = [run.counts(step) for step in range(start, stop)]
    seconds = [sum(n * row_seconds.get(task, 0.0) for task, n in one.items()) / hosts / args.cores for one in counts]
    self._loader = float(np.mean(seconds))
    ready, ended = np.zeros(hosts), collections.deque([0.0] * args.ahead, args.ahead)
    self._waited, self._late, self._fetches, self._bytes = 0.0, 0, np.zeros(hosts), np.zeros(hosts)
    self._longest = 0.0
    number = 0
    for found in run.shards(start, stop, hosts):
      for _, fetches, moved in caches.read(found):
        took = fetches * args.latency + moved / (args.gib_per_second * 2**30)
        ready = np.maximum(ready, ended[0]) + np.maximum(took, seconds[number])  # decoding goes on while shards come
        begin = max(ended[-1], float(ready.max()))
        wait = begin - ended[-1]
        if number:  # the first step waits for the start
          self._waited, self._late = self._waited + wait, self._late + (wait > 0.01)
          self._longest = max(self._longest, wait)
        else:
          self._begin = wait
        ended.append(begin + args.step_seconds * args.hosts / hosts)
        self._fetches, self._bytes, number = self._fetches + fetches, self._bytes + moved, number + 1
    self._seconds = ended[-1] - self._begin

  def report(self) -> dict[str, float]:
    """Per host or step, as the names say."""
    gib = self._bytes / 2**30
    return {
      "steps": self._steps,
      "hosts": self._hosts,
      "gib_read_per_host_mean": float(gib.mean()),
      "gib_read_per_host_max": float(gib.max()),
      "shards_fetched_per_host_mean": float(self._fetches.mean()),
      "gib_held_max": self._caches.peak_bytes / 2**30,
      "loader_core_seconds_per_step": self._loader,
      "seconds_before_the_first_step": self._begin,
      "waited_share": self._waited / self._seconds,
      "steps_that_wait": self._late,
      "longest_wait_seconds": self._longest,
      "hours": self._seconds / 3600,
    }


if __name__ == "__main__":
  main()
