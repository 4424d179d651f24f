"""parquet: columns as the Hugging Face hub and img2dataset hold them; row groups are the parts."""

import io
import json
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from preparing import chat, image, make_folder, read_back, run
from refusals import refused

from jflow.data import images
from jflow.data.records import Record, Turn
from jflow.errors import UserError

TURNS = (Turn("user", "<image>\nWhich?"), Turn("assistant", "This."))


@pytest.fixture
def folder(tmp_path):
  return make_folder(tmp_path / "in")


def _table(folder, rows, name="train-00000-of-00001.parquet", schema=None, **options):
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), folder / name, **options)


def _run(folder, task="understanding", name="train-00000-of-00001.parquet", **options):
  return run(folder, task, name, "parquet", **options)


@pytest.mark.parametrize(
  "make",
  [
    lambda i: {"image": {"bytes": image(i), "path": f"{i}.png"}, "caption": f"row {i}"},
    lambda i: {
      "jpg": image(i),
      "caption": f"row {i}",
      "key": f"k{i}",
      "url": "http://a.b",
      "status": "success",
    },
    lambda i: {"images": [image(i)], "text": f"row {i}"},
    lambda i: {"image": {"bytes": None, "path": f"pictures/{i}.png"}, "prompt": f"row {i}"},
  ],
  ids=["hub", "img2dataset", "list", "paths"],
)
def test_captions(folder, make):
  _table(folder, [make(i) for i in range(10)], row_group_size=4)
  summary, output = _run(folder, "generation")
  assert summary["shard_lengths"] == [4, 4, 2]
  expected = [((image(i),), f"row {i}") for i in range(10)]
  assert [(record.images, record.text) for record in read_back(output, "generation")] == expected


@pytest.mark.parametrize(
  "row",
  [
    {
      "image": image(1),
      "conversations": [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "This."}],
    },
    {
      "images": [{"bytes": image(1), "path": None}],
      "conversations": json.dumps([{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "This."}]),
    },
    {
      "images": [{"bytes": image(1), "path": None}],
      "messages": [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "\nWhich?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "This."}]},
      ],
    },
    {
      "images": [{"bytes": image(1), "path": None}],
      "texts": [{"user": "\nWhich?", "assistant": "This.", "source": "x"}],
    },
    {"image": image(1), "question": "Which?", "answer": "This."},
  ],
  ids=["llava", "json", "chat", "pairs", "question"],
)
def test_conversations_in_all_their_forms(folder, row):
  _table(folder, [row])
  _, output = _run(folder)
  (record,) = read_back(output)
  assert record.turns == TURNS and record.images == (image(1),) and record.text == ""


def test_interleaved_documents(folder):
  rows = [
    {"images": [image(1), image(2)], "text": "One <image> two <image> end."},
    {"images": [image(3), None], "texts": [None, "A paragraph."]},
  ]
  _table(folder, rows[:1], "a.parquet")
  _table(folder, rows[1:], "b.parquet")
  _, output = _run(folder, name="*.parquet")
  first, second = read_back(output)
  assert first.text == "One <image> two <image> end." and first.images == (image(1), image(2))
  assert second.text == "<image>\n\nA paragraph." and second.images == (image(3),)


def test_columns_may_be_named(folder):
  rows = [{"photo": image(i), "alt": f"alt {i}", "caption": "not this", "score": 1.5, "n": i} for i in range(3)]
  _table(folder, rows)
  with refused("--image_column", "photo, alt"):
    _run(folder, "generation")
  with refused("'title'", "--text_column", "photo, alt, caption"):
    _run(folder, "generation", image_column="photo", text_column="title")
  _, output = _run(folder, "generation", image_column="photo", text_column="alt")
  assert [record.text for record in read_back(output, "generation")] == ["alt 0", "alt 1", "alt 2"]


def test_columns_are_found_in_any_case_and_a_missing_one_is_named(folder):
  _table(folder, [{"URL": "x", "TEXT": "A cat.", "Image": image(1)}])
  _, output = _run(folder, "generation")
  assert read_back(output, "generation") == [Record("0", (image(1),), "A cat.", ())]
  _table(folder, [{"image": image(1), "label": "cat"}])
  with refused("--text_column", "image, label"):
    _run(folder, "generation", output=output + "2")


