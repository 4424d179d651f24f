"""Precomputed VAE latents: the posterior of each image to write, beside the records of a prepared data set.

  latents-384/latents-00000-of-00002.array_record    one entry per record of the shard with the same number
  latents-384/latents.json                           schema, records, encoder, image_size, moments, seed, ...

An entry holds the square that was cut out (left, top, side: int32) and then the posterior's mean and log
variance, bfloat16[h, w, 2 C], before scaling. The square is drawn once per record, from (seed, record), and is the
same in every epoch, since SigLIP has to see the square that the VAE has encoded. The entry of a record that cannot be
decoded is empty. This file reads and writes; training/latents.py runs the VAE.
"""

import collections
import concurrent.futures
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from jflow import files
from jflow.data import images
from jflow.data.records import RecordError
from jflow.data.store import prepared
from jflow.data.store.partial import clear, open_partial, read_report, write_report
from jflow.errors import UserError
from jflow.progress import Progress
from jflow.strict_json import Malformed

SCHEMA = 1
_HEADER = "latents.json"
_BOX = np.dtype("<i4")
_AHEAD = 2  # batches that the readers are ahead of the VAE


class Latents:
  """The latents of a prepared data set: record number -> (square, moments of the posterior). Picklable.

  Attributes:
    directory: their folder.
    encoder: fingerprint of the VAE's encoder that made them.
    fingerprint: hash of all that they depend on: records, encoder, sizes, seed.
  """

  def __init__(self, source: Any, image_size: int, moments: tuple[int, ...]):
    """Opens the latents beside the records of a source.

    Args:
      source: the records, a `PreparedSource`.
      image_size: side in pixels of the run's images.
      moments: (h, w, 2 C) of its VAE.

    Raises:
      UserError: there are none, or they were made from other records, in another size or by another kind of VAE.
    """
    from array_record.python import array_record_data_source

    if not hasattr(source, "directory"):
      raise UserError(
        "data.latents=True needs prepared data sets, and a source of the run is drawn on the fly: write it with "
        "`prepare` first, as in --format=shapes"
      )
    self.directory = folder(source.directory, image_size)
    again = f"make them again: python -m jflow prepare --latents --input={source.directory} --checkpoint=..."
    header = _read_header(self.directory, source.directory, image_size, again)
    if header["records"] != source.fingerprint:
      raise UserError(f"{self.directory} was made from other records than {source.directory} holds now; {again}")
    for what, theirs, ours in (
      ("pictures", header["image_size"], image_size),
      ("moments", tuple(header["moments"]), moments),
    ):
      if theirs != ours:
        raise UserError(f"{self.directory} holds {what} of {theirs}, and this run has {ours}; {again}")
    self.encoder = header["encoder"]
    made_from = [header.get(name) for name in ("records", "encoder", "image_size", "moments", "seed")]
    self.fingerprint = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    self._moments = moments
    paths = [os.path.join(self.directory, _shard(i, header)) for i in range(len(header["shard_lengths"]))]
    for path, size in zip(paths, header["shard_bytes"]):
      if not os.path.isfile(path) or os.path.getsize(path) != size:
        raise UserError(f"{path} is missing or does not have its {size:,} bytes; {again}")
    self._entries = array_record_data_source.ArrayRecordDataSource(
      [f"{path}[0:{length}]" for path, length in zip(paths, header["shard_lengths"])]
    )

  def __getitem__(self, index: int) -> tuple[tuple[int, int, int], np.ndarray]:
    """Returns the square (left, top, side) in the upright image, and its moments, bfloat16[h, w, 2 C].

    Raises:
      RecordError: the entry is damaged, or the image could not be decoded.
    """
    try:
      entry = self._entries[index]
      box, moments = entry[: 3 * _BOX.itemsize], entry[3 * _BOX.itemsize :]
      box = tuple(np.frombuffer(box, _BOX).tolist())
      return box, np.frombuffer(moments, bfloat16).reshape(self._moments)
    except Exception as error:  # damage may raise any exception in the reader
      raise RecordError(
        "latents", f"entry {index} of {self.directory} cannot be used ({type(error).__name__})"
      ) from None


def folder(directory: str, image_size: int) -> str:
  """Returns the folder for the latents of a prepared data set."""
  return os.path.join(directory, f"latents-{image_size}")


def write(
  directory: str,
  image_size: int,
  moments: tuple[int, ...],
  encoder: str,
  encode: Callable[[np.ndarray], np.ndarray],
  batch_size: int,
  seed: int,
  threads: int,
) -> dict[str, Any]:
  """Writes the latents of a prepared data set, and returns the contents of latents.json.

  Shards that a killed run has finished are kept; the folder appears once all are complete.

  Args:
    directory: the data set, task "generation".
    image_size: side in pixels.
    moments: (h, w, 2 C).
    encoder: fingerprint of the encoder.
    encode: uint8[batch_size, H, W, 3] -> bfloat16[batch_size, h, w, 2 C].
    batch_size: images per call of `encode`.
    seed: of the squares.
    threads: that read and decode.

  Raises:
    UserError: the directory is not such a data set, has latents already, or cannot be written.
  """
  task = prepared.read_summary(directory)["task"]
  if task != "generation":
    raise UserError(f"--input={directory} holds {task} records: latents are for images to write, --task=generation")
  source = prepared.PreparedSource(directory, "generation")
  output = folder(directory, image_size)
  if os.path.exists(output):
    raise UserError(f"{output} exists: remove it to make the latents again")
  lengths = prepared.read_summary(directory)["shard_lengths"]
  header = {
    "schema": SCHEMA,
    "records": source.fingerprint,
    "encoder": encoder,
    "image_size": image_size,
    "moments": list(moments),
    "seed": seed,
    "shard_lengths": lengths,
  }
  partial = output + ".partial"
  with open_partial(partial, header, "--input"):
    try:
      reports = _write_shards(source, partial, header, encode, batch_size, threads)
      header["shard_bytes"] = [report["bytes"] for report in reports]
      header["rejected"] = dict(sum((collections.Counter(r["rejected"]) for r in reports), collections.Counter()))
      files.write_json(os.path.join(partial, _HEADER), header)
      files.publish(partial, output)
    except KeyboardInterrupt:
      raise KeyboardInterrupt("stopped; run the same command again to go on") from None
    except OSError as error:
      raise UserError(
        f"{error.filename or partial}: {error.strerror or error}; run the same command again to go on"
      ) from None
  for name in os.listdir(output):
    if name != _HEADER and not name.endswith(".array_record"):
      os.unlink(os.path.join(output, name))
  return header


