"""The command `prepare`: imports records, and runs --inspect, --report, --latents and --codes."""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from jflow.batch import TASKS
from jflow.cli import encode
from jflow.cli.arguments import SEED, Parser, number, share, whole
from jflow.data import importers
from jflow.data.duplicates import KINDS
from jflow.data.filters import AESTHETIC, Filters
from jflow.data.importers.text import DOCUMENTS
from jflow.data.store.prepare import prepare
from jflow.errors import Terminated, UserError

_EPILOG = """\
formats: --input is a file, a folder, a pattern ("tars/*.tar") or a range ("tars/{00000..00041}.tar"); of a folder,
         hidden files and folders are left out, links are followed, and each file is read once. In webdataset,
         parquet, llava-jsonl and text it may be in a store: gs://BUCKET/tars, s3://..., https://..., or a data set
         of the Hugging Face hub, by its name: hf://ORG/NAME, hf://ORG/NAME/data/train-*.parquet
  llava-jsonl  JSON objects, one per line or in an array; images are files in the same folder (--image_root)
                 {"id": "7", "image": "7.jpg", "conversations": [
                   {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}
                 {"image": "7.jpg", "caption": "A cat on a sofa."}
                 {"images": ["a.jpg", "b.jpg"], "text": "First <image> then <image> and the end."}
               a system turn is refused: leave it out, or put it into the first question; a first turn of the
               assistant and a last one of the user are left out, as in LLaVA, and counted
  imagefolder  a folder of pictures with a text beside each (7.jpg, 7.txt; --text_column names another ending), or with
               metadata.jsonl or metadata.csv: {"file_name": "7.jpg", "text": "A cat on a sofa."}
  webdataset   tar files as img2dataset writes them: 7.jpg + 7.txt, or 7.json with "caption" or "conversations";
               --image_column and --text_column may name other endings, as in input.jpg and outputs.txt
  parquet      a column of images (bytes or {bytes, path}, or lists of them), one of captions or conversations
  text         .txt files, each a document (--documents), or .jsonl and .jsonl.gz of {"text": "..."}
  tfds         the directory of a TFDS data set in ArrayRecord or Parquet; no TensorFlow
  shapes       no input: the built-in world, drawn once

tasks
  understanding  one <image> in a user's turn per picture; the answers are learned. A caption answers the paper's
                 request; with <image> in it, it is an interleaved document, all of whose text is learned
  generation     one picture and its caption
  text           documents, or conversations without pictures, in which <image> is text
records of a video, a sound or a point cloud are left out and counted

examples
  python -m jflow prepare --format=llava-jsonl --input=photos/chat.jsonl --output=data/chat --task=understanding
  python -m jflow prepare --format=imagefolder --input=my_pictures --output=data/mine --task=generation
  python -m jflow prepare --format=webdataset --input=tars --output=data/paint --task=generation \\
    --min_size=256 --max_aspect=2 --min_aesthetic=5
  python -m jflow prepare --format=parquet --input="tables/*.parquet" --output=data/tables --task=understanding \\
    --image_column=image --text_column=caption --keep='pwatermark<0.5' --duplicates=near
  python -m jflow prepare --format=text --input=books --output=data/books --task=text
  python -m jflow prepare --format=tfds --input=tfds/pets/1.0.0 --output=data/pets --task=generation \\
    --text_column=label
  python -m jflow prepare --format=shapes --output=data/shapes --task=generation --records=10000

Every record is checked: the images (PNG, JPEG, WebP or GIF) are decoded, each conversation needs an answer. What cannot
be used is left out, counted by reason in OUTPUT/summary.json and listed in OUTPUT/rejected.jsonl; what a filter drops, or
belongs to another task, is counted apart and not listed.
A run that was killed goes on where it stopped, as does one with a larger --max_rejected_share. Images beside a file
of lines are not watched between the two: remove OUTPUT.partial when sound ones were replaced. The images stay as they
are, encoded; what training sees of odd ones: EXIF rotation applied, alpha over white, the first frame of an animation,
the upper 8 of 16 bits, CMYK, grey and palette as RGB. Documents longer than a row of training are cut; a conversation
or caption that no row can hold is left out when the rows are planned, and counted as "too_long".

afterwards
  python -m jflow prepare --inspect OUTPUT    draw packed rows as the model will see them
  python -m jflow prepare --report OUTPUT     a page: histograms, samples, what was left out and why
  python -m jflow prepare --latents --help    run the VAE over a data set ahead of time; for Janus --codes, its VQ

--output may be in a store too: each finished part is sent there and checked, summary.json last.

On many machines with a shared disk or a store, a Slurm array or an indexed job runs the command with --part=K/N, once
per machine:
  python -m jflow prepare --format=webdataset --input=tars --output=data/paint --task=generation \\
    --part=$((SLURM_ARRAY_TASK_ID + 1))/$SLURM_ARRAY_TASK_COUNT
and at the end once with --merge in its place; or Apache Beam spreads the parts, on Dataflow, Flink, Spark or here:
  python -m jflow prepare --format=webdataset --input=gs://BUCKET/tars --output=gs://BUCKET/paint --task=generation \\
    --beam='--runner=DataflowRunner --project=... --region=... --temp_location=gs://BUCKET/tmp'
The records, their order and the fingerprint are those of one machine."""


