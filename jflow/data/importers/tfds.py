"""tfds: a data set that TFDS wrote in ArrayRecord or Parquet files, read without TensorFlow.

The input is the directory of one version, which holds dataset_info.json. Images are copied as stored, not decoded and
encoded again. A prepared data set is such a directory too, so that it can be filtered again.
"""

import functools
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jflow import git_lfs
from jflow.data.importers import inputs, json_texts, keys, objects
from jflow.data.importers.cells import broken_in
from jflow.data.importers.importer import Item, Options, make_item
from jflow.data.records import Record, RecordError, Unwanted
from jflow.errors import UserError

_FEATURES = "tensorflow_datasets.core.features."


class Tfds:
  """The importer of tfds; see the top of the module."""

  flags = frozenset({"image_column", "part_records", "split", "text_column"})
  reads_input = True
  images_beside = False
  left_out: dict[str, int] = {}

  def __init__(self, options: Options):
    self._options = options
    inputs.refuse_address(options.input, "tfds")
    if not os.path.isfile(os.path.join(options.input, "dataset_info.json")):
      raise UserError(f"{options.input} is not a TFDS data set: name the directory that holds dataset_info.json")
    git_lfs.check(self.files())
    features = _builder(options.input).info.features
    names = sorted(features)
    for flag in ("image_column", "text_column"):
      if getattr(options, flag) and getattr(options, flag) not in names:
        raise UserError(
          f"{options.input} has no feature {getattr(options, flag)!r}: --{flag} is one of {', '.join(names)}"
        )
    if not options.text_column:
      keys.require_text(options.input, names, options.task, "feature")
    self._image = options.image_column or keys.spelled(names, keys.IMAGES)
    if not self._image and options.task != "text":
      raise UserError(f"{options.input} has no feature of images: name it by --image_column, one of {', '.join(names)}")

  def files(self) -> list[str]:
    # Without the plans and lengths that runs keep beside the records.
    return sorted(
      entry.path
      for entry in os.scandir(self._options.input)
      if entry.is_file() and ("-of-" in entry.name or entry.name.endswith(".json"))
    )

  def parts(self) -> list[tuple[int, int]]:
    splits = _builder(self._options.input).info.splits
    if self._options.split not in splits:
      raise UserError(
        f"{self._options.input} has no split {self._options.split!r}: --split is one of {', '.join(splits)}"
      )
    split, size = splits[self._options.split], self._options.part_records
    _check_shards(split)
    return [(i, min(i + size, split.num_examples)) for i in range(0, split.num_examples, size)]

  def work(self, part: tuple[int, int]) -> int:
    return part[1] - part[0]

  def items(self, part: tuple[int, int]) -> Iterator[Item]:
    from tensorflow_datasets.core import example_parser

    features = _builder(self._options.input).info.features
    source = _open(self._options.input, self._options.split)
    # The example as stored: the features' own decoding would decode every image.
    parser = example_parser.ExampleParserNp(features.get_serialized_info())
    for index in range(*part):
      where = f"{self._options.input} {self._options.split}[{index}]"
      try:
        fields = dict(parser.parse_example(bytes(source[index])))
      except Exception as error:  # damage may raise any exception in the readers
        yield Item(where, RecordError("corrupt", f"cannot be read ({type(error).__name__})"), {})
        continue
      yield make_item(where, functools.partial(self._read, index, fields, features))

  def _read(self, index: int, fields: dict[str, Any], features: Mapping[str, Any]) -> tuple[Record, dict[str, Any]]:
    options = self._options
    images = tuple(_listed(fields.pop(self._image, ())))
    if options.task == "text" and not keys.is_conversation(fields):
      images = ()
    if not all(isinstance(image, bytes) for image in images):
      raise RecordError("bad_field", f'"{self._image}" must hold encoded images')
    fields = {name: _plain(name, value, features) for name, value in fields.items()}
    meta = fields.pop("meta", None)
    if isinstance(meta, str) and meta.startswith("{"):
      fields = {**_notes_in(meta), **fields}
    name = str(index if broken_in(fields.get("id")) else fields.get("id", index))
    try:
      record = objects.make_record(name, fields, images, options.task, options.text_column)
    except Unwanted:
      raise
    except RecordError as error:
      raise broken_in(fields) or error from None
    return record, objects.notes(fields, (options.text_column,))


def _notes_in(meta: str) -> dict[str, Any]:
  """Returns the metadata that `prepare` kept of a record; empty where they are unreadable."""
  try:
    return objects.notes(json_texts.parse_object(meta))
  except RecordError:
    return {}


