"""`python -m jflow prepare --report`: a page about prepared data sets."""

import argparse
import pathlib
import sys

from jflow import outputs, stores
from jflow.cli import cache_flags
from jflow.cli.arguments import Parser, path, whole
from jflow.errors import UserError

_EPILOG = """\
examples
  python -m jflow prepare --report data/chat data/paint gs://BUCKET/text --output=corpus.html

One file without others beside it: records by data set, what was left out and why with the first example of each reason,
histograms of words, turns, pictures, their sizes and bytes, and samples. Of large sets, texts of 200,000 records and
pictures of 2,000 are read, evenly spread."""


def main(argv: list[str]) -> int:
  """Runs the command line."""
  parser = Parser(
    prog="python -m jflow prepare",
    description="Writes a page about prepared data sets: how much of what, what was left out and why, and samples.",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--report", metavar="DIR", nargs="*", required=True, help="data sets that `prepare` wrote, also in a store")
  add(
    "--output",
    metavar="FILE",
    type=path,
    default=pathlib.Path("corpus.html"),
    help="HTML (default corpus.html)",
  )
  add("--samples", type=whole(0, 1000), default=8, help="records to show of each data set (default 8)")
  cache_flags.add(parser)
  args = parser.parse_args(argv)
  if not args.report:
    raise UserError("--report must name data sets, as in --report data/chat data/paint")
  if args.output.suffix.lower() not in (".html", ".htm"):
    raise UserError(f"--output={args.output}: the page is HTML, so its name must end in .html")
  outputs.make_directory(args.output.parent, "--output")
  if args.output.is_dir():
    raise UserError(f"--output={args.output} is a directory: name a file")
  from jflow.data import corpus

  cache = cache_flags.opened(args, args.report)
  page = corpus.page([corpus.measured(stores.absolute(directory), cache, args.samples) for directory in args.report])
  outputs.replace(args.output, page)
  print(f"{len(args.report):,} data sets in {args.output}", file=sys.stdout)
  return 0
