"""Importers of common data formats, one file each; its first line names the format.

A new format is a file with a class like `importer.Importer`, and a line in `FORMATS`.
"""

from collections.abc import Collection

from jflow import registry
from jflow.data.importers.importer import FLAGS, Importer, Item, Options
from jflow.errors import UserError

# --format -> "module:class", imported at its first use.
FORMATS = {
  "llava-jsonl": "jflow.data.importers.llava:Llava",
  "imagefolder": "jflow.data.importers.imagefolder:ImageFolder",
  "webdataset": "jflow.data.importers.webdataset:WebDataset",
  "parquet": "jflow.data.importers.parquet:Parquet",
  "text": "jflow.data.importers.text:Text",
  "tfds": "jflow.data.importers.tfds:Tfds",
  "shapes": "jflow.world.importer:World",
}
__all__ = ["FORMATS", "Importer", "Item", "Options", "check_flags", "open_importer"]


def _importer_class(format: str) -> type[Importer]:
  return registry.load(FORMATS[format])


def check_flags(format: str, given: Collection[str]) -> None:
  """Checks that a format reads the flags that were given.

  Args:
    format: a key of FORMATS, or an unknown name.
    given: names of the fields of `Options` that the user has set.

  Raises:
    UserError: the format does not read one of them.
  """
  if format not in FORMATS:
    return
  own = _importer_class(format).flags
  for flag in [flag for flag in given if flag in FLAGS and flag not in own]:
    others = ", ".join(name for name in FORMATS if flag in _importer_class(name).flags)
    raise UserError(f"--format={format} does not read --{flag}, which is for {others}: leave out --{flag}")


def open_importer(format: str, options: Options) -> Importer:
  """Returns the importer of a format.

  Raises:
    UserError: the format is unknown, or the input is missing.
  """
  if format not in FORMATS:
    raise UserError(f"--format={format} is unknown: use one of {', '.join(FORMATS)}")
  cls = _importer_class(format)
  if cls.reads_input and not options.input:
    raise UserError(f"--format={format} needs --input")
  if not cls.reads_input and options.input:
    raise UserError(f"--format={format} reads no files: leave out --input")
  return cls(options)
