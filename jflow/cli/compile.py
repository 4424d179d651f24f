"""The command `compile`: compiles the train step, or generating or answering, ahead of time for absent hardware."""

import argparse
import sys
from typing import Any

from jflow.cli.arguments import Parser, number, path, whole
from jflow.cli.flags import add_json, check_file, check_json
from jflow.config import RunConfig
from jflow.errors import UserError
from jflow.outputs import write_json
from jflow.perf import targets
from jflow.training import config_files

_EPILOG = """\
examples
  python -m jflow compile --config=configs/stage2.py --topology=v5e:4x4 --rows_per_device=1
  python -m jflow compile --config=configs/stage2.py --topology=h100:4x8 --rows_per_device=4 --json=h100.json
  python -m jflow compile --config=configs/stage2.py --topology=v5p:2x2x4 --config.mesh.data=2 --config.mesh.fsdp=8
  python -m jflow compile --config=configs/stage3.py:384 --topology=h200:1x1 --program=understand --rows_per_device=16

A topology is KIND:DIMS: v5e:4x4, v6e:16x16, v4:2x2x4, v5p:4x4x4 (chips), a100:1x8, h100:4x8, h200:1x1 (hosts x
GPUs). TPU needs libtpu (pip install '.[compile]'), GPU jax's CUDA plugin (pip install --no-deps
jax-cuda13-plugin jax-cuda13-pjrt); neither needs the hardware. Where the config leaves the mesh at 1 x 1 x 1,
fsdp covers a host of GPUs or up to 16 TPU chips, and data the rest.

Bytes and FLOPs are those of one device. The estimate of the step is a bound, not a promise: each of compute,
memory and network at the vendor's peak, as if the other two cost nothing. Of generate and understand the report says
what one step of the loop reads and writes: a step of the solver, a token of each row."""


