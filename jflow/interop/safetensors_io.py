"""Reading and writing safetensors tensor by tensor, with every byte of the header checked.

The format: 8 bytes (length of the header), a JSON header `{name: {dtype, shape, data_offsets}}`,
the payload. A damaged header can still parse, with other names, shapes or types than were written: so the
callers compare all three with what the model needs (`jflow.interop.names`).
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

from jflow import git_lfs, strict_json
from jflow.errors import UserError
from jflow.strict_json import read_object as read_json
from jflow.strict_json import shown

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
# Types that may stand in a file beside the weights (buffers); they are never read.
_OTHER_BYTES = {
  "F64": 8,
  "I64": 8,
  "I32": 4,
  "I16": 2,
  "I8": 1,
  "U8": 1,
  "BOOL": 1,
  "U16": 2,
  "U32": 4,
  "U64": 8,
}
_OTHER_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1}
_MAX_HEADER = 16 * 2**20  # bytes; a thousand tensors take 100 KB
_MAX_INDEX = 64 * 2**20
_MOST_TENSORS = 100_000
_LONGEST_NAME = 512
_WORTH_SAYING = 2**24  # bytes; less is read or written in a moment
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_EXPONENTS = {"F32": (np.uint32, 0x7F800000), "BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00)}


class Tensor(NamedTuple):
  """Where a tensor lies."""

  file: pathlib.Path
  dtype: str  # as the header says: "F32", "BF16", ...
  shape: tuple[int, ...]
  start: int  # first byte in the file
  bytes: int


def read_header(path: pathlib.Path) -> dict[str, Tensor]:
  """Returns the tensors of a file, checked to cover its payload exactly, without gap or overlap.

  Raises:
    UserError: a file that is cut, has a header that is too large, or does not follow the format.
  """
  try:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
      raise UserError(f"{path} must be a file")
    size = found.st_size
    git_lfs.check([str(path)])
    with open(path, "rb") as file:
      prefix = file.read(8)
      if len(prefix) < 8:
        raise UserError(f"{path} is no safetensors file: it has {size} bytes")
      (length,) = struct.unpack("<Q", prefix)
      if length > _MAX_HEADER or length > size - 8:
        raise UserError(
          f"{path} claims a header of {length:,} bytes and has {size:,} bytes in all: cut or damaged, "
          "get the file again"
        )
      text = file.read(length)
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}") from None
  try:
    header = strict_json.parse(text)
    header.pop("__metadata__", None)
    if len(header) > _MOST_TENSORS:
      raise ValueError(f"{len(header):,} tensors")
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
  except (ValueError, TypeError, AttributeError) as error:
    raise UserError(f"{path} has a damaged safetensors header ({_one_line(error)}): get the file again") from None
  end = 8 + length
  for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].bytes)):
    if tensor.start != end:
      raise UserError(f"{path}: tensor {name} starts at byte {tensor.start:,} instead of {end:,}: damaged header")
    end += tensor.bytes
  if end != size:
    what = "cut" if end > size else "too long"
    raise UserError(f"{path} is {what}: its header describes {end:,} bytes, the file has {size:,}")
  return tensors


def _entry(path: pathlib.Path, name: str, entry: Mapping[str, Any], offset: int) -> Tensor:
  if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
    raise ValueError(f"a tensor is named {shown(name)}")
  if set(entry) != {"dtype", "shape", "data_offsets"}:
    raise ValueError(f"the entry of {name!r} has the fields {shown(sorted(entry))}")
  dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
  if type(shape) is not list or not all(type(n) is int and 0 <= n < 2**48 for n in shape) or len(shape) > 16:
    raise ValueError(f"{name!r} has the shape {shown(shape)}")
  if type(offsets) is not list or len(offsets) != 2 or not all(type(n) is int and 0 <= n < 2**63 for n in offsets):
    raise ValueError(f"{name!r} has the offsets {shown(offsets)}")
  if type(dtype) is not str or (dtype not in DTYPES and dtype not in _OTHER_BYTES):
    raise ValueError(f"{name!r} has the unknown type {shown(dtype)}")
  width = DTYPES[dtype].itemsize if dtype in DTYPES else _OTHER_BYTES[dtype]
  count = math.prod(shape) * width
  if offsets[1] - offsets[0] != count:
    raise ValueError(f"{name!r} of {count:,} bytes lies in {offsets[1] - offsets[0]:,}")
  return Tensor(path, dtype, tuple(shape), offset + offsets[0], count)


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())[:160]


class Checkpoint:
  """The tensors of a directory: one safetensors file, or shards with an index.

  Where both are there, the file is read, as by transformers; the index must list the same tensors.

  Attributes:
    tensors: name -> where it lies.
  """

  def __init__(self, directory: pathlib.Path, stems: tuple[str, ...]):
    """Reads the headers. `stems`: file names without ".safetensors", in order of preference.

    Raises:
      UserError: nothing to read, only pickles, a missing shard, an index that does not fit the shards or the file
      beside it.
    """
    self.directory = directory
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
        "safetensors with the tools of its origin, or download the safetensors file of the same model"
      )
    raise UserError(f"{directory} holds neither {stems[0]}.safetensors nor {stems[0]}.safetensors.index.json")

  def read(self, name: str) -> np.ndarray:
    """Reads one tensor, in the type of the file.

    Raises:
      UserError: not f32, bf16 or f16, cut, or with a value that is not finite.
    """
    tensor = self.tensors[name]
    if tensor.dtype not in DTYPES:
      raise UserError(f"{tensor.file}: tensor {name} has the type {tensor.dtype}, weights are F32, BF16 or F16")
    try:
      out = np.empty(tensor.shape, DTYPES[tensor.dtype])
      with open(tensor.file, "rb", buffering=0) as file:
        file.seek(tensor.start)
        view, done = memoryview(out.reshape(-1).view(np.uint8)), 0
        while done < tensor.bytes:
          count = file.readinto(view[done : done + 2**26])
          if not count:
            raise UserError(f"{tensor.file} is cut: tensor {name} ends after {done:,} of {tensor.bytes:,} bytes")
          done += count
    except OSError as error:
      raise UserError(f"{tensor.file} cannot be read: {error.strerror}") from None
    except MemoryError:
      raise UserError(f"{tensor.file}: tensor {name} has {tensor.bytes:,} bytes, more memory than there is") from None
    if not _finite(out, tensor.dtype):
      raise UserError(f"{tensor.file}: tensor {name} holds values that are not finite: the file is damaged")
    return out


def _finite(x: np.ndarray, dtype: str) -> bool:
  """Whether no exponent is all ones; in pieces, so that no second copy of a large tensor exists."""
  unsigned, exponent = _EXPONENTS[dtype]
  bits = x.reshape(-1).view(unsigned)
  pieces = (bits[i : i + 2**22] for i in range(0, bits.size, 2**22))
  return not any(((piece & exponent) == exponent).any() for piece in pieces)


def _weight_map(path: pathlib.Path) -> tuple[dict[str, str], int | None]:
  """Returns what an index says: tensor -> shard, and the bytes of all tensors if it says that."""
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
  """Says that a whole file is read and not the index beside it, as transformers does; they must list the same."""
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
  progress: "Progress",
) -> None:
  """Writes tensors one by one, so that only one exists at a time beside its source.

  Args:
    directory: must exist.
    stem: of the file names.
    shapes: name -> shape and type, in the order in which they are written.
    get: name -> tensor.
    shard_bytes: largest payload of a file; more files get an index, as Hugging Face lays it out.
    progress: told of every tensor.
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
        progress.add(size[name])
      file.flush()
      os.fsync(file.fileno())
  if len(shards) > 1:
    index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


class Progress:
  """Prints how far a reading or writing is, on stderr, every tenth of the way; of small files, nothing."""

  def __init__(self, what: str, total: int):
    self._what, self._total, self._done, self._printed = what, max(total, 1), 0, -1

  def add(self, count: int) -> None:
    """`count` more bytes are done."""
    self._done += count
    tenth = 10 * self._done // self._total
    if tenth > self._printed and self._total >= _WORTH_SAYING:
      self._printed = tenth
      total = self._total / 2**20
      print(f"{self._what}: {min(10 * tenth, 100)} % of {total:,.1f} MiB", file=sys.stderr, flush=True)
