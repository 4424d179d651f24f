"""prepare: what goes in comes out, what is broken is counted, a kill costs nothing."""

import io
import json
import os
import pathlib
import shutil
import zlib

import numpy as np
import pytest
from PIL import Image

from jflow.batch import TASKS, RowShape
from jflow.data import lengths, prepare, prepare_command, prepared
from jflow.data.pipeline import Pipeline
from jflow.data.prepared import PreparedSource
from jflow.data.records import RecordError, Turn
from jflow.data.shapes import ShapesSource
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError

TOKENIZER = Tokenizer.load(pathlib.Path(__file__).parent.parent / "configs" / "tokenizer")


def _image(index: int, format: str = "PNG") -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(np.full((9, 12 + index, 3), index, np.uint8)).save(buffer, format)
  return buffer.getvalue()


def _chat(image, question="<image>\nWhich?", answer="This.", **more):
  return {
    "image": image,
    "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    **more,
  }


@pytest.fixture
def folder(tmp_path):
  """A folder with 12 images and their conversations."""
  folder = tmp_path / "in"
  (folder / "pictures").mkdir(parents=True)
  for i in range(12):
    (folder / "pictures" / f"{i}.png").write_bytes(_image(i))
  _write(
    folder / "chat.jsonl",
    [_chat(f"pictures/{i}.png", answer=f"Number {i}, né.", id=f"r{i}") for i in range(12)],
  )
  return folder


def _write(path, lines):
  with open(path, "wb") as file:
    for line in lines:
      file.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")
  return str(path)


def _run(folder, task="understanding", name="chat.jsonl", **options):
  output = str(folder.parent / "out")
  summary = prepare.prepare("llava-jsonl", output, task, str(folder / name), **options)
  return summary, output


def _all(output, task="understanding"):
  source = PreparedSource(output, task)
  return [source[i] for i in range(len(source))]


def test_records_come_out_as_they_went_in(folder):
  summary, output = _run(folder, part_records=5)
  assert summary["accepted"] == 12 and summary["rejected"] == {} and summary["schema"] == 1
  assert json.loads(pathlib.Path(output, "summary.json").read_text()) == summary
  for i, record in enumerate(_all(output)):
    assert record.id == f"r{i}" and record.images == (_image(i),) and record.text == ""
    assert record.turns == (Turn("user", "<image>\nWhich?"), Turn("assistant", f"Number {i}, né."))
  outlines = list(PreparedSource(output, "understanding").outlines())
  assert outlines == [record._replace(images=(None,)) for record in _all(output)]
  assert sorted(os.listdir(folder.parent)) == ["in", "out"]


def test_tfds_reads_the_directory(folder):
  import tensorflow_datasets as tfds

  _, output = _run(folder, part_records=5)
  source = tfds.builder_from_directory(output).as_data_source("train")
  assert len(source) == 12
  for i in (0, 4, 5, 11):
    assert source[i]["id"] == f"r{i}".encode() and list(source[i]["images"]) == [_image(i)]
    assert json.loads(source[i]["conversations"])[1] == ["assistant", f"Number {i}, né."]
    assert json.loads(source[i]["meta"])["sizes"] == [[12 + i, 9]]


def test_captions_lists_arrays_and_texts(folder):
  entries = [
    {"image": "pictures/1.png", "caption": "one"},
    {"image": ["pictures/2.png"], "caption": "two", "id": 7},
  ]
  (folder / "captions.json").write_text("\ufeff" + json.dumps(entries), encoding="utf-8")
  _, output = _run(folder, "generation", "captions.json")
  assert [(r.id, r.images, r.text, r.turns) for r in _all(output, "generation")] == [
    ("0", (_image(1),), "one", ()),
    ("7", (_image(2),), "two", ()),
  ]
  shutil.rmtree(output)
  _write(
    folder / "many.jsonl",
    [
      _chat(["pictures/3.png", "pictures/4.png"], "<image> or <image>?"),
      {"image": "pictures/5.png", "caption": "five"},
    ],
  )
  _, output = _run(folder, name="many.jsonl")
  assert [(r.images, r.text) for r in _all(output)] == [((_image(3), _image(4)), ""), ((_image(5),), "five")]
  shutil.rmtree(output)
  _write(
    folder / "text.jsonl",
    [{"text": "A story."}, {"conversations": _chat("", "Why?", "So.")["conversations"]}],
  )
  _, output = _run(folder, "text", "text.jsonl")
  assert [(r.text, len(r.turns)) for r in _all(output, "text")] == [("A story.", 0), ("", 2)]


