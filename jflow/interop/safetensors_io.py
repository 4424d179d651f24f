"""Weights in safetensors, read and written tensor by tensor.

The library reads: it checks that the header of a file covers its payload without gap or overlap, and uses memory for
one tensor at a time. A damaged header can still parse, with wrong names, shapes or types, so callers must compare all
three with the model's (`jflow.models.weights`).
"""

import json
import math
import os
import pathlib
import stat
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jflow import git_lfs, strict_json
from jflow.errors import UserError, one_line
from jflow.progress import Progress
from jflow.strict_json import read_object as read_json
from jflow.strict_json import shown

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
_MAX_HEADER = 16 * 2**20  # bytes; a thousand tensors take 100 KB, and the library allows 100 MB
_MAX_INDEX = 64 * 2**20
_MOST_TENSORS = 100_000
_LONGEST_NAME = 512
_FIELDS = {"dtype", "shape", "data_offsets"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_EXPONENTS = {"F32": (np.uint32, 0x7F800000), "BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00)}


class Tensor(NamedTuple):
  """The place and type of a tensor."""

  file: pathlib.Path
  dtype: str  # as the header says: "F32", "BF16", ...
  shape: tuple[int, ...]
  start: int  # first byte after the header
  bytes: int


def read_header(path: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of a file, checked to cover its payload exactly, without gap or overlap.

  Raises:
    UserError: the file is cut, has a header that is too large, or does not follow the format.
  """
  header: Any = None
  try:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
      raise UserError(f"{path} must be a file")
    git_lfs.check([str(path)])
    header, payload = _header(path, found.st_size)
    _open(path)
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
  except (ValueError, SafetensorError) as error:
    if (end := _end(header)) is not None and end != payload:
      what = "cut" if end > payload else "too long"
      raise UserError(f"{path} is {what}: its header describes {end:,} bytes, the file has {payload:,}") from None
    reason = one_line(error) + _suspect(header)
    raise UserError(f"{path} has a damaged safetensors header ({reason}): get the file again") from None
  return {
    name: Tensor(path, entry["dtype"], tuple(entry["shape"]), start, end - start)
    for name, entry in header.items()
    for start, end in [entry["data_offsets"]]
  }


def _header(path: pathlib.Path, size: int) -> tuple[dict[str, Any], int]:
  """The entries of the header and the bytes of the payload.

  Refuses repeated names and unknown fields, both of which the library accepts.
  """
  with open(path, "rb") as file:
    prefix = file.read(8)
    if len(prefix) < 8:
      raise UserError(f"{path} must be a safetensors file, got {size} bytes")
    (length,) = struct.unpack("<Q", prefix)
    if length > _MAX_HEADER or length > size - 8:
      raise UserError(
        f"{path} claims a header of {length:,} bytes and has {size:,} bytes in all: cut or damaged, get the file again"
      )
    header = strict_json.parse(file.read(length))
  if not isinstance(header, dict):
    raise ValueError("no JSON object")
  header.pop("__metadata__", None)
  if len(header) > _MOST_TENSORS:
    raise ValueError(f"{len(header):,} tensors")
  for name, entry in header.items():
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
      raise ValueError(f"a tensor is named {shown(name)}")
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
      raise ValueError(f"the entry of {name!r} is {shown(entry)}")
  return header, size - 8 - length


def _end(header: Any) -> int | None:
  """The bytes of payload that a header describes; None where it cannot be read."""
  try:
    return max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
  except (ValueError, TypeError, AttributeError, KeyError, IndexError):
    return None


def _suspect(header: Any) -> str:
  """The end of a message: the first entry whose size does not match its shape, which the library does not name."""
  for name, entry in (header or {}).items():
    try:
      start, end = entry["data_offsets"]
      fits = end - start == math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
    except (ValueError, TypeError, KeyError):
      fits = False
    if not fits:
      return f", see {name!r}: {shown(entry)}"
  return ""


def _open(path: pathlib.Path) -> Any:
  """A file opened with the library, without mmap: a mapped file that is cut later would kill the process."""
  return safe_open(path, framework="numpy", backend="pread")


class Checkpoint:
  """The tensors of a directory: one safetensors file, or shards with an index.

  Where both exist, the file is read, as in transformers; the index must list the same tensors.

  Attributes:
    tensors: name -> place and type.
  """

  def __init__(self, directory: pathlib.Path, stems: tuple[str, ...], instead: str = ""):
    """Reads the headers.

    Args:
      directory: of the files.
      stems: file names without ".safetensors", in order of preference.
      instead: where such files are to be had, for the message where there is a pickle or nothing.

    Raises:
      UserError: there is nothing to read or only pickles, a shard is missing, or an index does not fit the shards or
        the file beside it.
    """
    self.directory = directory
    self._opened: tuple[pathlib.Path, Any] | None = None  # the file read last
    if not directory.is_dir():
      raise UserError(f"{directory} is not a directory")
    for stem in stems:
      index, single = directory / f"{stem}.safetensors.index.json", directory / f"{stem}.safetensors"
      if single.is_file():
        self.tensors = read_header(single)
        if index.is_file():
          _check_beside(index, single, self.tensors)
        return
      if index.is_file():
        self.tensors = _read_index(index)
        return
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLES)
    if pickles:
      raise UserError(
        f"{directory / pickles[0]} is a pickle, which can run code, so jflow does not load it: convert it to "
        f"safetensors with the tools of its origin, or {instead or 'download the safetensors file of the same model'}"
      )
    advice = f": {instead}" if instead else ""
    raise UserError(f"{directory} holds neither {stems[0]}.safetensors nor {stems[0]}.safetensors.index.json{advice}")

  def read(self, name: str) -> np.ndarray:
    """Reads one tensor, in the type of the file.

    Raises:
      UserError: it is not f32, bf16 or f16, is cut, or has a value that is not finite.
    """
    tensor = self.tensors[name]
    if tensor.dtype not in DTYPES:
      raise UserError(f"{tensor.file}: tensor {name} has the type {tensor.dtype}, weights are F32, BF16 or F16")
    try:
      if self._opened is None or self._opened[0] != tensor.file:
        self._opened = (tensor.file, _open(tensor.file))
      out = self._opened[1].get_tensor(name)
    except OSError as error:
      raise UserError(f"{tensor.file} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
      raise UserError(f"{tensor.file} is cut or damaged: {' '.join(str(error).split())[:160]}") from None
    except MemoryError:
      raise UserError(f"{tensor.file}: tensor {name} has {tensor.bytes:,} bytes, more memory than there is") from None
    if (out.shape, out.dtype) != (tensor.shape, DTYPES[tensor.dtype]):
      raise UserError(f"{tensor.file} has changed since its header was read: tensor {name} is {out.dtype}{out.shape}")
    if not _finite(out, tensor.dtype):
      raise UserError(f"{tensor.file}: tensor {name} holds values that are not finite: the file is damaged")
    return out


def _finite(x: np.ndarray, dtype: str) -> bool:
  """Whether all values are finite; computed in pieces, without a second copy of a large tensor."""
  unsigned, exponent = _EXPONENTS[dtype]
  bits = x.reshape(-1).view(unsigned)
  pieces = (bits[i : i + 2**22] for i in range(0, bits.size, 2**22))
  return not any(((piece & exponent) == exponent).any() for piece in pieces)


def _weight_map(path: pathlib.Path) -> tuple[dict[str, str], int | None]:
  """The content of an index: tensor -> shard, and the bytes of all tensors or None."""
  index = read_json(path, _MAX_INDEX)
  shard_of, told = index.get("weight_map"), index.get("metadata")
  if not isinstance(shard_of, dict) or not shard_of:
    raise UserError(f"{path} has no field weight_map")
  for name, shard in shard_of.items():
    plain = type(shard) is str and os.path.basename(shard) == shard and shard.isprintable()
    if not plain or not shard.endswith(".safetensors"):
      raise UserError(
        f"{path} names the shard {shown(shard)} of {shown(name)}: shards are .safetensors files in the same directory"
      )
  if told is not None and not isinstance(told, dict):
    raise UserError(f"{path}: metadata should be a JSON object, got {shown(told)}")
  total = (told or {}).get("total_size")
  if total is not None and (type(total) not in (int, float) or total < 0):
    raise UserError(f"{path}: metadata: total_size should be a number of bytes, got {shown(total)}")
  return shard_of, total


def _read_index(path: pathlib.Path) -> dict[str, Tensor]:
  shard_of, total = _weight_map(path)
  tensors: dict[str, Tensor] = {}
  for shard in sorted(set(shard_of.values())):
    if not (path.parent / shard).is_file():
      raise UserError(f"{path.parent / shard} not found: {path.name} names it, the download is not complete")
    for name, tensor in read_header(path.parent / shard).items():
      if name in tensors:
        raise UserError(f"{path.parent / shard}: tensor {name} also stands in {tensors[name].file.name}")
      tensors[name] = tensor
  for name, shard in shard_of.items():
    if name not in tensors or tensors[name].file.name != shard:
      raise UserError(f"{path}: tensor {shown(name)[1:-1]} is not in {shard}")
  unlisted = sorted(set(tensors) - set(shard_of))
  if unlisted:
    raise UserError(f"{path} does not list tensor {unlisted[0]} of {tensors[unlisted[0]].file.name}")
  size = sum(tensor.bytes for tensor in tensors.values())
  if total is not None and total != size:
    raise UserError(
      f"{path}: metadata: total_size={total:,} and its shards hold {size:,} bytes of tensors: an index of other "
      "shards? Remove the field if the shards are right"
    )
  return tensors


def _check_beside(index: pathlib.Path, single: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
  """Reports that a whole file is read and not the index beside it; they must list the same tensors."""
  shard_of, _ = _weight_map(index)
  listed = set(shard_of)
  for where, names in ((single, listed - set(tensors)), (index, set(tensors) - listed)):
    if names:
      raise UserError(
        f"{where} lacks tensor {shown(min(names))[1:-1]}, which {(single if where == index else index).name} has: two "
        "models in one directory, remove the one that is not meant"
      )
  if set(shard_of.values()) != {single.name}:
    print(f"jflow: {single} is read, and not the shards of {index.name} beside it", file=sys.stderr)


def write(
  directory: pathlib.Path,
  stem: str,
  shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
  get: Callable[[str], np.ndarray],
  shard_bytes: int,
  progress: Progress,
) -> None:
  """Writes tensors one by one, so that only one is in memory at a time beside the parameters.

  The library's `save_file` would need all tensors of a file in memory at once.

  Args:
    directory: must exist.
    stem: of the file names.
    shapes: name -> shape and type, in the order in which they are written.
    get: name -> tensor.
    shard_bytes: largest payload of a file; more files get an index, as Hugging Face lays it out.
    progress: in MiB, updated after every tensor.
  """
  codes = {dtype: code for code, dtype in DTYPES.items()}
  size = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in shapes.items()}
  shards: list[list[str]] = [[]]
  for name in shapes:
    if shards[-1] and sum(size[n] for n in shards[-1]) + size[name] > shard_bytes:
      shards.append([])
    shards[-1].append(name)
  weight_map = {}
  for number, names in enumerate(shards):
    file_name = (
      f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else f"{stem}.safetensors"
    )
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
      shape, dtype = shapes[name]
      header[name] = {
        "dtype": codes[dtype],
        "shape": list(shape),
        "data_offsets": [offset, offset + size[name]],
      }
      offset += size[name]
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with open(directory / file_name, "wb") as file:
      file.write(struct.pack("<Q", len(text)) + text)
      for name in names:
        tensor = np.ascontiguousarray(get(name))
        if (tensor.shape, tensor.dtype) != shapes[name]:
          raise ValueError(f"{name} is {tensor.dtype}{tensor.shape}, announced as {shapes[name]}")
        file.write(memoryview(tensor.reshape(-1).view(np.uint8)))
        weight_map[name] = file_name
        progress.count(size[name] / 2**20)
      file.flush()
      os.fsync(file.fileno())
  if len(shards) > 1:
    index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