def _write_shards(
  source: prepared.PreparedSource,
  partial: str,
  header: dict[str, Any],
  encode: Callable[[np.ndarray], np.ndarray],
  batch_size: int,
  threads: int,
) -> list[dict[str, Any]]:
  """Writes the missing shards, each with its report; returns the reports of all shards."""
  from array_record.python import array_record_module

  lengths, first, reports = header["shard_lengths"], 0, []
  read = lambda index: _picture(source, index, header["image_size"], header["seed"])
  with (
    Progress(sum(lengths), 0, "latents", "images") as bar,
    concurrent.futures.ThreadPoolExecutor(threads) as pool,
  ):
    for number, length in enumerate(lengths):
      path = os.path.join(partial, _shard(number, header))
      report = read_report(path + ".json")
      if report is None:
        clear([path])
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")
        lost: collections.Counter = collections.Counter()
        for entry in _entries(read, range(first, first + length), encode, batch_size, pool, lost):
          prepared.call_writer(path, writer.write, entry)
          bar.count(1)
        prepared.call_writer(path, writer.close)
        report = {"bytes": os.path.getsize(path), "rejected": lost}
        write_report(path + ".json", report, [path])
      else:
        bar.count(length)
      reports.append(report)
      first += length
  return reports


def _entries(
  read: Callable[[int], tuple[np.ndarray, tuple[int, int, int]] | RecordError],
  indices: range,
  encode: Callable[[np.ndarray], np.ndarray],
  batch_size: int,
  pool: concurrent.futures.Executor,
  lost: collections.Counter,
) -> Iterator[bytes]:
  """Yields the entries of records in order; the pool reads ahead while the VAE runs."""
  batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
  waiting: collections.deque = collections.deque()
  for number, batch in enumerate(batches + [None] * _AHEAD):
    if batch is not None:
      waiting.append([pool.submit(read, index) for index in batch])
    if number < _AHEAD or not waiting:
      continue
    found = [future.result() for future in waiting.popleft()]
    good = [item for item in found if not isinstance(item, RecordError)]
    encoded = iter(())
    if good:
      pixels = np.stack([pixels for pixels, _ in good])
      padding = np.repeat(pixels[-1:], batch_size - len(pixels), axis=0)  # one shape: one compilation
      encoded = iter(encode(np.concatenate([pixels, padding])))
    for item in found:
      if isinstance(item, RecordError):
        lost[item.reason] += 1
        yield b""
      else:
        yield np.asarray(item[1], _BOX).tobytes() + np.asarray(next(encoded), bfloat16).tobytes()


def _picture(
  source: prepared.PreparedSource, index: int, image_size: int, seed: int
) -> tuple[np.ndarray, tuple[int, int, int]] | RecordError:
  try:
    image = source[index].images[0]
    box = images.random_square(image, np.random.default_rng([seed, index]))
    return images.square(image, image_size, box), box
  except RecordError as error:
    return error


def _shard(number: int, header: dict[str, Any]) -> str:
  return f"latents-{number:05d}-of-{len(header['shard_lengths']):05d}.array_record"


def _read_header(path: str, directory: str, image_size: int, again: str) -> dict[str, Any]:
  """Returns the contents of latents.json. `again`: how to make the latents again, for messages."""
  try:
    header = files.read_object(os.path.join(path, _HEADER))
    schema = header["schema"]
    if schema == SCHEMA:
      _check_header(header)
  except FileNotFoundError:
    others = sorted(name for name in os.listdir(directory) if name.startswith("latents-"))
    there = f"; there are: {', '.join(others)}" if others else ""
    raise UserError(
      f"data.latents=True, and {directory} has no latents of {image_size} pixels{there}; make them: "
      f"python -m jflow prepare --latents --input={directory} --checkpoint=..."
    ) from None
  except (Malformed, KeyError, TypeError) as error:
    raise UserError(f"{os.path.join(path, _HEADER)} is damaged ({error}): remove {path}; {again}") from None
  if schema != SCHEMA:
    raise UserError(f"{path} has schema {schema}, and this version reads {SCHEMA}; {again}")
  return header


def _check_header(header: dict[str, Any]) -> None:
  """Raises Malformed, or KeyError, where a field of a header is missing or of another type."""
  numbers = ("moments", "shard_lengths", "shard_bytes")
  if not all(files.are_counts(header[name]) for name in numbers):
    raise Malformed(f"{', '.join(numbers)} must be lists of integers")
  if len(header["shard_lengths"]) != len(header["shard_bytes"]):
    raise Malformed("shard_lengths and shard_bytes must be of one length")
  if not (isinstance(header["records"], str) and isinstance(header["encoder"], str)):
    raise Malformed("records and encoder must be strings")
  header["image_size"]
