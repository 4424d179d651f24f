"""The layouts of `fuzz_importers` that are not text: tars, parquet tables and data sets of TFDS."""

import functools
import gzip
import io
import json
import pathlib
import random
import tarfile
from collections.abc import Callable
from typing import Any

import numpy as np
from preparing import image
from tools.fuzzing import Layout, mark, spoil_bytes

PICTURES = tuple(image(i, format) for i in range(2) for format in ("PNG", "JPEG", "WEBP", "GIF"))
_BAD_TEXTS = (
  b"caf\xe9",
  b"",
  b" \n",
  b"a\0b",
  b"\xed\xa0\x80",
  b"<image>",
  b"x" * 70_000,
  b"[",
  b'{"a": 1, "a": 2}',
)


def _spoil_value(rng: random.Random, data: bytes) -> bytes:
  return rng.choice(_BAD_TEXTS) if rng.random() < 0.4 else spoil_bytes(rng, data)


def _sample(number: int) -> bytes:
  """The members of a sample, as they stand in a tar."""
  meta = {"url": f"http://a.b/{number}", "aesthetic": 5.5, "caption": "not this"}
  return _members(
    f"{number:04d}",
    {"jpg": PICTURES[number % 8], "txt": mark(number).encode(), "json": json.dumps(meta).encode()},
  )


def _members(key: str, contents: dict[str, bytes]) -> bytes:
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w") as tar:
    for ending, data in contents.items():
      info = tarfile.TarInfo(f"{key}.{ending}")
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  data = file.getvalue().rstrip(b"\0")  # without the end mark
  return data + bytes(-len(data) % 512)


def _spoil_sample(rng: random.Random, sample: bytes) -> bytes:
  """Changes contents, or blocks; the length stays a multiple of a block, so that the next sample can be found."""
  change = rng.randrange(4)
  if change == 0:
    with tarfile.open(fileobj=io.BytesIO(sample)) as tar:
      contents = {m.name.partition(".")[2]: tar.extractfile(m).read() for m in tar}
      key = tar.getnames()[0].partition(".")[0]
    ending = rng.choice(list(contents))
    contents[ending] = _spoil_value(rng, contents[ending])
    if rng.random() < 0.3:
      contents[rng.choice(("mp4", "wav", "0.png", "cls", "", "json", "txt.txt"))] = contents.pop(ending)
    return _members(key, contents)
  blocks = [sample[i : i + 512] for i in range(0, len(sample), 512)]
  at = rng.randrange(len(blocks))
  if change == 1:
    instead = [(blocks[at],) * 2, (bytes(512),) * rng.choice((1, 2, 20)), (rng.randbytes(512), blocks[at])]
    header = blocks[at][257:262] == b"ustar"  # without a block of its data a member takes that of the next
    blocks[at : at + 1] = rng.choice([*instead, ()] if header else instead)
  elif change == 2:
    block = bytearray(blocks[at])
    for _ in range(rng.choice((1, 3, 40))):
      block[rng.randrange(512)] = rng.randrange(256)
    blocks[at] = bytes(block)
  else:
    info = tarfile.TarInfo(rng.choice(("a/../b.jpg", "/a.jpg", "._a.jpg", "x" * 99, "caf\udce9.jpg", "d/", "a.mp4")))
    info.type = rng.choice((b"0", b"\0", b"1", b"2", b"3", b"5", b"6", b"7", b"S", b"V", b"X", b"g", b"L", b"K", b"x"))
    blocks.insert(0, info.tobuf(tarfile.GNU_FORMAT)[:512])
  return b"".join(blocks)


def _write_tar(folder: pathlib.Path, records: list[bytes]) -> pathlib.Path:
  (folder / "data.tar").write_bytes(b"".join(records) + bytes(1024))
  return folder / "data.tar"


def _write_tar_gz(folder: pathlib.Path, records: list[bytes]) -> pathlib.Path:
  (folder / "data.tar").write_bytes(gzip.compress(b"".join(records) + bytes(1024), 1))
  return folder / "data.tar"


