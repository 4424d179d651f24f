"""Importers: the layouts that people have their data in, one module each. The first line of each says what it reads."""

from jflow.data.importers.importer import Importer, Item, Options
from jflow.errors import UserError

FORMATS = ("llava-jsonl", "webdataset", "parquet", "text", "tfds", "shapes")
__all__ = ["FORMATS", "Importer", "Item", "Options", "open_importer"]


def open_importer(format: str, options: Options) -> Importer:
  """Returns the importer of a format.

  Raises:
    UserError: the format is unknown, or the input is not there.
  """
  from jflow.data.importers import llava, parquet, shapes, text, tfds, webdataset

  classes = {
    "llava-jsonl": llava.Llava,
    "webdataset": webdataset.WebDataset,
    "parquet": parquet.Parquet,
    "text": text.Text,
    "tfds": tfds.Tfds,
    "shapes": shapes.Shapes,
  }
  if format not in classes:
    raise UserError(f"--format={format} is unknown: use one of {', '.join(FORMATS)}")
  if format != "shapes" and not options.input:
    raise UserError(f"--format={format} needs --input")
  if format == "shapes" and options.input:
    raise UserError("--format=shapes draws its own pictures: leave out --input")
  if options.image_root and format not in ("llava-jsonl", "parquet"):
    raise UserError(f"--format={format} has no images beside its files: leave out --image_root")
  return classes[format](options)
