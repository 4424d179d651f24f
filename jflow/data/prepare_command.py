"""`python -m jflow prepare`: its command line."""

import argparse
import os
from collections.abc import Sequence

from jflow.batch import TASKS
from jflow.data import importers
from jflow.data.prepare import prepare

_EPILOG = """\
what the input looks like
  llava-jsonl  one JSON object per line (or a JSON array of them); images are files in the same folder
    understanding  {"id": "7", "image": "7.jpg", "conversations": [
                     {"from": "human", "value": "<image>\\nWhat is this?"},
                     {"from": "gpt", "value": "A cat."}]}
                   one <image> per picture; "image" may be a list; or {"image": "7.jpg", "caption": "A cat."}
    generation     {"image": "7.jpg", "caption": "A cat on a sofa."}
    text           {"text": "..."}, or conversations without pictures
  shapes       no input: the built-in world, drawn once

examples
  python -m jflow prepare --format=llava-jsonl --input=photos/chat.jsonl --output=chat --task=understanding
  python -m jflow prepare --format=llava-jsonl --input=photos/captions.jsonl --output=paint --task=generation
  python -m jflow prepare --format=shapes --output=data/shapes --task=generation --records=10000

Every record is checked: the images are decoded, each conversation needs an answer. What cannot be used is
left out and counted by reason in OUTPUT/summary.json. A run that was killed goes on where it stopped."""


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = _parser()
  _import(parser.parse_args(argv), parser)


def _import(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
  """Imports records into a prepared data set."""
  missing = [f"--{name}" for name in ("format", "output", "task") if not getattr(arguments, name)]
  if missing:
    parser.error(f"an import needs {', '.join(missing)}")
  summary = prepare(**vars(arguments))
  rejected = sum(summary["rejected"].values())
  print(
    f"{summary['accepted']:,} records with {summary['images']:,} images in {arguments.output}"
    + (f"; {rejected:,} left out: {summary['rejected']}" if rejected else "")
  )
  print(
    "next: python -m jflow train --config=configs/stage2.py --workdir=runs/stage2 "
    f"--config.data.sources.{arguments.task}=\"(('{arguments.output}', 1.0),)\""
  )


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m jflow prepare",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    description="Checks pictures and texts and writes them as a data set to train on.",
    epilog=_EPILOG,
  )
  add = parser.add_argument
  add("--format", choices=importers.FORMATS, help="what the input looks like, see below")
  add("--input", default="", help="the file to read (not with --format=shapes)")
  add("--output", help="the directory to write; must not exist yet")
  add("--task", choices=TASKS, help="what the records are to teach")
  add(
    "--max_rejected_share",
    type=_share,
    default=0.01,
    metavar="SHARE",
    help="share of unusable records above which nothing is written (default 0.01)",
  )
  add("--image_root", default=None, help="folder of the images (default: that of the input)")
  add(
    "--processes",
    type=_positive,
    default=os.cpu_count() or 1,
    help="processes that read and check (default: one per core)",
  )
  add("--part_records", type=_positive, default=4096, help="records per shard at most (default 4096)")
  add("--records", type=_positive, default=1000, help="shapes: number of records (default 1000)")
  add("--seed", type=int, default=0, help="shapes: which records (default 0)")
  add("--image_size", type=_positive, default=384, help="shapes: side in pixels (default 384)")
  return parser


def _share(text: str) -> float:
  value = float(text)
  if not 0 <= value <= 1:
    raise argparse.ArgumentTypeError("should lie between 0 and 1")
  return value


def _positive(text: str) -> int:
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError("should be at least 1")
  return value