def _damaged() -> dict[str, bytes]:
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  png = _image(0)
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
  (_chat("pictures/1.png", answer="\ud800"), "invalid_utf8"),
  (_chat("pictures/99.png"), "missing_image"),
  (_chat("pictures"), "missing_image"),
  (_chat("a\0b.png"), "missing_image"),
  (_chat("../outside.png"), "outside_root"),
  (_chat("/etc/hostname"), "outside_root"),
  (_chat(["pictures/1.png", 3]), "bad_field"),
  (_chat({}), "bad_field"),
  ({"image": "pictures/1.png", "caption": ["x"]}, "bad_field"),
  ({"image": "pictures/1.png", "caption": " "}, "empty_caption"),
  ({"image": "pictures/1.png"}, "missing_caption"),
  ({"image": "pictures/1.png", "conversations": []}, "no_answer"),
  ({"image": "pictures/1.png", "conversations": _chat("")["conversations"][:1]}, "no_answer"),
  (_chat("pictures/1.png", answer=""), "no_answer"),
  (_chat("pictures/1.png", question="Which?"), "image_marks"),
  ({"image": "pictures/1.png", "conversations": [{"from": "robot", "value": "x"}]}, "bad_turns"),
  ({"image": "pictures/1.png", "conversations": ["x"]}, "bad_turns"),
  ({"caption": "no image"}, "image_count"),
  (_chat("cut.jpg"), "unreadable"),
  (_chat("empty.png"), "empty"),
  (_chat("map.bmp"), "format"),
  (_chat("text.png"), "format"),
  (_chat("bomb.png"), "too_large"),
]


def test_each_broken_line_is_counted_under_its_reason(folder):
  for name, data in _damaged().items():
    (folder / name).write_bytes(data)
  (folder.parent / "outside.png").write_bytes(_image(0))
  good = [_chat(f"pictures/{i}.png") for i in range(3)]
  _write(
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
  summary, output = _run(folder, max_rejected_share=1.0, part_records=7)
  reasons = [reason for _, reason in BAD_LINES]
  assert summary["rejected"] == {reason: reasons.count(reason) for reason in reasons}
  assert summary["accepted"] == 3 and [r.images for r in _all(output)] == [(_image(i),) for i in range(3)]
  first = summary["first_rejected"]
  assert list(first) == list(summary["rejected"]) and first["broken_json"]["where"].endswith(
    "chat.jsonl line 2"
  )
  assert "99.png not found" in first["missing_image"]["message"]
  listed = [json.loads(line) for line in pathlib.Path(output, "rejected.jsonl").read_text().splitlines()]
  assert [entry["reason"] for entry in listed] == reasons


def test_too_many_broken_lines_write_nothing_and_name_the_first(folder):
  lines = (
    [_chat("pictures/1.png")] * 97 + [_chat("pictures/none.png")] + [_chat("pictures/2.png", answer="")] * 2
  )
  _write(folder / "chat.jsonl", lines)
  with pytest.raises(UserError, match=r"line 98: image pictures/none.png not found .*3 of 100 .*share=0.02"):
    _run(folder, max_rejected_share=0.02)
  assert os.listdir(folder.parent) == ["in"]
  summary, _ = _run(folder, max_rejected_share=0.03)
  assert summary["accepted"] == 97


def test_images_may_lie_in_a_root_of_their_own(folder, tmp_path):
  shutil.move(folder / "pictures", tmp_path / "root" / "pictures")
  with pytest.raises(UserError, match="missing_image"):
    _run(folder)
  summary, _ = _run(folder, image_root=str(tmp_path / "root"))
  assert summary["accepted"] == 12
  absolute = _chat(str(tmp_path / "root" / "pictures" / "3.png"))
  _write(folder / "chat.jsonl", [absolute])
  shutil.rmtree(tmp_path / "out")
  assert _run(folder, image_root=str(tmp_path / "root"))[0]["accepted"] == 1


@pytest.mark.parametrize("task", TASKS)
def test_the_built_in_world_is_drawn_once(tmp_path, task):
  output = str(tmp_path / "out")
  summary = prepare.prepare("shapes", output, task, records=7, seed=3, image_size=32)
  world = ShapesSource(task, 7, 3)
  assert summary["accepted"] == 7
  for i, record in enumerate(_all(output, task)):
    assert (record.text, record.turns) == (world[i].text, world[i].turns)
    for image, scene in zip(record.images, world[i].images, strict=True):
      np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image))), scene.render(32))


