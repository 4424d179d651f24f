"""Encoded images of a prepared data set (stored.py), written shard by shard, here or in a store, by one machine or many."""

import collections
import concurrent.futures
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jflow import files, stores, uploads
from jflow.data import images
from jflow.data.records import RecordError
from jflow.data.store import machines, prepared, scratch, shards
from jflow.data.store.cache import Cache
from jflow.data.store.partial import clear, open_partial, read_report, write_report
from jflow.data.store.stored import BOX, SCHEMA, array_type, folder, header_name, shard_name
from jflow.errors import UserError
from jflow.generation.base import Stored
from jflow.progress import Progress
from jflow.strict_json import Malformed, parse

_AHEAD = 2  # batches that the readers are ahead of the encoder


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
  cache: Cache | None = None,
) -> dict[str, Any]:
  """Writes the encoded images of a prepared data set, and returns the contents of their header.

  Shards that a killed run has finished are kept; the folder appears once all are complete, in a store its header. The
  shares of many machines lie in folders of their own until then (machines.py).

  Args:
    kind: what the arrays are.
    directory: the data set, task "generation", here or in a store.
    image_size: side in pixels.
    shape: of an array.
    encoder: fingerprint of the encoder.
    encode: uint8[batch_size, H, W, 3] -> [batch_size, *shape].
    batch_size: images per call of `encode`.
    seed: of the squares.
    threads: that read and decode.
    part: (K, N) of `--part`: does only the K-th of N machines' share of the shards.
    merge: joins the shares of all machines in place of encoding.
    cache: of the shards of a store.

  Raises:
    UserError: the directory is not such a data set, has such arrays already, or cannot be written, or a share that
      `merge` needs is missing, unfinished or of another encoder or data set.
  """
  directory = directory.rstrip("/") if stores.is_address(directory) else directory
  summary = prepared.read_summary(directory)
  task, lengths = summary["task"], summary["shard_lengths"]
  if task != "generation":
    raise UserError(f"--input={directory} holds {task} records: {kind.name} are for images to write, --task=generation")
  source = prepared.PreparedSource(directory, "generation", cache)
  output = folder(kind, directory, image_size)
  header = {
    "schema": SCHEMA,
    "records": source.fingerprint,
    "encoder": encoder,
    "image_size": image_size,
    kind.array: list(shape),
    "seed": seed,
    "shard_lengths": lengths,
  }
  if _is_taken(kind, output):
    if not part and (ended := _ended(kind, output, header)):
      return ended
    raise UserError(f"{output} exists: remove it to make the {kind.name} again")
  shares = machines.shares(output, header, len(lengths)) if merge else []
  partial = output + (machines.suffix(*part) if part else ".partial")
  own = range(part[0] - 1, len(lengths), part[1]) if part else range(len(lengths))
  with open_partial(partial, {**header, "machines": part[1]} if part else header, "--input"):
    try:
      names = [shard_name(kind, number, header) for number in range(len(lengths))]
      if merge:
        paths = [stores.join(shares[number % len(shares)], name) for number, name in enumerate(names)]
        reports = machines.reports(paths, shares)
      else:
        paths = [stores.join(partial, name) for name in names]
        reports = _write_shards(kind, source, paths, header, own, encode, batch_size, threads)
      header["shard_bytes"] = [report["bytes"] for report in reports]
      header["rejected"] = dict(sum((collections.Counter(r["rejected"]) for r in reports), collections.Counter()))
      if part:
        return header
      known = {name: one["sha256"] for r in reports for name, one in r["files"].items()}
      (_finish_in_store if stores.is_address(output) else _finish)(kind, partial, output, paths, header, known)
    except KeyboardInterrupt:
      raise KeyboardInterrupt("stopped; run the same command again to go on") from None
    except OSError as error:
      raise UserError(
        f"{error.filename or partial}: {error.strerror or error}; run the same command again to go on"
      ) from None
  for unfinished in (partial, *shares):
    scratch.remove(unfinished)
  return header