def _row(number: int) -> dict[str, Any]:
  return {
    "image": PICTURES[number % 8],
    "path": b"0.png",
    "caption": mark(number).encode(),
    "url": b"http://a.b",
    "id": b"%d" % number,
    "day": 10,
    "score": 5.5,
  }


def _spoil_row(rng: random.Random, row: dict[str, Any]) -> dict[str, Any]:
  row = dict(row)
  for name in rng.sample(list(row), rng.choice((1, 1, 2, 4))):
    row[name] = rng.choice((0, 10**8, -(2**31))) if name == "day" else row[name]
    row[name] = float("nan") if name == "score" else row[name]
    if isinstance(row[name], bytes):
      row[name] = rng.choice((None, _spoil_value(rng, row[name])))
  return row


def _texts(values: list[bytes | None], kind: Any) -> Any:
  """A column whose texts need not be UTF-8."""
  import pyarrow

  ends = np.cumsum([0, *(len(value or b"") for value in values)]).astype(np.int32)
  bits = np.packbits([value is not None for value in values], bitorder="little")
  data = b"".join(value or b"" for value in values)
  return pyarrow.Array.from_buffers(
    kind, len(values), list(map(pyarrow.py_buffer, (bits.tobytes(), ends.tobytes(), data)))
  )


def _write_parquet(folder: pathlib.Path, rows: list[dict[str, Any]], struct: bool) -> pathlib.Path:
  import pyarrow
  import pyarrow.parquet

  columns = {name: [row[name] for row in rows] for name in rows[0]}
  texts = {name: _texts(columns[name], pyarrow.string()) for name in ("path", "caption", "url", "id")}
  pictures = _texts(columns["image"], pyarrow.binary())
  path = texts.pop("path")
  table = {
    "image": pyarrow.StructArray.from_arrays([pictures, path], ["bytes", "path"]) if struct else pictures,
    **texts,
    "day": pyarrow.array(columns["day"], pyarrow.date32()),
    "score": columns["score"],
  }
  options = {"row_group_size": 10, "compression": "zstd" if struct else "none", "write_page_checksum": struct}
  pyarrow.parquet.write_table(pyarrow.table(table), folder / "data.parquet", **options)
  return folder / "data.parquet"


def _example(number: int) -> bytes:
  from tensorflow_datasets.proto import tf_example_pb2

  example = tf_example_pb2.Example()
  values = {"image": PICTURES[number % 8], "caption": mark(number).encode(), "url": b"http://a.b"}
  for name, value in values.items():
    example.features.feature[name].bytes_list.value.append(value)
  example.features.feature["label"].int64_list.value.append(number % 2)
  return example.SerializeToString(deterministic=True)


def _write_tfds(folder: pathlib.Path, examples: list[bytes]) -> pathlib.Path:
  import tensorflow_datasets as tfds
  from array_record.python import array_record_module

  template = tfds.core.ShardedFileTemplate(
    dataset_name="pets", data_dir=folder, split="train", filetype_suffix="array_record"
  )
  path = folder / "pets-train.array_record-00000-of-00001"
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for example in examples:
    writer.write(example)
  writer.close()
  f = tfds.features
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=f.FeaturesDict(
      {"image": f.Image(), "caption": f.Text(), "url": f.Text(), "label": f.ClassLabel(num_classes=2)}
    ),
    split_infos=[
      tfds.core.SplitInfo(
        name="train", shard_lengths=[len(examples)], num_bytes=path.stat().st_size, filename_template=template
      )
    ],
    check_data=False,
  )
  return folder


def _parquet(struct: bool) -> Callable[[pathlib.Path, list[dict[str, Any]]], pathlib.Path]:
  return functools.partial(_write_parquet, struct=struct)


LAYOUTS = {
  "tar": Layout("webdataset", "generation", _sample, _spoil_sample, _write_tar, exact=False),
  "tar gzip": Layout("webdataset", "generation", _sample, _spoil_sample, _write_tar_gz, exact=False),
  "parquet": Layout("parquet", "generation", _row, _spoil_row, _parquet(False)),
  "parquet struct": Layout("parquet", "generation", _row, _spoil_row, _parquet(True)),
  "tfds": Layout("tfds", "generation", _example, spoil_bytes, _write_tfds),
}
