"""Importers: the layouts that people have their data in, one module each. The first line of each says what it reads."""

from collections.abc import Collection

from jflow.data.importers.importer import Importer, Item, Options
from jflow.errors import UserError

FORMATS = ("llava-jsonl", "webdataset", "parquet", "text", "tfds", "shapes")
_READ_BY = {  # flag -> formats that read it
  "part_records": ("llava-jsonl", "text", "tfds", "shapes"),
  "image_root": ("llava-jsonl", "parquet"),
  "image_column": ("llava-jsonl", "webdataset", "parquet", "tfds"),
  "text_column": ("llava-jsonl", "webdataset", "parquet", "text", "tfds"),
  "documents": ("text",),
  "split": ("tfds",),
  "records": ("shapes",),
  "seed": ("shapes",),
  "image_size": ("shapes",),
}
__all__ = ["FORMATS", "Importer", "Item", "Options", "check_flags", "open_importer"]


def check_flags(format: str, given: Collection[str]) -> None:
  """Checks that a format reads the flags that were given.

  Args:
    format: one of FORMATS.
    given: names of the fields of `Options` that the user has set.

  Raises:
    UserError: it does not read one of them.
  """
  for flag in given:
    formats = _READ_BY.get(flag, FORMATS)
    if format in FORMATS and format not in formats:
      others = ", ".join(formats)
      raise UserError(f"--format={format} does not read --{flag}, which is for {others}: leave out --{flag}")


def open_importer(format: str, options: Options) -> Importer:
  """Returns the importer of a format.

  Raises:
    UserError: the format is unknown, or the input is not there.
  """
  from jflow.data.importers import llava, parquet, text, tfds, webdataset
  from jflow.world import importer

  classes = {
    "llava-jsonl": llava.Llava,
    "webdataset": webdataset.WebDataset,
    "parquet": parquet.Parquet,
    "text": text.Text,
    "tfds": tfds.Tfds,
    "shapes": importer.World,
  }
  if format not in classes:
    raise UserError(f"--format={format} is unknown: use one of {', '.join(FORMATS)}")
  if format != "shapes" and not options.input:
    raise UserError(f"--format={format} needs --input")
  if format == "shapes" and options.input:
    raise UserError("--format=shapes draws its own pictures: leave out --input")
  return classes[format](options)