def _is_taken(kind: Stored, output: str) -> bool:
  """Whether an output is there, or something else in its place; in a store, an unfinished one may be gone on with."""
  if not stores.is_address(output):
    return os.path.exists(output)
  names = stores.listed(output)
  ours = [name for name in names if name == shards.CHECKSUMS or name.endswith(".array_record")]
  return header_name(kind) in names or len(ours) < len(names)


def _finish(
  kind: Stored, partial: str, output: str, paths: Sequence[str], header: dict[str, Any], known: dict[str, str]
) -> None:
  """Makes the output of the finished shards, by a rename of the folder of unfinished work.

  Args:
    kind: of the arrays.
    partial: the folder of the unfinished work.
    output: the folder to make.
    paths: of the shards, in `partial` or in the shares of machines.
    header: the contents of the header.
    known: SHA-256 of each shard.
  """
  for path in paths:
    here = os.path.join(partial, os.path.basename(path))
    if path != here:
      clear([here])
      files.link(path, here)
  shards.write_checksums(partial, known)
  files.write_json(os.path.join(partial, header_name(kind)), header)
  files.publish(partial, output)
  _tidy(kind, output)


def _finish_in_store(
  kind: Stored, partial: str, output: str, paths: Sequence[str], header: dict[str, Any], known: dict[str, str]
) -> None:
  """`_finish` where both are in a store, which copies the shards and gets the header last."""
  for name in stores.listed(output):  # of an end that was killed
    if name not in known:
      stores.remove(stores.join(output, name))
  stores.each(lambda path: uploads.copy(path, stores.join(output, os.path.basename(path))), paths)
  with tempfile.TemporaryDirectory() as whole:
    shards.write_checksums(whole, known)
    files.write_json(os.path.join(whole, header_name(kind)), header)
    for name in (shards.CHECKSUMS, header_name(kind)):
      uploads.upload(os.path.join(whole, name), stores.join(output, name))


def _tidy(kind: Stored, output: str) -> bool:
  """Removes what was needed for unfinished work alone; returns whether there was any."""
  needed = (header_name(kind), shards.CHECKSUMS)
  left = [name for name in os.listdir(output) if name not in needed and not name.endswith(".array_record")]
  for name in left:
    os.unlink(os.path.join(output, name))
  return bool(left)


def _ended(kind: Stored, output: str, header: dict[str, Any]) -> dict[str, Any] | None:
  """The header of an output whose making was killed at its very end, and what is left of that removed; None: it was
  not."""
  try:
    found = parse(stores.read_bytes(stores.join(output, header_name(kind))))
  except (OSError, Malformed):
    return None
  if not isinstance(found, dict) or any(found.get(name) != value for name, value in header.items()):
    return None
  left = machines.remove_left(output, header)
  return found if (not stores.is_address(output) and _tidy(kind, output)) or left else None


def _write_shards(
  kind: Stored,
  source: prepared.PreparedSource,
  paths: Sequence[str],
  header: dict[str, Any],
  own: Sequence[int],
  encode: Callable[[np.ndarray], np.ndarray],
  batch_size: int,
  threads: int,
) -> list[dict[str, Any]]:
  """Writes the missing shards of `own`, paths by number, each with its report; returns the reports of these shards."""
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
      report = read_report(paths[number] + ".json")
      if report is None:
        path = scratch.local(paths[number])
        clear([path])
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")
        lost: collections.Counter = collections.Counter()
        for entry in _entries(array_type(kind), read, range(first, first + length), encode, batch_size, pool, lost):
          prepared.call_writer(path, writer.write, entry)
          bar.count(1)
        prepared.call_writer(path, writer.close)
        report = write_report(path + ".json", {"bytes": os.path.getsize(path), "rejected": lost}, [path])
        scratch.send(path, paths[number], ("", ".json"))
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
        yield np.asarray(item[1], BOX).tobytes() + np.asarray(next(encoded), dtype).tobytes()


def _picture(
  source: prepared.PreparedSource, index: int, image_size: int, seed: int
) -> tuple[np.ndarray, tuple[int, int, int]] | RecordError:
  try:
    image = source[index].images[0]
    box = images.random_square(image, np.random.default_rng([seed, index]))
    return images.square(image, image_size, box), box
  except RecordError as error:
    return error
