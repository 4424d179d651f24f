"""The command `bench`: measures the speed of a workload on this machine."""

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Callable

from jflow.cli.arguments import Parser, number, path, whole
from jflow.cli.flags import add_json, add_model, add_settings, check_json, settings_of
from jflow.outputs import write_json


def _train(p: argparse.ArgumentParser) -> None:
  p.epilog = """\
examples
  python -m jflow bench train --config=stage2:tiny                      # anywhere
  python -m jflow bench train --config=stage2 --rows=8 --json=step.json # one GPU
  python -m jflow bench train --config=stage2 --rows=4 --fields config.compute.remat=none

Rows are full and random, in the mixture of the config's last phase; everything runs on the device, SigLIP and VAE
included. MFU takes the model FLOPs of jflow/models/flops.py over the vendor's dense bf16 peak; none on a CPU. Parts
are timed alone, so they need not add up to the step."""
  add = p.add_argument
  add("--config", metavar="FILE[:SIZE]", required=True, help="for example stage2:tiny")
  add("--rows", type=whole(most=2**20), help="rows per step (default: train.batch_size)")
  add("--steps", type=whole(most=10**6), default=20, help="timed steps (default %(default)s)")
  add("--parts", action=argparse.BooleanOptionalAction, default=True, help="time the parts too")
  add("--fields", nargs="*", default=(), metavar="config.FIELD=VALUE", help="set fields of the config")


def _device(p: argparse.ArgumentParser) -> Callable[..., argparse.Action]:
  """Adds the flags of the workloads that time pieces of a train step."""
  add = p.add_argument
  add("--config", metavar="FILE[:SIZE]", default="stage2", help="sizes (default %(default)s, 384)")
  add("--rows", type=whole(most=2**20), default=4, help="rows whose tokens are taken (default %(default)s)")
  add("--repeats", type=whole(most=100_000), default=10, help="calls that are timed together (default %(default)s)")
  add("--fields", nargs="*", default=(), metavar="config.FIELD=VALUE", help="set fields of the config")
  return add


def _products(p: argparse.ArgumentParser) -> None:
  p.epilog = """\
examples
  python -m jflow bench products                       # one GPU: bf16 and fp8 on the shapes of stage 2
  python -m jflow bench products --config=stage2:tiny  # anywhere"""
  _device(p)


def _attention(p: argparse.ArgumentParser) -> None:
  p.epilog = """\
examples
  python -m jflow bench attention                      # one GPU: every kernel that runs there
  python -m jflow bench attention --kernels xla packed # these two

Each is compared with plain attention, the first: relative L2 errors of output and gradients, as a whole and of the worst
position, and whether a segment's output feels another's inputs (null: no row holds two segments)."""
  add = _device(p)
  add(
    "--kernels", nargs="*", default=(), metavar="NAME", help="as compute.attention, cudnn:Z with a table of Z segments"
  )


def _inference(p: argparse.ArgumentParser) -> Callable[..., argparse.Action]:
  """Adds the flags that `generate` and `understand` share."""
  add_model(p, required=False)
  add = p.add_argument
  add(
    "--config",
    metavar="FILE[:SIZE]",
    help="random weights of this size, without --checkpoint (default stage3:mid; :384 is the paper's model)",
  )
  add(
    "--versus",
    type=path,
    metavar="FILE",
    help="a program that does the same work with the same weights, in turn: tests/parity/torch_worker.py, PyTorch's",
  )
  add("--repeats", type=whole(most=100_000), default=5, help="timed rounds (default %(default)s)")
  return add


def _generate(p: argparse.ArgumentParser) -> None:
  p.epilog = """\
examples
  python -m jflow bench generate --versus=tests/parity/torch_worker.py   # a mid-size model, random weights
  python -m jflow bench generate --checkpoint=world --batch_size=4
  python -m jflow bench generate --config=janus/stage3:mid --versus=tests/parity/torch_worker.py   # by codes
  python -m jflow bench generate --config=stage3:384 --batch_size=16     # on a GPU

The PyTorch side is the published loop: of flow, it runs the prompt again at every step; of codes, it is transformers'
generate, and both sides take the most likely code. On a GPU or TPU the report says which share of the chip's peak the
pictures' FLOPs take (mfu), and of codes which share of the memory bandwidth their loop reaches (bandwidth_share)."""
  add = _inference(p)
  add("--batch_size", type=whole(most=4096), default=2, help="pictures generated at once (default %(default)s)")
  add_settings(p, "default, unless the checkpoint has its own:")
  add(
    "--attention",
    choices=("auto", "xla", "fused"),
    default="auto",
    help="of a picture's own positions; fused: a GPU's causal kernel (default: what inference takes)",
  )
  add("--prompt_tokens", type=whole(), default=32, help="of the longest prompt (default %(default)s)")


def _understand(p: argparse.ArgumentParser) -> None:
  p.epilog = """\
examples
  python -m jflow bench understand --versus=tests/parity/torch_worker.py # a mid-size model, random weights
  python -m jflow bench understand --checkpoint=world --batch_size=8
  python -m jflow bench understand --config=stage3:384 --batch_size=16   # on a GPU

Each row reads one picture and a question and answers greedily; the PyTorch side is transformers' generate. On a GPU
or TPU the report says which share of the memory bandwidth decoding reaches (bandwidth_share)."""
  add = _inference(p)
  add("--batch_size", type=whole(most=4096), default=1, help="answers made at once (default %(default)s)")
  add("--new_tokens", type=whole(), default=64, help="of each answer (default %(default)s)")
  add("--question_tokens", type=whole(), default=64, help="beside the picture (default %(default)s)")


