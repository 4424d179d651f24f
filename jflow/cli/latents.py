"""`python -m jflow prepare --latents`: posteriors of the VAE, computed ahead of training."""

import argparse
import os
import sys

from jflow.cli.arguments import SEED, Parser, whole
from jflow.errors import UserError

_EPILOG = """\
examples
  python -m jflow prepare --latents --input=data/paint --checkpoint=runs/stage1
  python -m jflow prepare --latents --input=data/paint --checkpoint=JanusFlow-1.3B --vae=sdxl-vae --batch_size=64
  python -m jflow train --config=configs/stage2.py --workdir=runs/stage2 --config.data.latents=True ...

They lie beside the records, in INPUT/latents-SIZE: per picture the posterior's mean and log variance (bfloat16,
36 KB at 384) and the one square that was cut out, which training then uses in every epoch. A run refuses latents
of another encoder, another size or other records. A run of this command that was killed goes on where it
stopped. All devices of this machine share the work, in float32."""


def main(argv: list[str]) -> int:
  """Runs the command line."""
  parser = Parser(
    prog="python -m jflow prepare",
    description="Runs the VAE over the pictures of a prepared data set, so that training need not.",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--latents", action="store_true", required=True, help="this command")
  add("--input", metavar="DIR", required=True, help="a data set that `prepare --task=generation` wrote")
  add(
    "--checkpoint",
    metavar="DIR",
    required=True,
    help="whose VAE; training starts from it, or from the same VAE",
  )
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
  args = parser.parse_args(argv)
  for name in ("batch_size", "threads"):
    if getattr(args, name) < 1:
      raise UserError(f"--{name}={getattr(args, name)} should be at least 1")
  if args.seed < 0:
    raise UserError(f"--seed={args.seed} should not be negative")
  from jflow.data.store import latents
  from jflow.training.latents import make

  header = make(args.checkpoint, args.input, args.vae, args.weights, args.batch_size, args.seed, args.threads)
  lost = f"; without: {header['rejected']}" if header["rejected"] else ""
  print(
    f"latents of {sum(header['shard_lengths']):,} pictures in {latents.folder(args.input, header['image_size'])}{lost}"
  )
  print("next: train with --config.data.latents=True", file=sys.stderr)
  return 0