def main(argv: Sequence[str] | None = None) -> int | None:
  """Runs the command line."""
  argv = list(sys.argv[1:] if argv is None else argv)
  flags = {argument.split("=")[0] for argument in argv}
  if "--inspect" in flags:  # it and those below have a --help of their own
    return importlib.import_module("jflow.cli.inspect").main(argv)
  if "--report" in flags:
    return importlib.import_module("jflow.cli.corpus").main(argv)
  if "--format" not in flags and flags & set(encode.kinds()):
    return encode.main(argv)
  parser = _parser()
  _import(parser.parse_args(argv), parser)
  return None


def _whole_name(source: str) -> str:
  """An input with the kind of a repository of the hub where its address lacks it: a data set."""
  named = source.removeprefix("hf://")
  kinds = ("datasets/", "models/", "spaces/", "buckets/")
  return source if named == source or named.startswith(kinds) else f"hf://datasets/{named}"


def _import(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
  """Imports records into a prepared data set."""
  missing = [f"--{name}" for name in ("format", "output", "task") if not getattr(arguments, name)]
  if missing:
    parser.error(f"an import needs {', '.join(missing)}")
  if len(arguments.input) > 1:
    raise UserError(
      f"--input names {len(arguments.input):,} files, {arguments.input[0]} first: the shell has opened the pattern or "
      "range; put it in quotes, as in --input='tars/{00000..00041}.tar'"
    )
  if arguments.part and arguments.merge:
    raise UserError("--part and --merge are two commands: first every part, then --merge without --part")
  if arguments.beam is not None and (arguments.part or arguments.merge):
    raise UserError("--beam spreads the parts itself: leave out --part and --merge")
  options = {name: value for name, value in vars(arguments).items() if value is not None}
  options |= {name: tuple(options[name]) for name in ("keep", "filter", "against") if name in options}
  options["input"] = _whole_name("".join(arguments.input))
  filters = Filters(**{name: options.pop(name) for name in Filters._fields if name in options})
  before = signal.signal(signal.SIGTERM, _terminate)
  try:
    summary = prepare(**options, filters=filters)
  finally:
    signal.signal(signal.SIGTERM, before)
  records, pictures = summary["accepted"], summary["images"]
  line = (
    f"{records:,} record{'s' * (records != 1)} with {pictures:,} image{'s' * (pictures != 1)} in {arguments.output}"
  )
  for what, counts in (
    ("cannot be used", summary["rejected"]),
    ("dropped by filters or of another task", summary["filtered"]),
    ("notes", summary["notes"]),
    ("files or folders left out", summary["left_out"]),
  ):
    line += f"; {sum(counts.values()):,} {what}: {counts}" if counts else ""
  print(line)
  if arguments.part:
    machine, machines = arguments.part
    print(
      f"next: this was share {machine} of {machines}; when all are done, the same command with --merge in place of --part"
    )
    return
  print(
    "next: python -m jflow train --config=tune --workdir=runs/tuned --config.train.init_from=CHECKPOINT "
    f"--config.data.sources.{arguments.task}=\"(('{arguments.output}',1.0),)\" (CHECKPOINT: a run of jflow, a directory "
    "of JanusFlow, or for --config=janus/tune one of Janus; to pretrain: configs/README.md)"
  )


def _terminate(*_: Any) -> None:
  raise Terminated


def _parser() -> argparse.ArgumentParser:
  parser = Parser(
    prog="python -m jflow prepare",
    usage="python -m jflow prepare --format=FORMAT --input=PATH --output=DIR --task=TASK [options]",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    description="Checks pictures and texts and writes them as a data set to train on.",
    epilog=_EPILOG,
  )
  add = parser.add_argument
  add("--format", choices=importers.FORMATS, help="what the input looks like, see below")
  add(
    "--input",
    nargs="+",
    action="extend",
    default=[],
    metavar="PATH",
    help="file, folder, pattern, range or address to read, in quotes (`shapes` reads none)",
  )
  add("--output", help="the directory or address to write; must not exist yet")
  add("--task", choices=TASKS, help="what the records are to teach")
  add(
    "--processes",
    type=whole(1, 10_000),
    default=os.cpu_count() or 1,
    help="that read and check (default: one per core)",
  )
  add(
    "--max_rejected_share",
    type=number(0, 1),
    default=0.01,
    metavar="SHARE",
    help="share of unusable ones among all records above which nothing is written (default 0.01)",
  )
  add = parser.add_argument_group("many machines that share a disk: the command with --part on each, then with --merge")
  add.add_argument(
    "--part", type=share, metavar="K/N", help="do the share of machine K of N, from 1; any may go on again"
  )
  add.add_argument(
    "--merge", action="store_true", help="make the output of all shares, as one machine would have made it"
  )
  add.add_argument(
    "--beam",
    nargs="?",
    const="",
    metavar="FLAGS",
    help="import on Apache Beam in place of processes, by its own flags: --beam='--runner=FlinkRunner ...'",
  )
  add = parser.add_argument_group("filters: records that do not pass are dropped").add_argument
  add("--min_size", type=whole(1), metavar="PIXELS", help="of the shorter side of each image, at least")
  add("--max_aspect", type=number(1), metavar="RATIO", help="longer side over shorter, at most")
  add(
    "--min_aesthetic",
    type=number(),
    metavar="SCORE",
    help=f"score in the metadata ({', '.join(AESTHETIC)}), at least",
  )
  add(
    "--keep",
    action="append",
    metavar="CONDITION",
    help="on a column or key of the metadata, may be repeated: pwatermark<0.5, language==en, words>=3 (also characters)",
  )
  add(
    "--filter",
    action="append",
    metavar="MODULE:FUNCTION",
    help="a function of yours, (record, metadata) -> whether it is wanted; may be repeated",
  )
  add(
    "--duplicates", choices=("exact", "near"), help="drop records that repeat an earlier one: the same bytes, or nearly"
  )
  add(
    "--duplicates_of",
    choices=KINDS,
    help="what is repeated: pictures and texts of a record, as by default, or the one or the other alone",
  )
  add(
    "--against",
    action="append",
    metavar="DIR",
    help="a data set prepared with --duplicates, whose records are earlier ones; may be repeated",
  )
  add = parser.add_argument_group("how to read").add_argument
  add("--image_root", help="folder that image paths start from (default: that of the input)")
  add("--image_column", metavar="NAME", help="of the images (default: the first usual name); in tars an ending")
  add(
    "--text_column",
    metavar="NAME",
    help="of the captions, conversations or documents (the same); in tars an ending or, without one, a key of KEY.json",
  )
  add(
    "--documents",
    choices=DOCUMENTS,
    help="text: what is a document in a .txt file, the paragraphs being those between blank lines (default file)",
  )
  add("--split", help="tfds: which split (default train)")
  add("--records", type=whole(1), help="shapes: number of records (default 1000)")
  add("--seed", type=whole(most=SEED), help="shapes: which records (default 0)")
  add("--image_size", type=whole(1, 16_384), help="shapes: side in pixels (default 384)")
  add(
    "--part_records",
    type=whole(1),
    help="records per shard at most (default 4096); tars and row groups are shards of their own",
  )
  return parser