def main(argv: list[str]) -> int:
  """Compiles a step and prints the report; returns 1 if the step does not fit."""
  parser = Parser(
    prog="python -m jflow compile",
    description="Compiles the train step of a config for absent hardware, and reports its memory and a bound of its time.",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--config", metavar="FILE[:SIZE]", help="for example configs/stage2.py")
  parser.add_argument("--topology", metavar="KIND:DIMS", help="for example v5e:4x4")
  parser.add_argument(
    "--rows_per_device",
    type=whole(),
    metavar="N",
    help="rows that a device computes at once; a step has train.accumulation times as many (default: by train.batch_size)",
  )
  parser.add_argument(
    "--program",
    choices=("train", "generate", "understand"),
    default="train",
    help="what is compiled: the train step, or the loop that generates or answers --rows_per_device (1) at once",
  )
  parser.add_argument(
    "--slots", type=whole(), default=1024, metavar="N", help="of the cache that --program=understand covers"
  )
  parser.add_argument(
    "--effort",
    type=number(),
    default=0.0,
    metavar="E",
    help="of the compiler, from -1 (soonest) to 0, as in training",
  )
  add_json(parser, "the report")
  parser.add_argument("--hlo", type=path, metavar="FILE", help="write the compiled program as text")
  known, fields = parser.parse_known_args(argv)
  if not known.config or not known.topology:
    raise UserError("name --config and --topology, for example --config=configs/stage2.py --topology=v5e:4x4")
  topology = targets.Topology.parse(known.topology)
  if not -1.0 <= known.effort <= 0.0:
    raise UserError(f"--effort={known.effort} must be in [-1, 0]")
  if known.program != "train":
    return _inference(known, fields, topology)
  targets.quiet_environment()
  config = config_files.load(known.config, fields)
  config = fitted(config, topology, known.rows_per_device)
  _check_files(known)
  from jflow.perf.aot_report import compile_report

  report = {"config": known.config} | compile_report(config, topology, known.effort, known.hlo)
  show(report)
  if known.json:
    write_json(known.json, report)
    print(f"report: {known.json}", file=sys.stderr)
  return 0 if report["fits"] else 1


def _check_files(known: argparse.Namespace) -> None:
  check_json(known)
  check_file(known.hlo, "--hlo")
  if known.json and known.hlo and known.json.resolve() == known.hlo.resolve():
    raise UserError(f"--hlo={known.hlo} must be another file than --json")


def _inference(known: argparse.Namespace, fields: list[str], topology: targets.Topology) -> int:
  """Compiles generating or answering and prints the report."""
  rows = 1 if known.rows_per_device is None else known.rows_per_device
  for name, value in (("rows_per_device", rows), ("slots", known.slots)):
    if value < 1:
      raise UserError(f"--{name}={value} must be at least 1")
  if topology.chips != 1 or topology.chip.platform != "gpu":
    raise UserError(f"--topology={topology.name} must be one GPU with --program={known.program}, as h200:1x1")
  targets.quiet_environment()
  config = config_files.load(known.config, fields)
  _check_files(known)
  from jflow.perf.aot_inference import compile_report

  report = {"config": known.config} | compile_report(config, topology, known.program, rows, known.slots, known.hlo)
  print(
    f"{report['topology']}: {known.program}, {rows} rows; a {report['step']}: {report['step_bytes'] / 1e9:.2f} GB of "
    f"memory traffic ({report['step_bytes_needed'] / 1e9:.2f} needed), {report['step_flops'] / 1e12:.3f} TFLOP, at least "
    f"{1e3 * report['step_seconds_at_least']:.2f} ms; predicted {1e3 * report['step_seconds_by_launch']:.2f} ms, "
    f"{report['step_launches']:.0f} launches one after the other"
  )
  print("memory    " + "  ".join(f"{name} {value:.2f}" for name, value in report["memory_gib"].items()) + "  GiB")
  print(f"compiled in {report['compile_seconds']:.0f} s")
  if known.json:
    write_json(known.json, report)
    print(f"report: {known.json}", file=sys.stderr)
  return 0


def fitted(config: RunConfig, topology: targets.Topology, rows: int | None) -> RunConfig:
  """The config with a mesh for the topology and `rows` rows per device.

  Raises:
    UserError: rows are below 1, or the mesh has another size than the topology.
  """
  mesh = (config.mesh.data, config.mesh.fsdp, config.mesh.model)
  if mesh == (1, 1, 1):
    mesh = topology.mesh
  if mesh[0] * mesh[1] * mesh[2] != topology.chips:
    raise UserError(
      f"mesh.data x mesh.fsdp x mesh.model = {' x '.join(map(str, mesh))} is not the {topology.chips} chips of "
      f"{topology.name}"
    )
  if rows is not None and rows < 1:
    raise UserError(f"--rows_per_device={rows} must be at least 1")
  train = {} if rows is None else dict(batch_size=rows * mesh[0] * mesh[1] * config.train.accumulation)
  data = dict(tokenizer=config.data.tokenizer or "unused")  # no data is read
  return config.replace(mesh=dict(zip(("data", "fsdp", "model"), mesh)), train=train, data=data)


def show(report: dict[str, Any]) -> None:
  """Prints a report as text."""
  mesh = " x ".join(str(n) for n in report["mesh"].values())
  print(
    f"{report['topology']}: {report['chips']} chips, mesh data x fsdp x model = {mesh}, "
    f"{report['rows_per_device']} rows per device, attention {report['attention']}, remat {report['remat']}, "
    f"unroll {report['unroll']}"
  )
  memory = report["memory_gib"]
  print("memory    " + "  ".join(f"{name} {value:.2f}" for name, value in memory.items()) + "  GiB per device")
  if not report["fits"]:
    over = memory["total"] - memory["limit"]
    print(f"does not fit: {over:.1f} GiB too much; fewer rows, another remat policy or a larger mesh.fsdp")
  if "seconds" not in report:
    return
  flops = report["flops"]
  print(
    f"work      {flops['program'] / 1e12:.1f} + {flops['kernels'] / 1e12:.1f} (kernels) TFLOP, of which the model "
    f"needs {flops['model'] / 1e12:.1f}; {report['memory_bytes'] / 1e9:.0f} GB of memory traffic"
  )
  if report["fp8_products"]:
    print(f"8 bits    {report['fp8_products']:.0f} products, {report['fp8_flops'] / 1e12:.1f} TFLOP")
  for name, part in report["parts"].items():
    print(
      f"part      {name:8} {part['flops'] / 1e12:7.2f} TFLOP {part['memory_bytes'] / 1e9:7.1f} GB "
      f"{part['launches']:6.0f} launches {1e3 * part['seconds']:7.1f} ms"
    )
  for name, size in report["collective_bytes"].items():
    print(f"network   {name:32} {size / 1e9:8.3f} GB")
  times = "  ".join(f"{name} {1e3 * value:.0f}" for name, value in report["seconds"].items())
  print(
    f"estimate  {times} ms: bound by {report['bound']}; {1e3 * report['seconds_if_overlapped']:.0f} ms if all "
    f"overlaps, {1e3 * report['seconds_if_serial']:.0f} ms if nothing does; MFU at most "
    f"{100 * report['mfu_at_most']:.0f} %"
  )
  more = report["executed_flops"] / report["model_flops"]
  print(
    f"predicted {1e3 * report['seconds_by_launch']:.0f} ms, one launch after the other; {more:.2f} times the FLOPs that "
    "the model needs"
  )
  print(f"compiled in {report['compile_seconds']:.0f} s")
