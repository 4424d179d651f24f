"""The prepared data set: a directory of ArrayRecord shards in TFDS's layout, with images in their original encoding.

It lies on this machine or in a store, whose shards are read through a cache (cache.py).

  features.json, dataset_info.json                      read by tfds.builder_from_directory(DIR)
  jflow_TASK-train.array_record-00000-of-00002          id, images, text, conversations (JSON), meta (JSON)
  outlines-00000-of-00002.jsonl.gz                      the same records without images, to plan rows with
  summary.json                                          schema, task, accepted, rejected by reason, filtered, ...
  signatures-00000-of-00002.npy                         signatures.py of its records, where duplicates were dropped
  sha256sums.txt                                        hash and name of each shard and its outlines
  rejected.jsonl                                        every record that was left out: where, message, reason

`meta` holds the SHA-256 of every image, which is verified on load, since Pillow decodes many damaged images without an
error.
"""

import errno
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jflow import files, stores
from jflow.batch import TASKS
from jflow.data.records import DIGITS, Record, RecordError, Turn
from jflow.data.store import shards
from jflow.data.store.cache import Cache
from jflow.errors import Stopped, UserError
from jflow.strict_json import Malformed, parse

SCHEMA = 1
SUMMARY = "summary.json"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


def dataset_name(task: str) -> str:
  """Returns the name of the data set in TFDS."""
  return f"jflow_{task}"


def shard_name(task: str, shard: int, shards: int) -> str:
  return f"{dataset_name(task)}-train.array_record-{shard:05d}-of-{shards:05d}"


def signature_name(shard: int, shards: int) -> str:
  return f"signatures-{shard:05d}-of-{shards:05d}.npy"


def outline_name(shard: int, shards: int) -> str:
  return f"outlines-{shard:05d}-of-{shards:05d}.jsonl.gz"


def features() -> Any:
  """Returns the TFDS features of a record. Images are raw bytes, which TFDS does not decode."""
  import tensorflow_datasets as tfds

  return tfds.features.FeaturesDict(
    {
      "id": tfds.features.Text(),
      "images": tfds.features.Sequence(tfds.features.Tensor(shape=(), dtype=np.object_)),
      "text": tfds.features.Text(),
      "conversations": tfds.features.Text(),
      "meta": tfds.features.Text(),
    }
  )


class ShardWriter:
  """A writer of one shard and its outlines. Nothing is complete before `close`."""

  def __init__(self, path: str, outline_path: str):
    from array_record.python import array_record_module
    from tensorflow_datasets.core import example_serializer

    self._path = path
    self._features = features()
    self._serializer = example_serializer.ExampleSerializer(self._features.get_serialized_info())
    # One record per group, for random access.
    self._writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
    self._outlines = gzip.GzipFile(outline_path, "wb", compresslevel=1, mtime=0)
    self.records = self.images = self.bytes = 0
    self.digest = hashlib.sha256()

  def write(self, record: Record, meta: dict[str, Any]) -> None:
    """Appends a record, whose images are encoded bytes; `meta` is kept beside it as JSON."""
    hashes = [hashlib.sha256(image).hexdigest() for image in record.images]
    conversations = json.dumps(record.turns, ensure_ascii=False)
    example = self._serializer.get_tf_example(
      self._features.encode_example(
        {
          "id": record.id,
          "images": list(record.images),
          "text": record.text,
          "conversations": conversations,
          "meta": json.dumps({**meta, "sha256": hashes}),  # ASCII: it may hold lone surrogates
        }
      )
    ).SerializeToString(deterministic=True)  # else the order of its fields is another in every process
    call_writer(self._path, self._writer.write, example)
    outline: list[Any] = [record.id, len(record.images), record.text, record.turns]
    as_line = lambda outline: json.dumps(outline, ensure_ascii=False).encode("utf-8") + b"\n"
    self.digest.update(as_line(outline) + "".join(hashes).encode())
    outline[1] = [name[:DIGITS] for name in hashes] or 0
    self._outlines.write(as_line(outline))
    self.records += 1
    self.images += len(record.images)
    self.bytes += len(example)

  def close(self) -> dict[str, Any]:
    """Completes the files; returns what a part's report says of them."""
    call_writer(self._path, self._writer.close)
    self._outlines.close()
    return {
      "records": self.records,
      "images": self.images,
      "bytes": self.bytes,
      "digest": self.digest.hexdigest(),
      "file_bytes": os.path.getsize(self._path),
    }


def call_writer(path: str, function: Callable[..., Any], *arguments: Any) -> None:
  """Calls a writer of ArrayRecord; its failures, such as a full disk, become an `OSError` that names the file."""
  try:
    function(*arguments)
  except RuntimeError as error:
    raise OSError(errno.EIO, str(error).split(";")[0], path) from None


def write_metadata(directory: str, task: str, shard_lengths: Sequence[int], num_bytes: int) -> None:
  """Writes features.json and dataset_info.json for the shards of a directory."""
  import tensorflow_datasets as tfds

  template = tfds.core.ShardedFileTemplate(
    dataset_name=dataset_name(task),
    data_dir=directory,
    split="train",
    filetype_suffix="array_record",
    template=_TEMPLATE,
  )
  split = tfds.core.SplitInfo(
    name="train", shard_lengths=list(shard_lengths), num_bytes=num_bytes, filename_template=template
  )
  # check_data would read an example through TensorFlow.
  tfds.folder_dataset.write_metadata(
    data_dir=directory,
    features=features(),
    split_infos=[split],
    filename_template=_TEMPLATE,
    check_data=False,
    description=f"Records for JanusFlow, task {task}, schema {SCHEMA}.",
  )


