"""tfds: a data set that TFDS wrote in ArrayRecord or Parquet files, read without TensorFlow.

The input is the directory of one version, which holds dataset_info.json. Images are taken as they are stored, not
decoded and encoded again. What `prepare` wrote is such a directory too, so that it can be filtered again.
"""

import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jflow.data.importers import objects
from jflow.data.importers.importer import Item, Options
from jflow.data.records import RecordError
from jflow.errors import UserError


class Tfds:
  """See the top of the module."""

  images_beside = False
  left_out: dict[str, int] = {}

  def __init__(self, options: Options):
    self._options = options
    if not os.path.isfile(os.path.join(options.input, "dataset_info.json")):
      raise UserError(f"{options.input} is no TFDS data set: name the directory that holds dataset_info.json")
    features = _builder(options.input).info.features
    names = sorted(features)
    for flag in ("image_column", "text_column"):
      if getattr(options, flag) and getattr(options, flag) not in names:
        raise UserError(
          f"{options.input} has no feature {getattr(options, flag)!r}: --{flag} is one of {', '.join(names)}"
        )
    if not options.text_column:
      objects.require_text(options.input, names, options.task, "feature")
    self._image = options.image_column or objects.spelled(names, objects.IMAGES)
    if not self._image and options.task != "text":
      raise UserError(
        f"{options.input} has no feature of images: name it by --image_column, one of {', '.join(names)}"
      )

  def files(self) -> list[str]:
    # Not the plans and lengths that runs keep beside the records.
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
    count, size = splits[self._options.split].num_examples, self._options.part_records
    return [(i, min(i + size, count)) for i in range(0, count, size)]

  def work(self, part: tuple[int, int]) -> int:
    return part[1] - part[0]

  def items(self, part: tuple[int, int]) -> Iterator[Item]:
    from tensorflow_datasets.core import example_parser

    features = _builder(self._options.input).info.features
    source = _open(self._options.input, self._options.split)
    # The example as it is stored: the features' own decoding would unpack every image.
    parser = example_parser.ExampleParserNp(features.get_serialized_info())
    for index in range(*part):
      where = f"{self._options.input} {self._options.split}[{index}]"
      try:
        fields = parser.parse_example(bytes(source[index]))
      except Exception as error:  # the readers raise what the damage makes of them
        yield Item(where, RecordError("corrupt", f"cannot be read ({type(error).__name__})"), {})
        continue
      yield self._item(where, index, dict(fields), features)

  def _item(self, where: str, index: int, fields: dict[str, Any], features: Mapping[str, Any]) -> Item:
    options = self._options
    try:
      stored = fields.pop(self._image, ())
      images = tuple(map(bytes, _listed(stored)))
      if options.task == "text" and not objects.is_conversation(fields):
        images = ()
      fields = {name: _plain(name, value, features) for name, value in fields.items()}
      meta = fields.pop("meta", None)
      if isinstance(meta, str) and meta.startswith("{"):
        fields = {**objects.notes(objects.parse_object(meta)), **fields}
      name = str(fields.get("id", index))
      record = objects.make_record(name, fields, images, options.task, options.text_column)
      return Item(where, record, objects.notes(fields, (options.text_column,)))
    except UnicodeDecodeError:
      return Item(where, RecordError("invalid_utf8", "a text is not valid UTF-8"), {})
    except RecordError as error:
      return Item(where, error, {})


def _builder(directory: str) -> Any:
  import tensorflow_datasets as tfds

  try:
    return tfds.builder_from_directory(directory)
  except Exception as error:  # whatever a damaged dataset_info.json makes of it
    raise UserError(f"{directory} cannot be read as a TFDS data set ({str(error)[:80]})") from None


@functools.lru_cache(maxsize=1)  # TFDS reads Parquet files whole
def _open(directory: str, split: str) -> Any:
  """Returns the examples of a split as they are stored: index -> bytes."""
  builder = _builder(directory)
  try:
    return builder.as_data_source(split).data_source
  except NotImplementedError:
    raise UserError(
      f"{directory} is stored as {builder.info.file_format.value}, which needs TensorFlow: "
      "let TFDS write it with file_format='array_record'"
    ) from None


def _listed(value: Any) -> list[Any]:
  return list(value) if isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value) else [value]


def _plain(name: str, value: Any, features: Mapping[str, Any]) -> Any:
  """Returns a stored value as JSON has it; a class label becomes its name, a sequence of objects their list.

  A label below 0 is TFDS's way to say that an example has none: it becomes None.
  """
  if hasattr(features[name], "int2str") and np.ndim(value) == 0:
    return features[name].int2str(int(value)) if value >= 0 else None
  if isinstance(value, Mapping):
    columns = {key: _plain_array(column) for key, column in value.items()}
    if all(isinstance(column, list) for column in columns.values()):
      return [dict(zip(columns, row)) for row in zip(*columns.values())]
    return columns
  return _plain_array(value)


def _plain_array(value: Any) -> Any:
  value = (
    value.tolist() if isinstance(value, (np.ndarray, np.generic)) and not isinstance(value, bytes) else value
  )
  if isinstance(value, (list, tuple)):
    return [_plain_array(each) for each in value]
  return value.decode("utf-8") if isinstance(value, bytes) else value