def _data(p: argparse.ArgumentParser) -> None:
  p.epilog = """\
examples
  python -m jflow bench data                                    # 256 JPEGs that it makes: 1024 x 768 and 512 x 512
  python -m jflow bench data --input=data/paint --threads=8     # 256 pictures of your own data set
  python -m jflow bench data --workers=4 --json=data.json       # loader processes as well
  python -m jflow bench data --plan=10000000                    # how long ten million records take to plan
  python -m jflow bench data --hosts=16                         # what each of 16 hosts reads in the two orders

ratio is the pipeline's CPU seconds per picture over those of the loop; below 1 where the pipeline decodes large
JPEGs at a fraction. accelerators_fed says how many, at 53,000 tokens a second each, the cores of a host feed. Tokens
a second of a training run over rows_per_cpu_second x row_tokens are the cores that feed it."""
  add = p.add_argument
  add("--config", metavar="FILE[:SIZE]", default="stage2", help="row and picture sizes (default %(default)s, 384)")
  add(
    "--input",
    metavar="DIR",
    action="append",
    default=[],
    help="a prepared data set with pictures, repeatable (default: made here)",
  )
  add("--pictures", type=whole(most=10**6), default=256, help="per round (default %(default)s)")
  add("--repeats", type=whole(most=100_000), default=5, help="rounds, loop and pipeline in turn (default %(default)s)")
  add("--threads", type=whole(most=1024), default=1, help="reader threads (default %(default)s, as the loop)")
  add(
    "--workers", type=whole(0, 1024), default=0, help="loader processes, measured in addition (default: threads only)"
  )
  add("--decode", choices=("exact", "scaled"), default="exact", help="as data.decode (default %(default)s)")
  add(
    "--plan",
    metavar="RECORDS",
    type=whole(0, 10**10),
    default=0,
    help="plan so many records of realistic lengths instead",
  )
  add("--group_records", type=whole(0, 2**31), default=0, help="with --plan: as data.block_records (default: global)")
  counted = p.add_argument_group(
    "what hosts read", "shards and bytes of each step and host, for both values of data.order"
  )
  add = counted.add_argument
  add(
    "--hosts",
    type=whole(0, 2**14),
    default=0,
    help="count for so many hosts, on --plan records of each type (4,000,000)",
  )
  add("--rows", type=whole(1, 2**20), default=512, help="of a batch (default %(default)s)")
  add("--steps", type=whole(1, 10**6), default=300, help="that are counted (default %(default)s)")
  add("--cache_gib", type=number(0), default=100.0, help="of shards that a host keeps (default %(default)s)")


# Workload -> (its flags, its help); it is in jflow/perf/WORKLOAD.py, whose settings have the names of the flags.
WORKLOADS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
  "train": (_train, "the train step of a config: tokens/s, MFU, memory, and its parts alone"),
  "attention": (_attention, "kernels of packed attention: seconds, memory, error, leaks"),
  "products": (_products, "matrix products of the step's shapes, and a copy: what the device reaches"),
  "generate": (_generate, "generation of images: loop and decoder, alone or beside PyTorch"),
  "understand": (_understand, "answering: first token and the ones after it, alone or beside PyTorch"),
  "data": (_data, "the input pipeline beside the plain loop: decode and resize"),
}


def parser() -> argparse.ArgumentParser:
  """The flags of `bench`."""
  p = Parser(
    prog="python -m jflow bench",
    description="Measures a workload. Ratios come from one run, side by side; nothing is compared with old runs.",
    epilog="""\
examples
  python -m jflow bench train --config=stage2:tiny --json=train.json
  python -m jflow bench understand --checkpoint=world --batch_size=8
  python -m jflow bench data --help        explains one""",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  chosen = p.add_subparsers(dest="workload", required=True, metavar="|".join(WORKLOADS))
  for name, (add_flags, what) in WORKLOADS.items():
    sub = chosen.add_parser(name, help=what, description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json(sub, "the report")
    add_flags(sub)
  return p


def main(argv: list[str]) -> int:
  """Runs a workload, prints its report as a table, and writes it to --json."""
  args = parser().parse_args(argv)
  check_json(args)
  flags = {name: tuple(x) if isinstance(x, list) else x for name, x in vars(args).items()}
  workload, file = flags.pop("workload"), flags.pop("json")
  module = importlib.import_module(f"jflow.perf.{workload}")
  names = {field.name for field in dataclasses.fields(module.Settings)}
  if "sampling" in names:
    flags["sampling"] = settings_of(args)
  report = module.run(module.Settings(**{name: value for name, value in flags.items() if name in names}))
  for name, value in report.items():
    print(f"{name:24} {_readable(value)}")
  if file:
    write_json(file, report)
    print(f"report: {file}", file=sys.stderr)
  return 0


def _readable(value: object) -> str:
  if isinstance(value, dict):
    return "  ".join(f"{k} {_readable(v)}" for k, v in value.items())
  if isinstance(value, float):
    return f"{value:.4g}"
  return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
