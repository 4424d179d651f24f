"""`python -m jflow prepare --latents`, `--codes`: outputs of a writer's frozen encoder, made ahead of training.

The flags are the names of `generation.base.Stored`, one per way to write images.
"""

import argparse
import os
import sys

from jflow.cli import cache_flags
from jflow.cli.arguments import SEED, Parser, share, whole
from jflow.errors import UserError
from jflow.generation.base import FAMILIES, Stored

_EPILOG = """\
examples
  python -m jflow prepare --{name} --input=data/paint --checkpoint=runs/stage1 --batch_size=64
  python -m jflow train --config=configs/stage2.py --workdir=runs/stage2 --config.data.stored=True ...

They lie beside the records, in INPUT/{name}-SIZE: per picture {about}
and the one square that was cut out, which training then uses in every epoch. A run refuses {name}
of another encoder, another size or other records. A run of this command that was killed goes on where it
stopped. All devices of this machine share the work, in float32; many machines with one disk, or whose records are in a
store, do it by --part=K/N on each, and --merge after: the {name} are those of one machine. Of a data set in a store
(--input=gs://BUCKET/paint) shards are read through --cache, and the {name} are sent there."""


def kinds() -> dict[str, Stored]:
  """Returns flag -> what it makes, of every way to write images that has an encoder."""
  made = (family.stored for family in FAMILIES.all().values())
  return {f"--{kind.name}": kind for kind in made if kind}


def main(argv: list[str]) -> int:
  """Runs the command line; exactly one of its arguments is a flag of `kinds`."""
  named = [kind for flag, kind in kinds().items() if any(argument.split("=")[0] == flag for argument in argv)]
  if len(named) > 1:
    raise UserError(f"--{named[0].name} and --{named[1].name} must be two calls")
  kind = named[0]
  parser = Parser(
    prog="python -m jflow prepare",
    description="Runs a writer's frozen encoder over the pictures of a prepared data set, so that training need not.",
    epilog=_EPILOG.format(name=kind.name, about=kind.about),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add(f"--{kind.name}", action="store_true", required=True, help="this command")
  add(
    "--input", metavar="DIR", required=True, help="a data set that `prepare --task=generation` wrote, also in a store"
  )
  add(
    "--checkpoint",
    metavar="DIR",
    required=True,
    help=f"whose {kind.part.upper()}; training starts from it, or from the same {kind.part.upper()}",
  )
  if kind.part == "vae":
    add("--vae", metavar="DIR", help="SDXL-VAE, for a checkpoint that holds none")
  add("--weights", choices=("ema", "raw"), default="ema", help="of a jflow checkpoint (default ema)")
  add("--batch_size", type=whole(most=100_000), default=16, help="pictures at a time (default 16)")
  add("--seed", type=whole(most=SEED), default=0, help="of the squares (default 0)")
  add(
    "--threads",
    type=whole(most=100_000),
    default=os.cpu_count() or 1,
    help="that read and decode (default: one per core)",
  )
  cache_flags.add(parser)
  add(
    "--part",
    type=share,
    metavar="K/N",
    help="do the share of machine K of N, from 1; all see the same disk or store, and any may go on again",
  )
  add("--merge", action="store_true", help="join the shares of all machines")
  args = parser.parse_args(argv)
  if args.part and args.merge:
    raise UserError("--part and --merge are two commands: first every part, then --merge without --part")
  for name in ("batch_size", "threads"):
    if getattr(args, name) < 1:
      raise UserError(f"--{name}={getattr(args, name)} should be at least 1")
  if args.seed < 0:
    raise UserError(f"--seed={args.seed} should not be negative")
  from jflow.data.store import stored
  from jflow.training.encode import make

  cache = cache_flags.opened(args, [args.input])
  vae = getattr(args, "vae", None)
  numbers = args.batch_size, args.seed, args.threads
  header = make(kind.name, args.checkpoint, args.input, vae, args.weights, *numbers, args.part, args.merge, cache)
  lost = f"; without: {header['rejected']}" if header["rejected"] else ""
  if args.part:
    machine, count = args.part
    print(f"share {machine} of {count} of the {kind.name} is done{lost}")
    print("next: when all are, the same command with --merge in place of --part", file=sys.stderr)
    return 0
  where = stored.folder(kind, args.input, header["image_size"])
  print(f"{kind.name} of {sum(header['shard_lengths']):,} pictures in {where}{lost}")
  print("next: train with --config.data.stored=True", file=sys.stderr)
  return 0
