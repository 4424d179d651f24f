"""The command `push`: publishes a model on the Hugging Face hub, with a card."""

import argparse
import re

from jflow.cli.arguments import Parser, path
from jflow.errors import UserError

_ABOUT = """\
Publishes a model on the Hugging Face hub: weights as safetensors, configuration, tokenizer and a model card, in one
commit. Others then use it by name: --checkpoint=ORG/NAME, jflow.load("ORG/NAME").

A run is converted first. Log in once by `hf auth login`. A connection that is lost costs nothing: the same command goes
on, and files that are there already are not sent again. A README.md in the folder takes the place of the card.

examples:
  python -m jflow convert --from=jflow --to=official --input=runs/mine --output=JanusFlow-mine
  python -m jflow push JanusFlow-mine me/JanusFlow-mine --license=mit --run=runs/mine --report=scores --dry_run
  python -m jflow push JanusFlow-mine me/JanusFlow-mine --license=mit --run=runs/mine --report=scores --private
  python -m jflow convert --adapter --input=runs/mine --output=adapters/mine
  python -m jflow push adapters/mine me/mine --run=runs/mine      # for --checkpoint=BASE --adapter=me/mine
"""


def parser() -> argparse.ArgumentParser:
  """The flags of `push`."""
  p = Parser(prog="python -m jflow push", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument(
    "directory", type=path, metavar="DIR", help="model of a published layout, or adapter, as convert writes it"
  )
  p.add_argument("name", metavar="ORG/NAME", help="repository on the hub; created where it does not exist")
  p.add_argument(
    "--license", default="other", help="of the weights, as the hub names it: mit, apache-2.0 (default: other)"
  )
  p.add_argument("--run", type=path, help="workdir of its training: the card gets recipe and data")
  p.add_argument(
    "--report", type=path, action="append", default=[], help="folder of evaluate: the card gets its scores"
  )
  p.add_argument("--private", action="store_true", help="create a private repository")
  p.add_argument("--message", default="Publish the model", help="of the commit")
  p.add_argument("--dry_run", action="store_true", help="print the card and the files, and send nothing")
  return p


def main(argv: list[str]) -> int:
  """Publishes a model and prints the address of the commit."""
  args = parser().parse_args(argv)
  if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", args.license):
    raise UserError(f"--license={args.license} must be an identifier of the hub, such as mit or apache-2.0")
  from jflow.evaluation import report
  from jflow.interop import publish

  name = publish.check_name(args.name)
  names = publish.files_of(args.directory)
  reports = {folder: report.read(folder) for folder in args.report}
  for folder, body in reports.items():
    if body is None:
      raise UserError(f"--report={folder} must be a folder that evaluate wrote: it has no report.json")
  card = publish.card(name, args.directory, args.license, args.run, [body for body in reports.values() if body])
  if args.dry_run:
    print(card)
    for one in names:
      print(f"{(args.directory / one).stat().st_size:>16,} bytes  {one}")
    return 0
  print(publish.publish(args.directory, name, card, private=args.private, message=args.message))
  return 0
