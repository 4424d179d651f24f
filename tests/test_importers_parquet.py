"""parquet: columns as the Hugging Face hub and img2dataset hold them; row groups are the parts."""

import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest

from jflow.data.records import Record, Turn
from jflow.errors import UserError
from preparing import chat, image, make_folder, read_back, run

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
    {"image": image(1), "conversations": [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "This."}]},
    {"images": [{"bytes": image(1), "path": None}],
     "conversations": json.dumps([{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "This."}])},
    {"images": [{"bytes": image(1), "path": None}],
     "messages": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "\nWhich?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "This."}]}]},
    {"images": [{"bytes": image(1), "path": None}], "texts": [{"user": "\nWhich?", "assistant": "This.", "source": "x"}]},
    {"image": image(1), "question": "Which?", "answer": "This."},
  ],
  ids=["llava", "json", "chat", "pairs", "question"],
)  # fmt: skip
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
  rows = [
    {"photo": image(i), "alt": f"alt {i}", "caption": "not this", "score": 1.5, "n": i} for i in range(3)
  ]
  _table(folder, rows)
  with pytest.raises(UserError, match="no column of images: name it by --image_column, one of photo, alt"):
    _run(folder, "generation")
  with pytest.raises(UserError, match="no column 'title': --text_column is one of photo, alt, caption"):
    _run(folder, "generation", image_column="photo", text_column="title")
  _, output = _run(folder, "generation", image_column="photo", text_column="alt")
  assert [record.text for record in read_back(output, "generation")] == ["alt 0", "alt 1", "alt 2"]


def test_columns_are_found_in_any_case_and_a_missing_one_is_named(folder):
  _table(folder, [{"URL": "x", "TEXT": "A cat.", "Image": image(1)}])
  _, output = _run(folder, "generation")
  assert read_back(output, "generation") == [Record("0", (image(1),), "A cat.", ())]
  _table(folder, [{"image": image(1), "label": "cat"}])
  with pytest.raises(
    UserError, match="has no column of texts: name it by --text_column, one of image, label"
  ):
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
  _table(
    folder, noise, row_group_size=4, write_page_checksum=True, use_dictionary=False, write_statistics=False
  )
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
    with pytest.raises(UserError, match=f"{name} is not a readable parquet file"):
      _run(folder, "text", name)
