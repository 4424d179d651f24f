"""Precomputed outputs of a writer's encoder for the images to write, beside the records of a prepared data set.

  latents-384/latents-00000-of-00002.array_record    one entry per record of the shard with the same number
  latents-384/latents.json                           schema, records, encoder, image_size, moments, seed, ...

So for rectified flow; `generation.base.Stored` names folder and array of a family ("codes-384", "codes"). The header
holds the array's shape under its name. An entry holds the square that was cut out (left, top, side: int32) and then the
array. The square is drawn once per record, from (seed, record), and is the same in every epoch, since SigLIP has to see
the square that was encoded. The entry of a record that cannot be decoded is empty. This file reads and writes;
training/encode.py runs the encoder.
"""

import collections
import concurrent.futures
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jflow import files, stores
from jflow.data import images
from jflow.data.records import RecordError
from jflow.data.store import machines, prepared, shards
from jflow.data.store.partial import clear, open_partial, read_report, write_report
from jflow.errors import Stopped, UserError
from jflow.generation.base import Stored
from jflow.progress import Progress
from jflow.strict_json import Malformed, parse

SCHEMA = 1
_BOX = np.dtype("<i4")
_AHEAD = 2  # batches that the readers are ahead of the encoder


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
    names = [_shard(kind, i, header) for i in range(len(lengths))]
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
      box, array = entry[: 3 * _BOX.itemsize], entry[3 * _BOX.itemsize :]
      box = tuple(np.frombuffer(box, _BOX).tolist())
      return box, np.frombuffer(array, _type(self.kind)).reshape(self._shape)
    except (Stopped, UserError):  # of a store
      raise
    except Exception as error:  # damage may raise any exception in the reader
      raise RecordError(
        self.kind.name, f"entry {index} of {self.directory} cannot be used ({type(error).__name__})"
      ) from None


def folder(kind: Stored, directory: str, image_size: int) -> str:
  """Returns the folder for the encoded images of a prepared data set."""
  return stores.join(directory, f"{kind.name}-{image_size}")


def _type(kind: Stored) -> np.dtype:
  """The array's type on disk, which is little-endian (bfloat16 knows no other order)."""
  dtype = np.dtype(kind.dtype)
  return dtype.newbyteorder("<") if dtype.isbuiltin == 1 else dtype


def _command(kind: Stored, directory: str) -> str:
  return f"python -m jflow prepare --{kind.name} --input={directory} --checkpoint=..."


def _header_name(kind: Stored) -> str:
  return f"{kind.name}.json"


def write(
  kind: Stored,
  directory: str,
  image_size: int,
  shape: tuple[int, ...],
  encoder: str,
  encode: Callable[[np.ndarray], np.ndarray],
  batch_size: int,
  seed: int,
  threads: int,
  part: tuple[int, int] | None = None,
  merge: bool = False,
) -> dict[str, Any]:
  """Writes the encoded images of a prepared data set, and returns the contents of their header.

  Shards that a killed run has finished are kept; the folder appears once all are complete. The shares of many machines
  lie in folders of their own until then (machines.py).

  Args:
    kind: what the arrays are.
    directory: the data set, task "generation".
    image_size: side in pixels.
    shape: of an array.
    encoder: fingerprint of the encoder.
    encode: uint8[batch_size, H, W, 3] -> [batch_size, *shape].
    batch_size: images per call of `encode`.
    seed: of the squares.
    threads: that read and decode.
    part: (K, N) of `--part`: does only the K-th of N machines' share of the shards.
    merge: joins the shares of all machines in place of encoding.

  Raises:
    UserError: the directory is not such a data set, has such arrays already, or cannot be written, or a share that
      `merge` needs is missing, unfinished or of another encoder or data set.
  """
  if stores.is_address(directory):
    raise UserError(
      f"--input={directory} is in a store: {kind.name} are made beside records of this machine; copy both there after"
    )
  task = prepared.read_summary(directory)["task"]
  if task != "generation":
    raise UserError(f"--input={directory} holds {task} records: {kind.name} are for images to write, --task=generation")
  source = prepared.PreparedSource(directory, "generation")
  output = folder(kind, directory, image_size)
  lengths = prepared.read_summary(directory)["shard_lengths"]
  header = {
    "schema": SCHEMA,
    "records": source.fingerprint,
    "encoder": encoder,
    "image_size": image_size,
    kind.array: list(shape),
    "seed": seed,
    "shard_lengths": lengths,
  }
  if os.path.exists(output):
    if not part and (ended := _ended(kind, output, header)):
      return ended
    raise UserError(f"{output} exists: remove it to make the {kind.name} again")
  shares = machines.shares(output, header, len(lengths)) if merge else []
  partial = output + (machines.suffix(*part) if part else ".partial")
  own = range(part[0] - 1, len(lengths), part[1]) if part else range(len(lengths))
  with open_partial(partial, {**header, "machines": part[1]} if part else header, "--input"):
    try:
      if merge:
        reports = _joined(kind, partial, header, shares)
      else:
        reports = _write_shards(kind, source, partial, header, own, encode, batch_size, threads)
      header["shard_bytes"] = [report["bytes"] for report in reports]
      header["rejected"] = dict(sum((collections.Counter(r["rejected"]) for r in reports), collections.Counter()))
      if part:
        return header
      shards.write_checksums(partial, {name: one["sha256"] for r in reports for name, one in r["files"].items()})
      files.write_json(os.path.join(partial, _header_name(kind)), header)
      files.publish(partial, output)
    except KeyboardInterrupt:
      raise KeyboardInterrupt("stopped; run the same command again to go on") from None
    except OSError as error:
      raise UserError(
        f"{error.filename or partial}: {error.strerror or error}; run the same command again to go on"
      ) from None
  _tidy(kind, output)
  for share in shares:
    files.remove(share)
  return header


