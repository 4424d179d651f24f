"""What every importer is: one input, cut into parts, each part a stream of items."""

import dataclasses
import errno
import glob
import os
import re
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from jflow.data.records import Record, RecordError
from jflow.errors import UserError

# Of the machine, not of the data: the import ends, and goes on when the same command is run again.
_TRANSIENT = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@dataclasses.dataclass(frozen=True)
class Options:
  """What the importers are told; each reads what concerns it.

  Attributes:
    input: file, folder, or pattern; unused by "shapes".
    task: "understanding", "generation" or "text".
    part_records: records of a part at most, where a part is cut by records.
    image_root: folder that relative image paths start from; None is the folder of the input.
    image_column, text_column: the column or key of images and texts; empty: the first usual name.
    documents: of plain text files, what a document is: "file", "paragraph" or "line".
    split: of a TFDS data set.
    records, seed, image_size: of "shapes": how many records, which, and how large the pictures are.
  """

  input: str
  task: str
  part_records: int = 4096
  image_root: str | None = None
  image_column: str = ""
  text_column: str = ""
  documents: str = "file"
  split: str = "train"
  records: int = 1000
  seed: int = 0
  image_size: int = 384


class Item(NamedTuple):
  """One line, sample or row of the input."""

  where: str  # for messages: file and line
  record: Record | RecordError  # images encoded
  meta: dict[str, Any]  # what the input says of it, kept with the record
  work: int = 1  # its share of the part's work
  dropped: str = ""  # why it is of no use for the task, which is no error: "text_only" or "with_images"


class Importer(Protocol):
  """One input. Picklable, so that a process can read a part of it.

  Attributes:
    images_beside: whether images may be files of their own, which `files` does not list.
  """

  images_beside: bool

  def parts(self) -> list[Any]:
    """Returns the parts, each small and picklable. Each becomes a shard."""
    ...

  def work(self, part: Any) -> int:
    """Returns the size of a part, in records or bytes: the unit of `Item.work`."""
    ...

  def items(self, part: Any) -> Iterator[Item]:
    """Yields the items of a part. What cannot be used is a `RecordError` in its place."""
    ...

  def files(self) -> list[str]:
    """Returns the input files, so that a restart can tell whether they changed."""
    ...


def input_files(pattern: str, endings: tuple[str, ...], format: str) -> list[str]:
  """Returns the files that an input names, in order of their names.

  Args:
    pattern: a file; a folder, whose files with one of the endings count, in folders inside it too; a pattern with
      `*`; or a numbered range such as `00000..00041` in braces, each file of which must be there.
    endings: of file names in a folder, in lower case.
    format: for messages.

  Raises:
    UserError: nothing is found, or a file of a range is missing.
  """
  if "://" in pattern:
    raise UserError(f"--input={pattern} is an address: only local files are read, so fetch it first")
  if os.path.isfile(pattern):
    return [pattern]
  if os.path.isdir(pattern):
    found = sorted(
      os.path.join(folder, name)
      for folder, _, names in os.walk(pattern)
      for name in names
      if name.lower().endswith(endings) and not name.startswith(".")
    )
    wanted = f"no file that ends in {', '.join(endings)}"
  elif match := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", pattern):
    before, first, last, after = match.groups()
    numbers = range(int(first), int(last) + 1)
    found = [f"{before}{number:0{len(first)}d}{after}" for number in numbers]
    missing = [path for path in found if not os.path.isfile(path)]
    if missing:
      raise UserError(
        f"{missing[0]} is missing ({len(missing):,} of the {len(found):,} files of {pattern} are)"
      )
    wanted = "an empty range"
  else:
    found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    wanted = "no such file"
  if not found:
    raise UserError(
      f"input {pattern} not found: {wanted}; --format={format} reads a file, a folder or a pattern"
    )
  return found


def read_under(root: str, name: str) -> bytes:
  """Returns the contents of an image file below a folder.

  Raises:
    RecordError: it lies elsewhere ("outside_root"), is not there ("missing_image"), or is a folder, a pipe or a
      device ("not_a_file").
  """
  root = os.path.normpath(os.path.abspath(root))
  path = os.path.normpath(os.path.join(root, name))
  if os.path.commonpath([path, root]) != os.path.commonpath([root]):  # which writes "//folder" as "/folder"
    raise RecordError("outside_root", f"image {name:.200} lies outside {root}: set --image_root")
  try:
    if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for its writer
      raise RecordError("not_a_file", f"image {name:.200} is a folder, a pipe or a device")
    with open(path, "rb") as file:
      return file.read()
  except (OSError, ValueError) as error:
    if getattr(error, "errno", None) in _TRANSIENT:
      raise
    raise RecordError("missing_image", f"image {name:.200} not found in {root}: see --image_root") from None
