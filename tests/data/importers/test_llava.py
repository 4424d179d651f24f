"""llava-jsonl: conversations, captions, lists, arrays; what is broken is counted under its reason."""

import io
import json
import os
import pathlib
import re
import shutil
import zlib

import numpy as np
import pytest
from PIL import Image
from preparing import chat, image, make_folder, read_back, run, write_lines
from refusals import refused


@pytest.fixture
def folder(tmp_path):
  return make_folder(tmp_path / "in")


def test_captions_lists_arrays_and_texts(folder):
  entries = [
    {"image": "pictures/1.png", "caption": "one"},
    {"image": ["pictures/2.png"], "caption": "two", "id": 7},
  ]
  (folder / "captions.json").write_text("\ufeff" + json.dumps(entries), encoding="utf-8")
  _, output = run(folder, "generation", "captions.json")
  assert [(r.id, r.images, r.text, r.turns) for r in read_back(output, "generation")] == [
    ("0", (image(1),), "one", ()),
    ("7", (image(2),), "two", ()),
  ]
  shutil.rmtree(output)
  write_lines(
    folder / "many.jsonl",
    [
      chat(["pictures/3.png", "pictures/4.png"], "<image> or <image>?"),
      {"image": "pictures/5.png", "caption": "five"},
    ],
  )
  _, output = run(folder, name="many.jsonl")
  assert [(r.images, r.text) for r in read_back(output)] == [
    ((image(3), image(4)), ""),
    ((image(5),), "five"),
  ]
  shutil.rmtree(output)
  write_lines(
    folder / "text.jsonl",
    [{"text": "A story."}, {"conversations": chat("", "Why?", "So.")["conversations"]}],
  )
  _, output = run(folder, "text", "text.jsonl")
  assert [(r.text, len(r.turns)) for r in read_back(output, "text")] == [("A story.", 0), ("", 2)]


@pytest.mark.parametrize(
  "part", [{"image": "pictures/3.png"}, {"path": "pictures/3.png"}, {"image_url": {"url": "pictures/3.png"}}]
)
def test_parts_of_a_message_name_their_pictures(folder, part):
  shown = {"type": "image_url" if "image_url" in part else "image", **part}
  asked = [{"type": "image", "image": "pictures/4.png"}, {"type": "text", "text": "\nand "}, shown]
  said = [{"type": "text", "text": "These."}]
  messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
  write_lines(folder / "messages.jsonl", [{"messages": messages}])
  _, output = run(folder, name="messages.jsonl")
  (record,) = read_back(output)
  assert record.images == (image(4), image(3))
  assert [turn[1] for turn in record.turns] == ["<image>\nand <image>", "These."]


def _damaged() -> dict[str, bytes]:
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  png = image(0)
  header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + png[24:29]
  jpeg, bitmap = io.BytesIO(), io.BytesIO()
  Image.fromarray(noise).save(jpeg, "JPEG")
  Image.fromarray(noise).save(bitmap, "BMP")
  return {
    "cut.jpg": jpeg.getvalue()[:-2000],
    "empty.png": b"",
    "map.bmp": bitmap.getvalue(),
    "text.png": b"hello",
    "bomb.png": png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:],
  }


BAD_LINES = [
  (b'{"image": ', "broken_json"),
  (b"[1]", "broken_json"),
  (b'{"a": ' * 5000, "broken_json"),
  (b'{"image": "pictures/1.png", "caption": "\xff"}', "invalid_utf8"),
  (chat("pictures/1.png", answer="\ud800"), "invalid_utf8"),
  (chat("pictures/99.png"), "missing_image"),
  (chat("pictures"), "not_a_file"),
  (chat("fifo.jpg"), "not_a_file"),
  (chat("a\0b.png"), "missing_image"),
  (chat("../outside.png"), "outside_root"),
  (chat("/etc/hostname"), "outside_root"),
  (chat(["pictures/1.png", 3]), "bad_field"),
  (chat({}), "bad_field"),
  ({"image": "pictures/1.png", "caption": ["x"]}, "bad_field"),
  ({"image": "pictures/1.png", "caption": " "}, "empty_caption"),
  ({"image": "pictures/1.png"}, "missing_caption"),
  ({"image": "pictures/1.png", "conversations": "hello"}, "bad_field"),
  ({"image": "pictures/1.png", "conversations": [{"from": "system", "value": "x"}]}, "bad_turns"),
  ({"image": "pictures/1.png", "conversations": []}, "no_answer"),
  ({"image": "pictures/1.png", "conversations": chat("")["conversations"][:1]}, "no_answer"),
  (chat("pictures/1.png", answer=""), "no_answer"),
  (chat("pictures/1.png", question="Which?"), "image_marks"),
  ({"image": "pictures/1.png", "conversations": [{"from": "robot", "value": "x"}]}, "bad_turns"),
  ({"image": "pictures/1.png", "conversations": ["x"]}, "bad_turns"),
  ({"caption": "no image"}, "image_count"),
  ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image_count"),
  (chat("cut.jpg"), "unreadable"),
  (chat("empty.png"), "empty"),
  (chat("map.bmp"), "format"),
  (chat("text.png"), "format"),
  (chat("bomb.png"), "too_large"),
]


def test_each_broken_line_is_counted_under_its_reason(folder):
  for name, data in _damaged().items():
    (folder / name).write_bytes(data)
  (folder.parent / "outside.png").write_bytes(image(0))
  os.mkfifo(folder / "fifo.jpg")
  good = [chat(f"pictures/{i}.png") for i in range(3)]
  write_lines(
    folder / "chat.jsonl",
    [
      good[0],
      *[line for line, _ in BAD_LINES[:9]],
      good[1],
      b"  ",
      *[line for line, _ in BAD_LINES[9:]],
      good[2],
    ],
  )
  summary, output = run(folder, max_rejected_share=1.0, part_records=7)
  reasons = [reason for _, reason in BAD_LINES]
  assert summary["rejected"] == {reason: reasons.count(reason) for reason in reasons}
  assert summary["accepted"] == 3 and [r.images for r in read_back(output)] == [(image(i),) for i in range(3)]
  first = summary["first_rejected"]
  assert list(first) == list(summary["rejected"]) and first["broken_json"]["where"].endswith("chat.jsonl line 2")
  assert re.search("99.png not found .* see --image_root", first["missing_image"]["message"])
  assert first["unreadable"]["message"] == "the image is cut short"
  listed = [json.loads(line) for line in pathlib.Path(output, "rejected.jsonl").read_text().splitlines()]
  assert [entry["reason"] for entry in listed] == reasons
  said = " ".join(entry["message"] for entry in listed)
  assert "must be a list of turns, got str" in said and "a system turn" in said


def test_images_may_lie_in_a_root_of_their_own(folder, tmp_path):
  shutil.move(folder / "pictures", tmp_path / "root" / "pictures")
  with refused("missing_image"):
    run(folder)
  summary, _ = run(folder, image_root=str(tmp_path / "root"))
  assert summary["accepted"] == 12
  absolute = chat(str(tmp_path / "root" / "pictures" / "3.png"))
  write_lines(folder / "chat.jsonl", [absolute])
  shutil.rmtree(tmp_path / "out")
  assert run(folder, image_root=str(tmp_path / "root"))[0]["accepted"] == 1
  output = str(tmp_path / "again")
  assert run(folder, output=output, image_root=f"/{tmp_path / 'root'}")[0]["accepted"] == 1  # //folder is /folder
