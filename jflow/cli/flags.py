"""The flags that commands with a model share, and opening the model that they name."""

import argparse
import pathlib
from typing import TYPE_CHECKING

from jflow.errors import UserError
from jflow.outputs import make_directory

if TYPE_CHECKING:
  from jflow.inference.pipeline import Pipeline


def add_model(p: argparse.ArgumentParser, required: bool = True) -> None:
  """Adds --checkpoint, --vae, --dtype and --weights."""
  p.add_argument(
    "--checkpoint",
    required=required,
    metavar="DIR",
    help="official directory, or a jflow workdir or step; also gs://... and ORG/NAME@REVISION of the Hugging Face hub",
  )
  p.add_argument("--vae", metavar="DIR", help="SDXL-VAE, for a checkpoint that holds none")
  p.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype (default: float32 on a CPU)")
  p.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a jflow training run")


def open_model(args: argparse.Namespace) -> "Pipeline":
  """Loads what the flags of `add_model` name; raises UserError."""
  import jflow

  return jflow.load(args.checkpoint, vae=args.vae, dtype=args.dtype, weights=args.weights)


def add_json(p: argparse.ArgumentParser, what: str) -> None:
  """Adds --json."""
  p.add_argument("--json", type=pathlib.Path, metavar="FILE", help=f"write {what} as JSON")


def check_json(args: argparse.Namespace) -> None:
  """Makes the folder of --json before the work starts; raises UserError where it cannot be, or is named itself."""
  if args.json and args.json.is_dir():
    raise UserError(f"--json={args.json} is a directory: name a file")
  if args.json and not args.json.exists():  # /dev/stdout is there, in a folder that takes no files
    make_directory(args.json.parent, "--json")