def _contents(directory):
  return {path.name: path.read_bytes() for path in pathlib.Path(directory).iterdir()}


@pytest.mark.parametrize("killed_after", [0, 1, 3])
def test_a_killed_run_goes_on_without_losing_or_doubling(folder, monkeypatch, killed_after):
  imported = []
  import_part = prepare._import_part

  def killed(importer, part, index, *rest):
    if len(imported) == killed_after:
      pathlib.Path(folder.parent, "out.partial", f"part-{index:05d}.array_record").write_bytes(b"half")
      raise KeyboardInterrupt
    imported.append(index)
    return import_part(importer, part, index, *rest)

  monkeypatch.setattr(prepare, "_import_part", killed)
  with pytest.raises(KeyboardInterrupt):
    _run(folder, part_records=3)
  assert not (folder.parent / "out").exists()
  killed_after = 99
  summary, output = _run(folder, part_records=3)
  assert imported == [0, 1, 2, 3]
  assert [record.id for record in _all(output)] == [f"r{i}" for i in range(12)] and summary["accepted"] == 12


def test_parts_of_another_input_are_not_used(folder, monkeypatch):
  import_part = prepare._import_part

  def killed(importer, part, index, *rest):
    if index == 2:
      raise KeyboardInterrupt
    return import_part(importer, part, index, *rest)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(prepare, "_import_part", killed)
    _run(folder, part_records=3)
  _write(folder / "chat.jsonl", [_chat("pictures/1.png", answer="changed")] * 10)
  _, output = _run(folder, part_records=3)
  assert [record.turns[1].text for record in _all(output)] == ["changed"] * 10


def test_processes_do_not_change_the_records(folder):
  first, output = _run(folder, part_records=3)
  records = _all(output)
  shutil.rmtree(output)
  second, output = _run(folder, part_records=3, processes=2)
  assert first == second and records == _all(output)