def test_documents_need_no_image(folder):
  _table(folder, [{"text": f"Document {i}.", "image": image(i)} for i in range(3)])
  _, output = _run(folder, "text")
  assert [record.text for record in read_back(output, "text")] == [f"Document {i}." for i in range(3)]


def test_a_mix_with_and_without_pictures_comes_in_once_per_task(folder):
  plain = {"conversations": chat("", "Why?", "So.")["conversations"]}
  _table(folder, [chat(image(1)), {"image": None, **plain}])
  summary, _ = _run(folder, max_rejected_share=0.0)
  assert summary["accepted"] == 1 and summary["filtered"] == {"text_only": 1}
  summary, output = _run(folder, "text", max_rejected_share=0.0, output=str(folder.parent / "out-text"))
  assert summary["filtered"] == {"with_images": 1}
  assert [turn.text for turn in read_back(output, "text")[0].turns] == ["Why?", "So."]


def test_each_broken_row_is_counted_under_its_reason(folder):
  schema = pyarrow.schema([("image", pyarrow.binary()), ("caption", pyarrow.string())])
  cases = [
    (None, "no image", "missing_image"),
    (image(1), None, "missing_caption"),
    (image(1), " ", "empty_caption"),
    (b"", "zero bytes", "empty"),
    (image(1)[:-30], "cut", "unreadable"),
    (image(1), "a\0b", "nul_character"),
  ]
  rows = [{"image": image(1), "caption": "good"}, *({"image": i, "caption": c} for i, c, _ in cases)]
  _table(folder, rows, schema=schema)
  summary, output = _run(folder, "generation", max_rejected_share=1.0)
  assert summary["rejected"] == {reason: 1 for _, _, reason in cases} and summary["accepted"] == 1
  assert summary["first_rejected"]["missing_image"]["where"].endswith(".parquet row 1")


def test_damage_costs_its_row_group_and_a_file_of_another_kind_is_named(folder):
  noise = [{"text": f"{i} " + image(i).hex() * 20} for i in range(8)]
  _table(folder, noise, row_group_size=4, write_page_checksum=True, use_dictionary=False, write_statistics=False)
  path = folder / "train-00000-of-00001.parquet"
  data = bytearray(path.read_bytes())
  column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
  place = column.data_page_offset + column.total_compressed_size // 2
  data[place] ^= 1
  path.write_bytes(bytes(data))
  summary, output = _run(folder, "text", max_rejected_share=0.5)
  assert summary["accepted"] == 4 and summary["rejected"] == {"corrupt": 4}
  assert [record.text for record in read_back(output, "text")] == [row["text"] for row in noise[:4]]
  shutil.rmtree(output)
  for name, content in (("cut.parquet", data[:-9]), ("text.parquet", b"not a table")):
    (folder / name).write_bytes(content)
    with refused(name):
      _run(folder, "text", name)


ROWS = 70  # more than are read at once, none of which may cost another


def _texts(*values: str | bytes, kind=pyarrow.string()) -> pyarrow.Array:
  """A column of texts, of which those that are given as bytes need not be UTF-8."""
  data = [value.encode() if isinstance(value, str) else value for value in values]
  ends = np.cumsum([0, *map(len, data)]).astype(np.int32)
  buffers = [None, pyarrow.py_buffer(ends.tobytes()), pyarrow.py_buffer(b"".join(data))]
  return pyarrow.Array.from_buffers(kind, len(data), buffers)


def _one_bad(bad: bytes = b"caf\xe9") -> pyarrow.Array:
  return _texts(*["a cat"] * 40, bad, *["a cat"] * (ROWS - 41))


def _lists(values: pyarrow.Array) -> pyarrow.Array:
  """A column of lists of two."""
  return pyarrow.ListArray.from_arrays(pyarrow.array(range(0, len(values) + 1, 2), pyarrow.int32()), values)


def _structs(**fields) -> pyarrow.Array:
  arrays = [pyarrow.array(field) if isinstance(field, list) else field for field in fields.values()]
  return pyarrow.StructArray.from_arrays(arrays, list(fields))