def _check_shards(split: Any) -> None:
  """Checks that the files of a split have the numbers of records in dataset_info.json.

  Raises:
    UserError: a file is missing, cannot be opened, or has another number of records.
  """
  try:
    paths, lengths = list(map(str, split.filepaths)), list(map(int, split.shard_lengths))
  except Exception as error:  # a damaged dataset_info.json may raise any exception
    raise UserError(
      f"the files of the split {split.name!r} are not said in dataset_info.json ({str(error)[:80]}): fetch it again"
    ) from None
  if len(paths) != len(lengths):
    raise UserError(f"the split {split.name!r} has {len(paths):,} files and {len(lengths):,} shardLengths")
  for path, length in zip(paths, lengths):
    if not os.path.isfile(path):
      raise UserError(f"{path} is missing: fetch it again")
    try:
      records = _records_in(path, length)
    except Exception as error:  # as in `items`
      raise UserError(f"{path} cannot be read ({str(error)[:80]}): fetch it again") from None
    if records != length:
      raise UserError(f"{path} holds {records:,} records, and dataset_info.json says {length:,}: fetch both again")


def _records_in(path: str, otherwise: int) -> int:
  """Returns the number of records in a file; `otherwise` where its format does not store it."""
  name = os.path.basename(path)
  if ".parquet" in name:
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(path).num_rows
  if ".array_record" not in name:
    return otherwise
  from array_record.python import array_record_module

  reader = array_record_module.ArrayRecordReader(path)
  try:
    return reader.num_records()
  finally:
    reader.close()


def _builder(directory: str) -> Any:
  import tensorflow_datasets as tfds

  _check_features(os.path.join(directory, "features.json"))
  try:
    return tfds.builder_from_directory(directory)
  except Exception as error:  # a damaged dataset_info.json may raise any exception
    raise UserError(f"{directory} cannot be read as a TFDS data set ({str(error)[:80]})") from None


def _check_features(path: str) -> None:
  """Checks that a description of features names only TFDS's own classes, since TFDS imports any class named there.

  Raises:
    UserError: it names another class, or cannot be read.
  """
  try:
    with open(path, encoding="utf-8") as file:
      waiting = [json.load(file)]
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} cannot be read ({type(error).__name__}): fetch it again") from None
  while waiting:
    value = waiting.pop()
    waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    names = [value.get("pythonClassName"), value.get("type")] if isinstance(value, dict) else []
    for name in names:
      if isinstance(name, str) and not name.startswith(_FEATURES):
        raise UserError(f"{path} names a class that is not TFDS's own, {name[:80]!r}, which is not imported")


@functools.lru_cache(maxsize=1)  # TFDS reads Parquet files whole
def _open(directory: str, split: str) -> Any:
  """Returns the examples of a split as stored: index -> bytes."""
  builder = _builder(directory)
  try:
    return builder.as_data_source(split).data_source
  except NotImplementedError:
    raise UserError(
      f"{directory} is stored as {builder.info.file_format.value}, which needs TensorFlow: "
      "let TFDS write it with file_format='array_record'"
    ) from None
  except Exception as error:  # as in `items`
    raise UserError(f"{directory}, split {split!r}, cannot be read ({str(error)[:80]}): fetch it again") from None


def _listed(value: Any) -> list[Any]:
  return list(value) if isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value) else [value]


def _plain(name: str, value: Any, features: Mapping[str, Any]) -> Any:
  """Converts a stored value to JSON types; a class label becomes its name, a sequence of objects their list.

  A label below 0, TFDS's mark of an example without one, becomes None. An unreadable part becomes a `RecordError`.
  """
  try:
    if hasattr(features[name], "int2str") and np.ndim(value) == 0:
      return features[name].int2str(int(value)) if value is not None and value >= 0 else None
  except ValueError:
    return RecordError("bad_field", f'"{name}" has no class {value}')
  if isinstance(value, Mapping):
    columns = {key: _plain_array(column) for key, column in value.items()}
    if not all(isinstance(column, list) for column in columns.values()):
      return columns
    if len(set(map(len, columns.values()))) > 1:
      return RecordError("bad_field", f'the parts of "{name}" have different lengths')
    return [dict(zip(columns, row)) for row in zip(*columns.values())]
  return _plain_array(value)


def _plain_array(value: Any) -> Any:
  value = value.tolist() if isinstance(value, (np.ndarray, np.generic)) and not isinstance(value, bytes) else value
  if isinstance(value, (list, tuple)):
    return [_plain_array(each) for each in value]
  try:
    return value.decode("utf-8") if isinstance(value, bytes) else value
  except UnicodeDecodeError:
    return RecordError("invalid_utf8", "a text is not valid UTF-8")