def test_mistakes_get_one_clear_line(folder, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("x")
  with pytest.raises(UserError, match="out exists"):
    _run(folder)
  shutil.rmtree(tmp_path / "out")
  for (format, input, output, task), message in [
    (("llava-jsonl", str(folder / "none.jsonl"), str(tmp_path / "out"), "text"), "none.jsonl not found"),
    (("llava-jsonl", "", str(tmp_path / "out"), "text"), "needs --input"),
    (("parchment", "x", str(tmp_path / "out"), "text"), "--format=parchment is unknown"),
    (("shapes", "", str(tmp_path / "out"), "sculpture"), "--task=sculpture is unknown"),
    (("shapes", "", str(folder / "chat.jsonl" / "out"), "text"), "cannot write"),
  ]:
    with pytest.raises(UserError, match=message):
      prepare.prepare(format, output, task, input)
  (folder / "empty.jsonl").write_bytes(b"")
  with pytest.raises(UserError, match="no records found"):
    _run(folder, name="empty.jsonl")
  (folder / "broken.json").write_text("[1, ")
  with pytest.raises(UserError, match="broken.json: not valid JSON"):
    _run(folder, name="broken.json")
  assert not list(folder.parent.glob("*.partial"))


def test_a_directory_that_is_not_whole_is_refused(folder):
  _, output = _run(folder, part_records=6)
  with pytest.raises(UserError, match="holds understanding records and stands in data.sources.text"):
    PreparedSource(output, "text")
  shard = pathlib.Path(output, prepared.shard_name("understanding", 1, 2))
  data = shard.read_bytes()
  shard.unlink()
  with pytest.raises(UserError, match="is missing"):
    PreparedSource(output, "understanding")
  shard.write_bytes(data[:-1])
  with pytest.raises(UserError, match=f"has {len(data) - 1:,} bytes and should have {len(data):,}"):
    PreparedSource(output, "understanding")
  shard.write_bytes(data)
  summary = pathlib.Path(output, "summary.json")
  for content, message in (
    ("{", "no readable summary.json"),
    ('{"schema": 1}', "no readable summary.json"),
    (summary.read_text().replace('"schema": 1', '"schema": 99'), "schema 99"),
  ):
    summary.write_text(content)
    with pytest.raises(UserError, match=message):
      PreparedSource(output, "understanding")


def _readable(output):
  """Returns the ids of the records that can be read, and the reasons of the others."""
  source, ids, reasons = PreparedSource(output, "understanding"), [], []
  for i in range(len(source)):
    try:
      ids.append(source[i].id)
      assert source[i].images == (_image(i),)
    except RecordError as error:
      reasons.append(error.reason)
  return ids, reasons


def _flip(output, place):
  shard = pathlib.Path(output, prepared.shard_name("understanding", 0, 1))
  data = bytearray(shard.read_bytes())
  data[place] ^= 1
  shard.write_bytes(data)


def test_a_flipped_bit_costs_its_record(folder):
  _, output = _run(folder)
  lost = set()
  for place in range(500, 2500, 150):  # among the records
    _flip(output, place)
    ids, reasons = _readable(output)
    assert len(ids) == 11 and reasons == ["corrupt"]
    lost |= {f"r{i}" for i in range(12)} - set(ids)
    _flip(output, place)  # back
  assert len(lost) > 3 and len(_readable(output)[0]) == 12


def test_an_image_that_is_not_what_was_stored_costs_its_record(folder, monkeypatch):
  _, output = _run(folder)
  source = PreparedSource(output, "understanding")
  read = source._features.deserialize_example_np

  def flipped(example):
    value = read(example)
    if value["id"] == b"r3":
      image = bytearray(value["images"][0])
      image[-20] ^= 1
      value["images"] = [bytes(image)]
    return value

  monkeypatch.setattr(source._features, "deserialize_example_np", flipped)
  with pytest.raises(RecordError) as caught:
    source[3]
  assert caught.value.reason == "checksum"
  assert source[4].id == "r4"


def _pipeline(output):
  config = dict(
    template="plain",
    first_sentence=0.0,
    prompt_drop=0.0,
    workers=0,
    threads=1,
    prefetch=1,
    plan_cache="",
    latents=False,
    max_rejected_share=0.01,
    shapes={},
    mixture=((0, (1, 0, 0)),),
    sources={"understanding": ((output, 1.0),), "generation": (), "text": ()},
  )
  return Pipeline(config, TOKENIZER, RowShape(tokens=64, images=2, image_patches=4, image_size=8), 4, 0)


def test_the_pipeline_reads_the_directory_and_counts_what_is_damaged(folder):
  _, output = _run(folder)
  batches = list(_pipeline(output).batches(0, 3))
  centres = {
    int(batch.images[row, slot, 4, 4, 0])
    for batch, _ in batches
    for row in range(4)
    for slot in np.flatnonzero(batch.image_kind[row])
  }
  assert centres == set(range(12))
  _flip(output, 500)
  rejected = [info["rejected"] for _, info in _pipeline(output).batches(0, 3)]
  assert {reason for counts in rejected for reason in counts} == {"corrupt"}


def test_lengths_are_measured_once(folder, monkeypatch):
  _, output = _run(folder)

  def measure():
    return lengths.measure(PreparedSource(output, "understanding"), "understanding", TOKENIZER, "plain", 4)

  first, rejected = measure()
  assert (first[:, 1] == 1).all() and (first[:, 0] > 8).all() and not rejected

  def never(*_):
    raise AssertionError("measured again")

  with monkeypatch.context() as patch:
    patch.setattr(lengths.examples, "build", never)
    np.testing.assert_array_equal(measure()[0], first)
    with pytest.raises(AssertionError):  # another template has other lengths
      lengths.measure(PreparedSource(output, "understanding"), "understanding", TOKENIZER, "chat", 4)
  (cache,) = pathlib.Path(output).glob("lengths-*.npz")
  cache.write_bytes(b"damaged")
  np.testing.assert_array_equal(measure()[0], first)


def test_the_command_says_what_comes_next(folder, capsys):
  output = str(folder.parent / "out")
  prepare_command.main(
    [
      "--format=llava-jsonl",
      f"--input={folder}/chat.jsonl",
      f"--output={output}",
      "--task=understanding",
      "--processes=1",
    ]
  )
  printed = capsys.readouterr().out
  assert (
    "12 records with 12 images" in printed
    and f"--config.data.sources.understanding=\"(('{output}', 1.0),)\"" in printed
  )


@pytest.mark.parametrize("arguments", [[], ["--format=papyrus"], ["--max_rejected_share=2"], ["--records=0"]])
def test_the_command_refuses_what_it_does_not_know(arguments, capsys):
  full = ["--format=shapes", "--output=x", "--task=text"] if arguments else []
  with pytest.raises(SystemExit) as caught:
    prepare_command.main(full + arguments)
  assert caught.value.code == 2 and "error" in capsys.readouterr().err


def test_help_teaches(capsys):
  with pytest.raises(SystemExit) as caught:
    prepare_command.main(["--help"])
  text = capsys.readouterr().out
  assert caught.value.code == 0 and '"conversations"' in text and "--max_rejected_share" in text