PNG, CAPTIONS = [image(1)] * ROWS, ["a cat"] * ROWS
SAYS = ["<image>Which?", "This."] * (ROWS // 2)
ODD = pyarrow.DictionaryArray.from_arrays([0] * 40 + [1] + [0] * 29, _texts("a cat", b"\xff"))


@pytest.mark.parametrize(
  "columns, rejected",
  [
    ({"image": PNG, "caption": CAPTIONS, "url": _one_bad()}, {}),
    ({"image": PNG, "caption": CAPTIONS, "url": ODD}, {}),
    ({"image": PNG, "caption": CAPTIONS, "id": _one_bad()}, {}),
    ({"image": PNG, "caption": CAPTIONS, "description": _one_bad()}, {}),
    ({"image": PNG, "caption": CAPTIONS, "day": pyarrow.array([10**8] * ROWS, pyarrow.date32())}, {}),
    ({"image": PNG, "caption": CAPTIONS, "at": pyarrow.array([2**62] * ROWS, pyarrow.timestamp("ns", "Mars"))}, {}),
    ({"image": _structs(bytes=PNG, path=_one_bad()), "caption": CAPTIONS}, {}),
    ({"image": PNG, "caption": _one_bad()}, {"invalid_utf8": 1}),
    ({"image": PNG, "caption": ODD}, {"invalid_utf8": 1}),
    ({"image": _one_bad(), "caption": CAPTIONS}, {"invalid_utf8": 1, "missing_image": ROWS - 1}),
    ({"image": PNG, "caption": CAPTIONS, "video": _one_bad()}, {"invalid_utf8": 1}),
    ({"image": PNG, "caption": CAPTIONS, "a.b": CAPTIONS, "a": [1] * ROWS}, {}),
    (
      {"image": pyarrow.array(PNG, pyarrow.large_binary()), "caption": pyarrow.array(CAPTIONS, pyarrow.string_view())},
      {},
    ),
    ({"image": pyarrow.nulls(ROWS), "caption": CAPTIONS}, {"missing_image": ROWS}),
    ({"image": [1] * ROWS, "caption": CAPTIONS}, {"bad_field": ROWS}),
  ],
  ids=[
    "url",
    "dictionary",
    "id",
    "another-caption",
    "date",
    "timestamp",
    "path",
    "caption",
    "dictionary-caption",
    "image",
    "video",
    "names-with-dots",
    "large-types",
    "nulls",
    "numbers",
  ],
)
def test_a_cell_that_cannot_be_read_costs_the_row_that_needs_it(folder, columns, rejected):
  _table_of(folder, columns)
  reasons = _reasons(folder, "generation")
  unwanted = ROWS - 1 if "video" in columns else 0
  assert reasons == rejected | {"accepted": ROWS - sum(rejected.values()) - unwanted}


def test_a_turn_that_cannot_be_read_costs_its_conversation(folder):
  bad = _texts(*SAYS[:21], b"\xff", *SAYS[22:])
  for said, note, rejected in ((bad, SAYS, 1), (pyarrow.array(SAYS), bad, 0)):
    turns = _structs(**{"from": ["human", "gpt"] * (ROWS // 2), "value": said, "note": note})
    _table_of(folder, {"image": PNG[: ROWS // 2], "conversations": _lists(turns)})
    reasons = _reasons(folder, "understanding")
    assert reasons == {"accepted": ROWS // 2 - rejected} | ({"invalid_utf8": 1} if rejected else {})


def _table_of(folder, columns, **options):
  pyarrow.parquet.write_table(pyarrow.table(columns), folder / "t.parquet", **options)


def _reasons(folder, task):
  """Returns how many rows were accepted, and how many rejected for each reason."""
  try:
    summary, output = _run(folder, task, "t.parquet", max_rejected_share=1.0)
  except UserError as error:
    return {**json.loads(str(error).rpartition("cannot be used ")[2].replace("'", '"')), "accepted": 0}
  shutil.rmtree(output)
  return {**summary["rejected"], "accepted": summary["accepted"]}


def test_damage_to_a_column_of_metadata_costs_nothing_but_it(folder):
  _table(
    folder,
    [{"text": f"Document {i}.", "score": i + 0.5, "url": f"{i} " + image(i).hex() * 20} for i in range(8)],
    write_page_checksum=True,
    use_dictionary=False,
    write_statistics=False,
  )
  path = folder / "train-00000-of-00001.parquet"
  data, group = bytearray(path.read_bytes()), pyarrow.parquet.ParquetFile(path).metadata.row_group(0)
  data[group.column(2).data_page_offset + group.column(2).total_compressed_size // 2] ^= 1
  path.write_bytes(bytes(data))
  import tensorflow_datasets as tfds

  summary, output = _run(folder, "text")
  assert summary["accepted"] == 8
  meta = json.loads(tfds.builder_from_directory(output).as_data_source("train")[3]["meta"])
  assert meta["score"] == 3.5 and "url" not in meta


@pytest.mark.parametrize(
  "columns",
  [
    {"image": [bytes(2**25), *PNG[:3]], "caption": CAPTIONS[:4]},
    {"image": PNG[:4], "caption": ["x" * 2**25, *CAPTIONS[:3]]},
    {"image": _structs(bytes=[bytes(2**25), *PNG[:3]], path=CAPTIONS[:4]), "caption": CAPTIONS[:4]},
  ],
  ids=["image", "caption", "struct"],
)
def test_what_unfolds_too_far_is_not_read(folder, columns):
  _table_of(folder, columns, compression="zstd")
  with refused("row 0", "bomb", "4 of 4"):
    _run(folder, "generation", "t.parquet")


@pytest.mark.parametrize("claim", [10**15, -1])
def test_more_rows_than_a_file_can_hold_are_refused(folder, claim):
  _table_of(folder, {"text": CAPTIONS})
  data = (folder / "t.parquet").read_bytes()

  def number(value: int) -> bytes:
    """Writes a whole number as thrift's compact protocol does, behind the byte of its field."""
    value, digits = (value << 1) ^ (value >> 63), []
    while value > 127:
      digits.append(value & 127 | 128)
      value >>= 7
    return bytes([0x16, *digits, value])

  start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
  footer = data[start:-8].replace(number(ROWS), number(claim))
  (folder / "t.parquet").write_bytes(data[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
  with refused("t.parquet"):
    _run(folder, "text", "t.parquet")


@pytest.mark.parametrize(
  "content, word",
  [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n", "git lfs pull"),
    (b"ARROW1\0\0", "Arrow file"),
    (b"PARE" + bytes(90) + b"PARE", "decrypt"),
    (b"PAR1", "not a readable parquet file"),
    (b"PAR1" + b"\xff" * 4 + b"PAR1", "not a readable parquet file"),
  ],
  ids=["git-lfs", "arrow", "encrypted", "cut", "endless-footer"],
)
def test_what_is_no_parquet_file_is_named(folder, content, word):
  (folder / "t.parquet").write_bytes(content)
  with refused(word):
    _run(folder, "text", "t.parquet")


def test_a_needed_column_that_stands_twice_is_refused_and_another_does_not_matter(folder):
  for names, match in (
    (["image", "caption", "caption"], "'caption'"),
    (["image", "caption", "n", "n"], ""),
  ):
    arrays = [pyarrow.array(PNG), *[pyarrow.array(CAPTIONS)] * (len(names) - 1)]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, names), folder / "t.parquet")
    if match:
      with refused(match):
        _run(folder, "generation", "t.parquet")
    else:
      assert _reasons(folder, "generation") == {"accepted": ROWS}


def test_an_image_may_be_a_path(folder):
  _table(folder, [{"image": f"pictures/{i}.png", "caption": f"row {i}"} for i in range(3)])
  _, output = _run(folder, "generation")
  assert [record.images for record in read_back(output, "generation")] == [(image(i),) for i in range(3)]


def _tiff(picture: Image.Image, **options) -> bytes:
  file = io.BytesIO()
  picture.save(file, "TIFF", **options)
  return file.getvalue()


def test_tiff_is_read_as_png_where_datasets_writes_it(folder):
  noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8))
  deep = Image.fromarray(np.arange(108, dtype=np.uint16).reshape(9, 12) << 9)
  turned = Image.Exif()
  turned[0x0112] = 6
  cases = [
    (_tiff(noise), np.asarray(noise)),
    (_tiff(noise, compression="tiff_lzw"), np.asarray(noise)),
    (_tiff(noise, save_all=True, append_images=[noise.rotate(180)] * 3), np.asarray(noise)),
    (_tiff(noise, exif=turned, icc_profile=bytes(2**20)), np.rot90(np.asarray(noise), -1)),
    (_tiff(noise.quantize(16)), np.asarray(noise.quantize(16).convert("RGB"))),
    (_tiff(noise.convert("CMYK")), np.asarray(noise.convert("CMYK").convert("RGB"))),
    (_tiff(deep), np.repeat((np.asarray(deep) >> 8)[..., None], 3, -1)),
  ]
  _table(folder, [{"image": {"bytes": data, "path": None}, "caption": "x"} for data, _ in cases])
  _, output = _run(folder, "generation")
  for record, (_, pixels) in zip(read_back(output, "generation"), cases, strict=True):
    assert record.images[0].startswith(b"\x89PNG")
    np.testing.assert_array_equal(images.decode(record.images[0]), pixels)


def _tags(data: bytes, **changed: int) -> bytes:
  """Returns a TIFF with other values of some of its tags, of one number each."""
  data = bytearray(data)
  start = int.from_bytes(data[4:8], "little")
  for entry in range(start + 2, start + 2 + 12 * int.from_bytes(data[start : start + 2], "little"), 12):
    tag = int.from_bytes(data[entry : entry + 2], "little")
    if f"tag{tag}" in changed:
      kind, value = 4, changed[f"tag{tag}"]
      data[entry + 2 : entry + 12] = b"".join(n.to_bytes(s, "little") for n, s in ((kind, 2), (1, 4), (value, 4)))
    if f"count{tag}" in changed:
      data[entry + 4 : entry + 8] = changed[f"count{tag}"].to_bytes(4, "little")
  return bytes(data)


PLAIN = _tiff(Image.new("RGB", (12, 9)))
PACKED = _tiff(Image.new("RGB", (12, 9)), compression="tiff_lzw")


@pytest.mark.parametrize(
  "data, reason",
  [
    (PLAIN[:-40], "unreadable"),
    (_tags(PACKED, tag256=2**31, tag257=2**31), "too_large"),
    (_tags(PACKED, tag257=10**8), "too_large"),
    (_tags(PLAIN, tag257=10**8), "unreadable"),
    (_tags(PLAIN, tag259=7), "unreadable"),
    (_tags(PLAIN, tag273=10**6), "unreadable"),
    (_tags(PLAIN, tag279=10**6), "unreadable"),
    (_tags(PLAIN, count258=10**6), "unreadable"),
    (_tags(PLAIN, count273=2**32 - 1), "unreadable"),
    (b"II*\0\x08\0\0\0\xff\xff" + (b"\x00\x01\x03\0" + b"\xff" * 8) * 9, "unreadable"),
    (b"II+\0\x08\0\0\0" + bytes(16), "unreadable"),
  ],
  ids=[
    "cut",
    "huge",
    "tall",
    "tall-and-cut",
    "jpeg",
    "outside",
    "longer",
    "many-bits",
    "many-strips",
    "twice",
    "bigtiff",
  ],
)
def test_a_tiff_that_cannot_be_read_costs_its_row(folder, data, reason):
  _table(folder, [{"image": data, "caption": "x"}, {"image": PLAIN, "caption": "y"}], "t.parquet")
  assert _reasons(folder, "generation") == {reason: 1, "accepted": 1}


def test_the_metadata_of_a_table_are_read_once_for_all_its_row_groups(tmp_path, monkeypatch):
  """Each holds those of all row groups, so that the time would grow with the square of their number."""
  _table(tmp_path, [{"text": f"{i}"} for i in range(9)], "a.parquet", row_group_size=1)
  read, count = pyarrow.parquet.read_metadata, []
  monkeypatch.setattr(pyarrow.parquet, "read_metadata", lambda file: count.append(file) or read(file))
  summary, output = run(tmp_path, "text", "a.parquet", "parquet", output=str(tmp_path / "out"))
  assert [record.text for record in read_back(output, "text")] == [f"{i}" for i in range(9)]
  assert summary["shard_lengths"] == [1] * 9 and len(count) == 1
