"""imagefolder: texts beside pictures, metadata as lines and as a table; what is broken is counted under its reason."""

import json
import os

import pytest
from preparing import image, read_back, run
from refusals import refused

from jflow.data.records import Turn
from jflow.errors import UserError


@pytest.fixture
def folder(tmp_path):
  """Six pictures in two folders."""
  made = tmp_path / "in"
  (made / "b").mkdir(parents=True)
  for i in range(6):
    (made / ("b" if i % 2 else "") / f"{i}.png").write_bytes(image(i))
  return made


def imported(folder, task="generation", **options):
  summary, output = run(folder, task, "", "imagefolder", **options)
  return summary, read_back(output, task)


def test_texts_beside_pictures(folder):
  for i in range(6):
    (folder / ("b" if i % 2 else "") / f"{i}.txt").write_text(f"\ufeffPicture {i}, né.\n", encoding="utf-8")
  (folder / "notes.md").write_text("no")
  summary, records = imported(folder, part_records=4)
  assert summary["accepted"] == 6 and not summary["rejected"]
  assert [(r.id, r.text, r.images) for r in records] == [
    (str(i), f"Picture {i}, né.", (image(i),)) for i in (0, 2, 4, 1, 3, 5)
  ]


def test_a_caption_teaches_reading_too(folder):
  for i in range(6):
    (folder / ("b" if i % 2 else "") / f"{i}.txt").write_text(f"Picture {i}.")
  _, records = imported(folder, "understanding")
  assert {record.text for record in records} == {f"Picture {i}." for i in range(6)}


def test_another_ending_and_what_is_missing(folder):
  (folder / "0.caption").write_text("Zero.")
  (folder / "2.caption").write_bytes(b"\xff\xfe\xfd")
  summary, records = imported(folder, text_column="caption", max_rejected_share=1.0)
  assert [record.text for record in records] == ["Zero."]
  assert summary["rejected"] == {"missing_caption": 4, "invalid_utf8": 1}


LINES = [{"file_name": f"{'b/' if i % 2 else ''}{i}.png", "text": f"Picture {i}.", "id": f"r{i}"} for i in range(6)]


def as_lines(folder, rows):
  (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")


def as_table(folder, rows):
  cell = lambda x: '"' + x.replace('"', '""') + '"'
  text = "file_name,text,id\r\n" + "".join(",".join(map(cell, row.values())) + "\r\n" for row in rows)
  (folder / "metadata.csv").write_text(text, encoding="utf-8-sig", newline="")


@pytest.mark.parametrize("write", [as_lines, as_table])
def test_metadata_gives_the_same_records(folder, write):
  rows = [{**row, "text": row["text"] + ' "Two",\nlines.'} for row in LINES]
  write(folder, rows)
  summary, records = imported(folder, part_records=4)
  assert summary["accepted"] == 6 and not summary["rejected"]
  for i, record in enumerate(records):
    assert (record.id, record.images, record.text) == (f"r{i}", (image(i),), f'Picture {i}. "Two",\nlines.')


def test_metadata_may_hold_conversations_and_questions(folder):
  turns = [{"role": "user", "content": "<image>\nWhich?"}, {"role": "assistant", "content": "This."}]
  as_lines(
    folder, [{"file_name": "0.png", "messages": turns}, {"file_name": "2.png", "question": "What?", "answer": "A."}]
  )
  _, records = imported(folder, "understanding")
  assert records[0].turns == (Turn("user", "<image>\nWhich?"), Turn("assistant", "This."))
  assert records[1].turns == (Turn("user", "<image>\nWhat?"), Turn("assistant", "A."))


def test_each_folder_may_have_its_own_metadata(folder):
  as_lines(folder, [LINES[0]])
  as_table(folder / "b", [{"file_name": "1.png", "text": "One.", "id": "r1"}])
  _, records = imported(folder)
  assert {record.id for record in records} == {"r0", "r1"}


def test_what_is_broken_costs_its_record(folder):
  rows = [
    json.dumps(LINES[0]),
    "{",
    json.dumps({"text": "no picture"}),
    json.dumps({"file_name": "none.png", "text": "x"}),
    json.dumps({"file_name": "../../x.png", "text": "x"}),
    json.dumps({"file_name": "2.png"}),
    json.dumps({"file_name": "b", "text": "a folder"}),
  ]
  (folder / "metadata.jsonl").write_text("\n".join(rows))
  summary, _ = imported(folder, max_rejected_share=1.0)
  assert summary["accepted"] == 1
  assert summary["rejected"] == {
    "broken_json": 1,
    "missing_image": 2,
    "outside_root": 1,
    "missing_caption": 1,
    "not_a_file": 1,
  }


def both(folder):
  as_lines(folder, LINES)
  as_table(folder, LINES)


@pytest.mark.parametrize(
  "make, part",
  [
    (lambda f: None, "0.txt"),
    (both, "metadata.csv"),
    (lambda f: (f / "metadata.csv").write_text("name,text\n0.png,a\n"), "file_name"),
    (lambda f: (f / "metadata.csv").write_text("file_name,text,text\n0.png,a,b\n"), "twice"),
    (lambda f: (f / "metadata.csv").write_text('file_name,text\n0.png,"a\n'), "line"),
    (lambda f: (f / "metadata.csv").write_bytes(b"file_name,text\n0.png,\xff\n"), "UTF-8"),
    (lambda f: (f / "metadata.jsonl").write_text(json.dumps(LINES[0]), encoding="utf-16"), "UTF-16"),
  ],
)
def test_a_folder_that_cannot_be_read_is_one_line(folder, make, part):
  make(folder)
  with pytest.raises(UserError) as error:
    imported(folder)
  assert part in str(error.value) and "\n" not in str(error.value)
  assert sorted(os.listdir(folder.parent)) in (["in"], ["in", "out.partial"])


def test_an_input_must_be_a_folder(folder):
  with refused("0.png"):
    run(folder, "generation", "0.png", "imagefolder")
