"""Precomputed outputs of a writer's encoder for the images to write, beside the records of a prepared data set.

  latents-384/latents-00000-of-00002.array_record    one entry per record of the shard with the same number
  latents-384/latents.json                           schema, records, encoder, image_size, moments, seed, ...

So for rectified flow; `generation.base.Stored` names folder and array of a family ("codes-384", "codes"). The header
holds the array's shape under its name. An entry holds the square that was cut out (left, top, side: int32) and then the
array. The square is drawn once per record, from (seed, record), and is the same in every epoch, since SigLIP has to see
the square that was encoded. The entry of a record that cannot be decoded is empty. This file reads, stored_writer.py
writes, and training/encode.py runs the encoder.
"""

import hashlib
import json
import os
from typing import Any

import numpy as np

from jflow import files, stores
from jflow.data.records import RecordError
from jflow.data.store import shards
from jflow.errors import Stopped, UserError
from jflow.generation.base import Stored
from jflow.strict_json import Malformed, parse

SCHEMA = 1
BOX = np.dtype("<i4")


class StoredImages:
  """The encoded images of a prepared data set: record number -> (square, array). Picklable.

  Attributes:
    kind: what the arrays are.
    directory: their folder.
    encoder: fingerprint of the encoder that made them.
    fingerprint: hash of all that they depend on: records, encoder, sizes, seed.
  """

  def __init__(self, kind: Stored, source: Any, image_size: int, shape: tuple[int, ...]):
    """Opens the arrays beside the records of a source.

    Args:
      kind: of the run's family.
      source: the records, a `PreparedSource`.
      image_size: side in pixels of the run's images.
      shape: of an array of the run.

    Raises:
      UserError: there are none, or they were made from other records, in another size or by another kind of encoder.
    """
    if not hasattr(source, "directory"):
      raise UserError(
        "data.stored=True needs prepared data sets, and a source of the run is drawn on the fly: write it with "
        "`prepare` first, as in --format=shapes"
      )
    self.kind, self.directory = kind, folder(kind, source.directory, image_size)
    again = f"make them again: {_command(kind, source.directory)}"
    header = _read_header(kind, self.directory, source.directory, image_size, again)
    if header["records"] != source.fingerprint:
      raise UserError(f"{self.directory} was made from other records than {source.directory} holds now; {again}")
    for what, theirs, ours in (
      ("pictures", header["image_size"], image_size),
      (kind.array, tuple(header[kind.array]), shape),
    ):
      if theirs != ours:
        raise UserError(f"{self.directory} holds {what} of {theirs}, and this run has {ours}; {again}")
    self.encoder = header["encoder"]
    made_from = [header.get(name) for name in ("records", "encoder", "image_size", kind.array, "seed")]
    self.fingerprint = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    self._shape = shape
    lengths = header["shard_lengths"]
    names = [shard_name(kind, i, header) for i in range(len(lengths))]
    for name, found, size in zip(names, shards.sizes(self.directory, names, again), header["shard_bytes"]):
      if found != size:
        raise UserError(f"{stores.join(self.directory, name)} has {found:,} and must have {size:,} bytes; {again}")
    self._entries = shards.open_entries(self.directory, names, lengths, source.cache, again)

  def __getitem__(self, index: int) -> tuple[tuple[int, int, int], np.ndarray]:
    """Returns the square (left, top, side) in the upright image, and its array.

    Raises:
      RecordError: the entry is damaged, or the image could not be decoded.
    """
    try:
      entry = self._entries[index]
      box, array = entry[: 3 * BOX.itemsize], entry[3 * BOX.itemsize :]
      box = tuple(np.frombuffer(box, BOX).tolist())
      return box, np.frombuffer(array, array_type(self.kind)).reshape(self._shape)
    except (Stopped, UserError):  # of a store
      raise
    except Exception as error:  # damage may raise any exception in the reader
      raise RecordError(
        self.kind.name, f"entry {index} of {self.directory} cannot be used ({type(error).__name__})"
      ) from None


def folder(kind: Stored, directory: str, image_size: int) -> str:
  """Returns the folder for the encoded images of a prepared data set."""
  return stores.join(directory, f"{kind.name}-{image_size}")


def array_type(kind: Stored) -> np.dtype:
  """The array's type on disk, which is little-endian (bfloat16 knows no other order)."""
  dtype = np.dtype(kind.dtype)
  return dtype.newbyteorder("<") if dtype.isbuiltin == 1 else dtype


def _command(kind: Stored, directory: str) -> str:
  return f"python -m jflow prepare --{kind.name} --input={directory} --checkpoint=..."


def header_name(kind: Stored) -> str:
  return f"{kind.name}.json"


def shard_name(kind: Stored, number: int, header: dict[str, Any]) -> str:
  return f"{kind.name}-{number:05d}-of-{len(header['shard_lengths']):05d}.array_record"


def _read_header(kind: Stored, path: str, directory: str, image_size: int, again: str) -> dict[str, Any]:
  """Returns the contents of the header. `again`: how to make the arrays again, for messages."""
  file = stores.join(path, header_name(kind))
  try:
    header = parse(stores.read_bytes(file))
    schema = header["schema"]
    if schema == SCHEMA:
      _check_header(kind, header)
  except FileNotFoundError:
    names = os.listdir(directory) if not stores.is_address(directory) else ()
    others = sorted(name for name in names if name.startswith(f"{kind.name}-"))
    there = f"; there are: {', '.join(others)}" if others else ""
    raise UserError(
      f"data.stored=True, and {directory} has no {kind.name} of {image_size} pixels{there}; make them: "
      f"{_command(kind, directory)}"
    ) from None
  except (Malformed, KeyError, TypeError) as error:
    raise UserError(f"{file} is damaged ({error}): remove {path}; {again}") from None
  if schema != SCHEMA:
    raise UserError(f"{path} has schema {schema}, and this version reads {SCHEMA}; {again}")
  return header


def _check_header(kind: Stored, header: dict[str, Any]) -> None:
  """Raises Malformed, or KeyError, where a field of a header is missing or of another type."""
  numbers = (kind.array, "shard_lengths", "shard_bytes")
  if not all(files.are_counts(header[name]) for name in numbers):
    raise Malformed(f"{', '.join(numbers)} must be lists of integers")
  if len(header["shard_lengths"]) != len(header["shard_bytes"]):
    raise Malformed("shard_lengths and shard_bytes must be of one length")
  if not (isinstance(header["records"], str) and isinstance(header["encoder"], str)):
    raise Malformed("records and encoder must be strings")
  header["image_size"]