def decoded(features: Any, entry: bytes) -> tuple[Record, dict[str, Any]]:
  """The record of an entry of a shard, and its metadata; whatever the readers raise where it is damaged."""
  example = features.deserialize_example_np(entry)
  turns = tuple(Turn(*turn) for turn in json.loads(example["conversations"]))
  images = tuple(bytes(image) for image in example["images"])
  return Record(example["id"].decode(), images, example["text"].decode(), turns), json.loads(example["meta"])


class PreparedSource:
  """The records of a prepared data set; a `Source`.

  Attributes:
    directory: its path.
    cache: of a store's shards.
    fingerprint: hash of its records.
    outline_paths: files of the outlines, one per shard.
    shard_lengths: records of each shard.
    shard_bytes: its size.
  """

  def __init__(self, directory: str, task: str, cache: Cache | None = None):
    """Opens a directory.

    Args:
      directory: of this machine or, with a cache, of a store.
      task: of its records.
      cache: of the copies of a store's shards.

    Raises:
      UserError: it is not a complete prepared data set of this task.
    """
    self.directory, self.cache = directory, cache
    summary = read_summary(directory)
    self.fingerprint = summary["fingerprint"]
    if summary["task"] != task:
      raise UserError(
        f"{directory} holds {summary['task']} records and is listed in data.sources.{task}: "
        f"prepare the source again with --task={task}"
      )
    lengths, self.shard_bytes = summary["shard_lengths"], summary["shard_bytes"]
    self.shard_lengths = lengths
    names = [shard_name(task, i, len(lengths)) for i in range(len(lengths))]
    outlines = [outline_name(i, len(lengths)) for i in range(len(lengths))]
    self.outline_paths = [stores.join(directory, name) for name in outlines]
    again = "prepare the source again"
    for name, found, size in zip(names, shards.sizes(directory, names + outlines, again), summary["shard_bytes"]):
      if found != size:
        path = stores.join(directory, name)
        raise UserError(f"{path} has {found:,} bytes, and must have {size:,}: {again}")
    self._length = sum(lengths)
    self._records = shards.open_entries(directory, names, lengths, cache, again)
    self._features = features()

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Record:
    """Returns a record.

    Raises:
      RecordError: the record is damaged ("corrupt"), or an image does not match its hash ("checksum").
    """
    where = f"record {index} of {self.directory}"
    try:
      record, meta = decoded(self._features, self._records[index])
      hashes = meta["sha256"]
    except (Stopped, UserError):  # of a store
      raise
    except Exception as error:  # damage may raise any exception in the readers
      raise RecordError("corrupt", f"{where} cannot be read ({type(error).__name__})") from None
    if [hashlib.sha256(image).hexdigest() for image in record.images] != hashes:
      raise RecordError("checksum", f"an image of {where} is not what was stored")
    return record

  def outlines(self, shards: slice = slice(None)) -> Iterator[Record]:
    """Yields the records of some shards in order without reading their images; see `read_outlines`."""
    for path, length in zip(self.outline_paths[shards], self.shard_lengths[shards]):
      yield from read_outlines(path, length)


def read_outlines(path: str, records: int | None = None) -> Iterator[Record]:
  """Yields the records of a shard with `records.digest` in place of each image, or None, as of earlier versions.

  Args:
    path: the file.
    records: the number that it must hold.

  Raises:
    UserError: the file is damaged.
  """
  number = 0
  try:
    with stores.open_file(path) as raw, gzip.open(raw, "rb") as lines:
      for number, line in enumerate(lines, 1):
        if number == records:  # as many as expected, or more
          number += len(lines.read(1))
        yield _outline(parse(line))
    if records is not None and number != records:
      raise ValueError
  except (OSError, EOFError, ValueError, zlib.error) as error:
    if getattr(error, "errno", None):  # the disk or the store, not the data
      raise Stopped(f"{path} cannot be read ({error.strerror}): start again") from None
    raise UserError(f"{path} is damaged ({type(error).__name__}): prepare the source again") from None


def _outline(value: Any) -> Record:
  match value:
    case [str(name), int() | list() as images, str(text), [*turns]]:
      if isinstance(images, int):
        images = [None] * images if 0 <= images < 2**20 else [images]
      sound = all(image is None or isinstance(image, str) and len(image) == DIGITS for image in images)
      if sound and all(isinstance(turn, list) and list(map(type, turn)) == [str, str] for turn in turns):
        return Record(name, tuple(images), text, tuple(Turn(*turn) for turn in turns))
  raise ValueError("not an outline")


def read_summary(directory: str) -> dict[str, Any]:
  """Returns the summary of a prepared data set.

  Raises:
    UserError: the directory is not one, or was written with another schema.
  """
  try:
    summary = parse(stores.read_bytes(stores.join(directory, SUMMARY)))
    schema = summary["schema"]
    whole = schema != SCHEMA or _is_whole(summary)
  except (OSError, Malformed, KeyError, TypeError):
    whole = False
  if not whole:
    raise UserError(f"{directory} is not a data set that `jflow prepare` wrote (no readable {SUMMARY})") from None
  if schema != SCHEMA:
    raise UserError(f"{directory} has schema {schema}, and this version reads schema {SCHEMA}: prepare it again")
  return summary


def _is_whole(summary: dict[str, Any]) -> bool:
  """Whether a summary has all fields, each of its type."""
  lengths, sizes = summary["shard_lengths"], summary["shard_bytes"]
  return (
    files.are_counts(lengths)
    and files.are_counts(sizes)
    and len(lengths) == len(sizes) > 0
    and all(lengths)
    and sum(lengths) == summary["accepted"]
    and isinstance(summary["fingerprint"], str)
    and summary["task"] in TASKS
  )