def _tidy(kind: Stored, output: str) -> bool:
  """Removes what was needed for unfinished work alone; returns whether there was any."""
  needed = (_header_name(kind), shards.CHECKSUMS)
  left = [name for name in os.listdir(output) if name not in needed and not name.endswith(".array_record")]
  for name in left:
    os.unlink(os.path.join(output, name))
  return bool(left)


def _ended(kind: Stored, output: str, header: dict[str, Any]) -> dict[str, Any] | None:
  """The header of an output whose making was killed at its very end, and what is left of that removed; None: it was
  not."""
  try:
    found = files.read_object(os.path.join(output, _header_name(kind)))
  except (OSError, Malformed):
    return None
  if any(found.get(name) != value for name, value in header.items()):
    return None
  left = machines.remove_left(output, header)
  return found if _tidy(kind, output) or left else None


def _joined(kind: Stored, partial: str, header: dict[str, Any], shares: Sequence[str]) -> list[dict[str, Any]]:
  """Links the shards of all machines into one folder; returns their reports, in order."""
  names = [_shard(kind, number, header) for number in range(len(header["shard_lengths"]))]
  paths = [os.path.join(shares[number % len(shares)], name) for number, name in enumerate(names)]
  reports = machines.reports(paths, shares)
  for path, name in zip(paths, names):
    clear([os.path.join(partial, name)])
    files.link(path, os.path.join(partial, name))
  return reports


def _write_shards(
  kind: Stored,
  source: prepared.PreparedSource,
  partial: str,
  header: dict[str, Any],
  own: Sequence[int],
  encode: Callable[[np.ndarray], np.ndarray],
  batch_size: int,
  threads: int,
) -> list[dict[str, Any]]:
  """Writes the missing shards of `own`, each with its report; returns the reports of these shards."""
  from array_record.python import array_record_module

  lengths, reports = header["shard_lengths"], []
  begins = [0, *itertools.accumulate(lengths)]
  read = lambda index: _picture(source, index, header["image_size"], header["seed"])
  with (
    Progress(sum(lengths[number] for number in own), 0, kind.name, "images") as bar,
    concurrent.futures.ThreadPoolExecutor(threads) as pool,
  ):
    for number in own:
      length, first = lengths[number], begins[number]
      path = os.path.join(partial, _shard(kind, number, header))
      report = read_report(path + ".json")
      if report is None:
        clear([path])
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")
        lost: collections.Counter = collections.Counter()
        for entry in _entries(_type(kind), read, range(first, first + length), encode, batch_size, pool, lost):
          prepared.call_writer(path, writer.write, entry)
          bar.count(1)
        prepared.call_writer(path, writer.close)
        report = write_report(path + ".json", {"bytes": os.path.getsize(path), "rejected": lost}, [path])
      else:
        bar.count(length)
      reports.append(report)
  return reports


def _entries(
  dtype: np.dtype,
  read: Callable[[int], tuple[np.ndarray, tuple[int, int, int]] | RecordError],
  indices: range,
  encode: Callable[[np.ndarray], np.ndarray],
  batch_size: int,
  pool: concurrent.futures.Executor,
  lost: collections.Counter,
) -> Iterator[bytes]:
  """Yields the entries of records in order; the pool reads ahead while the encoder runs."""
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
        yield np.asarray(item[1], _BOX).tobytes() + np.asarray(next(encoded), dtype).tobytes()


def _picture(
  source: prepared.PreparedSource, index: int, image_size: int, seed: int
) -> tuple[np.ndarray, tuple[int, int, int]] | RecordError:
  try:
    image = source[index].images[0]
    box = images.random_square(image, np.random.default_rng([seed, index]))
    return images.square(image, image_size, box), box
  except RecordError as error:
    return error


def _shard(kind: Stored, number: int, header: dict[str, Any]) -> str:
  return f"{kind.name}-{number:05d}-of-{len(header['shard_lengths']):05d}.array_record"


def _read_header(kind: Stored, path: str, directory: str, image_size: int, again: str) -> dict[str, Any]:
  """Returns the contents of the header. `again`: how to make the arrays again, for messages."""
  file = stores.join(path, _header_name(kind))
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
