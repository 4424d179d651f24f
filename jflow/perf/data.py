"""bench data: the cost of the input pipeline, beside a plain loop "decode and resize" on the same files.

Costs are CPU seconds, independent of other load and of the number of cores. The pipeline does the work of the loop,
and also reads, verifies, tokenizes, packs and copies.
"""

import dataclasses
import functools
import io
import json
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from jflow.batch import NONE, TASKS, RowShape
from jflow.config import DataConfig
from jflow.data.pipeline import Pipeline
from jflow.data.store import prepare
from jflow.data.store.prepared import PreparedSource, read_summary
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.perf import planning, reads
from jflow.perf.timing import interleaved
from jflow.progress import Progress
from jflow.training import config_files, setup

_WORDS = (
  "a photograph of the old red sailing boat on calm sea near small white houses at sunset with many birds".split()
)

_CORES = (16, 64, 128)  # of a host
_TOKENS = 53_000  # a second that a fast accelerator trains on
_RECORDS = 4_000_000  # of each type, whose reads are counted


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of `bench data`."""

  config: str = "stage2"  # row and picture sizes
  input: tuple[str, ...] = ()  # prepared data sets with pictures; none: made here
  pictures: int = 256  # per round
  repeats: int = 5  # rounds, loop and pipeline in turn
  threads: int = 1  # reader threads
  workers: int = 0  # loader processes, measured in addition
  decode: str = "exact"  # data.decode
  plan: int = 0  # plan so many records of realistic lengths instead
  group_records: int = 0  # of a group of shards that is planned alone; 0: as large as memory allows
  hosts: int = 0  # count what so many hosts read, in place of the loader's cost
  rows: int = 512  # of a batch, with hosts
  steps: int = 300  # that are counted, with hosts
  cache_gib: float = 100.0  # of each host's cache of shards, with hosts


def run(args: Settings) -> dict[str, Any]:
  """Runs the benchmark and returns its report."""
  for name in ("pictures", "repeats", "threads"):
    if getattr(args, name) < 1:
      raise UserError(f"--{name}={getattr(args, name)} should be at least 1")
  config = config_files.load(args.config)
  if not config.data.tokenizer:  # of a size that has none of its own
    small = config_files.load("stage2:tiny")
    config = config.replace(data=dict(tokenizer=small.data.tokenizer))
  model, data = config.model, config.data
  shape = setup.row_shape(config, model)
  if args.hosts:
    records = dict.fromkeys(TASKS, args.plan or _RECORDS)
    of_order = lambda order: data.replace(order=order, block_lanes=args.hosts)
    counted = {
      order: reads.count(of_order(order), records, shape, args.rows, args.hosts, args.steps, args.cache_gib * 2**30)
      for order in ("global", "blocks")
    }
    return {"workload": "data", "hosts": args.hosts, "records_of_a_type": records[TASKS[0]], **counted}
  if args.plan:
    return {"workload": "data", "planned_records": args.plan, **planning.measure(args.plan, shape, args.group_records)}
  with tempfile.TemporaryDirectory() as folder:
    inputs = args.input or [_made(folder, task, args.pictures) for task in ("understanding", "generation")]
    report: dict[str, Any] = {"workload": "data", "image_size": shape.image_size, "row_tokens": shape.tokens}
    report |= {"threads": args.threads, "workers": args.workers}
    for directory in inputs:
      task = read_summary(directory)["task"]
      if task == "text":
        raise UserError(f"--input={directory} holds text, and this benchmark is about pictures")
      tokenizer = Tokenizer.load(data.tokenizer)
      name = task if task not in report else directory
      report[name] = _compare(directory, task, data, tokenizer, shape, args)
  return report


def _compare(
  directory: str,
  task: str,
  config: DataConfig,
  tokenizer: Tokenizer,
  shape: RowShape,
  args: Settings,
) -> dict[str, Any]:
  """Compares loop and pipeline on one data set."""
  weights = tuple(float(name == task) for name in TASKS)
  sources = {name: ((directory, 1.0),) if name == task else () for name in TASKS}
  config = config.replace(
    sources=sources,
    mixture=((0, weights),),
    threads=args.threads,
    workers=0,
    plan_cache="",
    stored=False,
    decode=args.decode,
  )
  pipeline = Pipeline(config, tokenizer, shape, 1, 0)
  source = PreparedSource(directory, task)
  files: list[bytes] = []
  rows = 0
  while len(files) < args.pictures and rows < pipeline.sources()[0].plan.rows:  # the rows of one epoch at most
    for _, _, pieces in pipeline.pieces(rows):
      files += [image for piece in pieces for image in source[piece.record].images]
    rows += 1
  counted: list[int] = []

  def pictures(pipeline: Pipeline) -> int:
    return sum(int((batch.image_kind != NONE).sum()) for batch, _ in pipeline.batches(0, rows))

  candidates: dict[str, Callable[[], object]] = {
    "loop": functools.partial(_loop, files, shape.image_size),
    "pipeline": lambda: counted.append(pictures(pipeline)),
  }
  seconds = interleaved(candidates, args.repeats, clock=time.process_time)
  if counted[-1] != len(files):
    raise UserError(f"{directory}: {len(files) - counted[-1]} of {len(files)} pictures cannot be read")
  loop = len(files) / seconds["loop"]["median"]
  ours = len(files) / seconds["pipeline"]["median"]
  report: dict[str, Any] = {
    "loop_images_per_cpu_second": loop,
    "images_per_cpu_second": ours,
    "rows_per_cpu_second": rows / seconds["pipeline"]["median"],
    "ratio": loop / ours,
    "accelerators_fed": {
      f"{cores} cores": _fed(cores, rows / seconds["pipeline"]["median"], shape) for cores in _CORES
    },
    "seconds": seconds,
  }
  if args.workers:
    processes = Pipeline(config.replace(workers=args.workers, threads=1), tokenizer, shape, 1, 0)
    ours, rate = _with_workers(processes, rows, args.repeats)
    of_rows = ours * rows / len(files)
    report["with_processes"] = {
      "images_per_cpu_second": ours,
      "ratio": loop / ours,
      "accelerators_fed": {f"{cores} cores": _fed(cores, of_rows, shape) for cores in _CORES},
      "images_per_second": rate,
    }
  return report


def _fed(cores: int, rows: float, shape: RowShape) -> float:
  """The accelerators that so many cores feed, each of which loads so many rows a second."""
  return cores * rows * shape.tokens / _TOKENS


def _loop(files: list[bytes], size: int) -> None:
  """The plain loop: decode and resize."""
  for file in files:
    np.asarray(Image.open(io.BytesIO(file)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def _with_workers(pipeline: Pipeline, rows: int, repeats: int) -> tuple[float, float]:
  """Returns images per CPU second of all processes, and per second, once the workers have started."""
  images, cpu, wall = 0, [], []
  batches = pipeline.batches(0, rows * (repeats + 1))
  for number, (batch, _) in enumerate(batches):
    if number >= rows - 1 and (number + 1) % rows == 0:
      cpu.append(time.process_time() + sum(map(_cpu_seconds, multiprocessing.active_children())))
      wall.append(time.perf_counter())
    if number >= rows:
      images += int((batch.image_kind != NONE).sum())
  return images / (cpu[-1] - cpu[0]), images / (wall[-1] - wall[0])


def _cpu_seconds(process: Any) -> float:
  """CPU seconds of a process so far, from /proc (Linux)."""
  fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
  return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _made(folder: str, task: str, pictures: int) -> str:
  """A synthetic data set: JPEGs of 1024 x 768 and 512 x 512 in turn, captions and conversations of 10 to 150 words."""
  rng = np.random.default_rng(0)
  files, lines = pathlib.Path(folder, task + "-files"), []
  files.mkdir()
  bar = Progress(pictures, 0, f"make {task}", "pictures")
  for number in range(pictures):
    bar.count(1)
    width, height = ((1024, 768), (512, 512))[number % 2]
    _picture(rng, width, height).save(files / f"{number}.jpg", quality=90)
    text = lambda: " ".join(rng.choice(_WORDS, int(rng.integers(10, 150)))) + "."
    record: dict[str, Any] = {"image": f"{number}.jpg", "caption": text()}
    if task == "understanding":
      turns = int(rng.integers(1, 4))
      record = {"image": f"{number}.jpg", "conversations": []}
      for turn in range(turns):
        question = ("" if turn else "<image>\n") + " ".join(rng.choice(_WORDS, 8)) + "?"
        record["conversations"] += [{"from": "human", "value": question}, {"from": "gpt", "value": text()}]
    lines.append(json.dumps(record))
  bar.close()
  (files / "records.jsonl").write_text("\n".join(lines), encoding="utf-8")
  output = str(pathlib.Path(folder, task))
  prepare.prepare("llava-jsonl", input=str(files / "records.jsonl"), output=output, task=task)
  return output


def _picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
  """An image with soft colours, edges and grain, which compresses about as well as a photograph."""
  soft = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
  draw = ImageDraw.Draw(soft)
  for _ in range(20):
    x, y = (int(rng.integers(side)) for side in (width, height))
    radius = int(rng.integers(8, 120))
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(rng.integers(0, 256, 3).tolist()))
  grain = rng.normal(0, 6, (height, width, 1))
  return Image.fromarray(np.clip(np.asarray(soft) + grain, 0, 255).astype(np.uint8))
