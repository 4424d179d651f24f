"""The protocol of an importer: one input, cut into parts, each a stream of items."""

import dataclasses
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

from jflow.data.records import Record, RecordError
from jflow.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
  """The flags of `prepare`; each importer reads some of them.

  Attributes:
    input: file, folder, or pattern; empty where the format reads no files.
    task: "understanding", "generation" or "text".
    part_records: records of a part at most, where a part is cut by records.
    image_root: folder that relative image paths start from; None is the folder of the input.
    image_column, text_column: the column or key of images and texts; empty: the first usual name.
    documents: the unit of a document in plain text files: "file", "paragraph" or "line".
    split: of a TFDS data set.
    records, seed, image_size: of a format that draws its images: their number, choice and size.
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


# The fields of `Options` that not every format reads.
FLAGS = frozenset(field.name for field in dataclasses.fields(Options)) - {"input", "task"}


class Item(NamedTuple):
  """One line, sample or row of the input."""

  where: str  # for messages: file and line
  record: Record | RecordError  # images encoded
  meta: dict[str, Any]  # metadata of the input, kept with the record
  work: int = 1  # its share of the part's work


class Importer(Protocol):
  """A reader of one input. Picklable, so that processes can read its parts.

  Attributes:
    flags: the fields of `FLAGS` that it reads.
    reads_input: whether it reads files, which `Options.input` names.
    images_beside: whether images may be files of their own, which `files` does not list.
    left_out: numbers of files that are not read, by reason; see `inputs.input_files`.
  """

  flags: ClassVar[frozenset[str]]
  reads_input: ClassVar[bool]
  images_beside: bool
  left_out: Mapping[str, int]

  def __init__(self, options: Options): ...

  def parts(self) -> list[Any]:
    """Returns the parts, each small and picklable. Each becomes a shard."""
    ...

  def work(self, part: Any) -> int:
    """Returns the size of a part, in records or bytes: the unit of `Item.work`."""
    ...

  def items(self, part: Any) -> Iterator[Item]:
    """Yields the items of a part, with a `RecordError` in place of an unusable one."""
    ...

  def files(self) -> list[str]:
    """Returns the input files, so that a restart can tell whether they changed."""
    ...


def make_item(where: str, read: Callable[[], tuple[Record, dict[str, Any]]], work: int = 1) -> Item:
  """Returns the item of one record; any fault of its own costs only this record.

  Args:
    where: for messages.
    read: returns the record and its metadata, or raises `RecordError`. Other exceptions, except for failures of
      the machine or of a store, become the reason "malformed", with the class and the place.
    work: see `Item`.
  """
  try:
    return Item(where, *read(), work)
  except RecordError as error:
    return Item(where, error, {}, work)
  except (OSError, MemoryError, UserError):
    raise
  except Exception as error:
    place = traceback.extract_tb(error.__traceback__)[-1]
    message = f"cannot be read ({type(error).__name__} in {place.name}, line {place.lineno}: {str(error)[:80]})"
    return Item(where, RecordError("malformed", message), {}, work)
