"""Imports from stores and to them, on loopback: the same records, and what a kill or a fault leaves goes on."""

import gzip
import io
import json
import os
import pathlib

import loopback
import pyarrow
import pyarrow.parquet
import pytest
from preparing import chat, image, make_folder, run, write_lines, write_tar
from refusals import refused

from jflow import stores
from jflow.data.filters import Filters
from jflow.data.store import prepare, scratch


@pytest.fixture
def server(tmp_path, monkeypatch):
  monkeypatch.setattr(stores, "WAITS", (0.01,) * 6)
  monkeypatch.setattr(stores, "BLOCK", 1 << 16)
  monkeypatch.setattr(scratch, "FOLDER", str(tmp_path / "scratch"))
  with loopback.serving() as server:
    yield server


def _tars(folder):
  for number in range(3):
    members = {}
    for i in range(4):
      members |= {f"{i}.jpg": image(i, "JPEG"), f"{i}.txt": f"Picture {number} {i}".encode()}
    write_tar(folder / f"{number:05d}.tar{'.gz' if number == 1 else ''}", members, "w:gz" if number == 1 else "w")
  return "generation", "webdataset"


def _tables(folder):
  rows = {"image": [image(i) for i in range(30)], "caption": [f"Number {i}." for i in range(30)]}
  pyarrow.parquet.write_table(pyarrow.table(rows), folder / "a.parquet", row_group_size=11)
  return "generation", "parquet"


def _chats(folder):
  make_folder(folder)
  write_lines(folder / "more.jsonl", [chat("../etc/passwd"), chat("pictures/1.png"), chat("pictures/none.png")])
  (folder / "array.json").write_text(json.dumps([chat("pictures/2.png")]))
  return "understanding", "llava-jsonl"


def _texts(folder):
  (folder / "a.txt").write_text("One document.\nOf two lines.")
  (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "Two."}\n{"text": "Three."}\n'))
  write_lines(folder / "c.jsonl", [{"text": f"Document {i}."} for i in range(20)])
  (folder / ".hidden").mkdir()
  (folder / ".hidden" / "d.txt").write_text("no")
  return "text", "text"


def contents(folder) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir()) if path.is_file()}


def in_store(server, prefix) -> dict[str, bytes]:
  return {name.removeprefix(prefix): data for name, data in sorted(server.files.items()) if name.startswith(prefix)}


def same(here: dict[str, bytes], there: dict[str, bytes]) -> None:
  """Checks the files of two outputs, whose inputs have different names."""
  assert list(here) == list(there)
  one, other = (json.loads(files["summary.json"]) for files in (here, there))
  for summary in (one, other):
    summary.pop("input"), summary.pop("first_rejected")
  assert one == other
  for name in here:
    if name not in ("summary.json", "rejected.jsonl"):
      assert here[name] == there[name], name


@pytest.mark.parametrize("make", [_tars, _tables, _chats, _texts], ids=lambda make: make.__name__[1:])
def test_an_input_in_a_store_gives_what_that_of_a_folder_does(server, tmp_path, make):
  folder = tmp_path / "in"
  folder.mkdir()
  task, format = make(folder)
  options = dict(max_rejected_share=0.5, image_root=str(folder)) if make is _chats else {}
  _, here = run(folder, task, "", format, **options)
  address = server.put(folder, "bucket/in")
  server.fail("503", "drop", "cut", "429")
  if make is _chats:
    options["image_root"] = address
  prepare.prepare(format, str(tmp_path / "there"), task, address, **options)
  same(contents(here), contents(tmp_path / "there"))


@pytest.mark.parametrize("pattern", ["in/*.tar*", "in/{00000..00002}.tar", "in", "in/", "**/0000[0-2].tar*"])
def test_files_are_named_as_those_of_a_folder(server, tmp_path, pattern):
  (tmp_path / "in").mkdir()
  _tars(tmp_path / "in")
  if "{" in pattern:
    (tmp_path / "in" / "00001.tar.gz").rename(tmp_path / "in" / "00001.tar")
  address = server.put(tmp_path / "in", "bucket/in").removesuffix("in")
  server.files["bucket/in/.hidden/9.tar"] = b""
  summary = prepare.prepare("webdataset", str(tmp_path / "out"), "generation", address + pattern)
  assert summary["accepted"] == 12


def test_a_page_of_a_web_server_is_its_folder(server, tmp_path):
  (tmp_path / "in").mkdir()
  _tars(tmp_path / "in")
  address = server.put(tmp_path / "in", "bucket/in")
  server.files["bucket/in"] = server.files["bucket/login.tar"] = b"<html>"
  assert prepare.prepare("webdataset", str(tmp_path / "out"), "generation", address)["accepted"] == 12
  with refused("bucket/login.tar", "holds nothing"):
    prepare.prepare("webdataset", str(tmp_path / "none"), "generation", f"{server.address}/bucket/login.tar")


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(server, tmp_path):
  (tmp_path / "in").mkdir()
  _tars(tmp_path / "in")
  server.files["bucket/a[0].tar?download=true"] = (tmp_path / "in" / "00000.tar").read_bytes()
  address = f"{server.address}/bucket/a[0].tar?download=true"
  assert prepare.prepare("webdataset", str(tmp_path / "out"), "generation", address)["accepted"] == 4


@pytest.mark.parametrize(
  "format, name, said",
  [
    ("webdataset", "in/{00000..00009}.tar", "in/00003.tar is missing (7 of the 10"),
    ("webdataset", "in/9.tar", "in/9.tar"),
    ("webdataset", "none/*.tar", "none/*.tar"),
    ("imagefolder", "in", "imagefolder"),
    ("tfds", "in", "tfds"),
    ("webdataset", "secret", "secret"),
  ],
)
def test_what_cannot_be_read_is_one_line(server, tmp_path, format, name, said):
  (tmp_path / "in").mkdir()
  _tars(tmp_path / "in")
  (tmp_path / "in" / "00001.tar.gz").rename(tmp_path / "in" / "00001.tar")
  address = server.put(tmp_path / "in", "bucket/in").removesuffix("in")
  server.always["secret"] = "403"
  with refused(said):
    prepare.prepare(format, str(tmp_path / "out"), "generation", address + name)


def test_an_output_in_a_store_is_that_of_a_folder(server, tmp_path):
  folder = make_folder(tmp_path / "in")
  write_lines(folder / "more.jsonl", [chat("none.png")])
  options = dict(part_records=3, max_rejected_share=0.5)
  _, here = run(folder, name="", **options)
  address = f"{server.address}/bucket/out"
  server.fail("503", "cut", "drop", "flip")
  run(folder, name="", output=address, **options)
  assert in_store(server, "bucket/out/") == contents(here) and not server.faults
  assert not in_store(server, "bucket/out.partial") and not any(files for *_, files in os.walk(tmp_path / "scratch"))
  with refused(address, "exists"):
    run(folder, name="", output=address, **options)


@pytest.mark.parametrize("moment", ["part-00002.array_record", "part-00002.json", "summary.json"])
def test_an_import_whose_store_is_lost_goes_on(server, tmp_path, moment):
  folder = make_folder(tmp_path / "in")
  with open(folder / "chat.jsonl", "a") as lines:
    lines.write(json.dumps(chat("pictures/1.png", answer="Number 1, né.")) + "\n")
    lines.write(json.dumps(chat("pictures/1.png", answer="Other.")) + "\n")
  options = dict(part_records=3, filters=Filters(duplicates="exact"))
  _, here = run(folder, **options)
  address = f"{server.address}/bucket/out"
  server.always[moment] = "503"
  if moment == "summary.json":
    server.always = {"out/summary.json": "503"}
  with refused(moment, "go on"):
    run(folder, output=address, **options)
  assert not [name for name in server.files if name.endswith("out/summary.json")]
  assert ("bucket/out.partial/kept-00004.json" in server.files) == (moment == "summary.json")
  server.always.clear()
  server.asked.clear()
  server.files["bucket/out/outlines-00000-of-00009.jsonl.gz"] = b"of an input with more parts"
  run(folder, output=address, **options)
  assert in_store(server, "bucket/out/") == contents(here)
  sent = [path for method, path in server.asked if method == "PUT"]
  assert not [path for path in sent if "part-00001" in path]
  assert moment != "summary.json" or not [path for path in sent if "kept-00004" in path]


def test_shares_in_a_store_are_joined_there(server, tmp_path):
  folder = make_folder(tmp_path / "in")
  _, here = run(folder, part_records=3)
  address = f"{server.address}/bucket/out"
  with refused("--part=K/N"):
    run(folder, output=address, part_records=3, merge=True)
  for machine in (3, 1):
    run(folder, output=address, part_records=3, part=(machine, 3))
  with refused("--part=2/3", "machine-00002-of-00003"):
    run(folder, output=address, part_records=3, merge=True)
  run(folder, output=address, part_records=3, part=(2, 3))
  lost = server.files.pop("bucket/out.machine-00002-of-00003/part-00001.outlines")
  with refused("--part=2/3", "part-00001"):
    run(folder, output=address, part_records=3, merge=True)
  server.files["bucket/out.machine-00002-of-00003/part-00001.outlines"] = lost
  run(folder, output=address, part_records=3, merge=True)
  assert in_store(server, "bucket/out/") == contents(here)
  assert {name.split("/")[1] for name in server.files} == {"out"}


def test_an_output_is_not_written_over_what_is_not_its_own(server, tmp_path):
  folder = make_folder(tmp_path / "in")
  server.files["bucket/out/mine.txt"] = b"precious"
  with refused(f"{server.address}/bucket/out"):
    run(folder, output=f"{server.address}/bucket/out")
  server.files["bucket/two.partial/mine.txt"] = b"precious"
  with refused("two.partial", "mine.txt"):
    run(folder, output=f"{server.address}/bucket/two")
  assert set(server.files) == {"bucket/out/mine.txt", "bucket/two.partial/mine.txt"}
  server.always["three"] = "403"
  with refused(f"{server.address}/bucket/three"):
    run(folder, output=f"{server.address}/bucket/three")


def test_a_table_is_read_by_its_columns_and_not_whole(server, tmp_path):
  """A column that no import reads is not fetched, and the store is asked once for size and version, not for each row
  group."""
  rows = {"image": [image(i) for i in range(8)], "caption": ["A."] * 8, "payload": [os.urandom(1 << 17)] * 8}
  columns, heads = dict(image_column="image", text_column="caption"), set()
  for group in (8, 2):
    buffer, name = io.BytesIO(), f"bucket/{group}.parquet"
    table = pyarrow.table(rows)
    pyarrow.parquet.write_table(table, buffer, use_dictionary=False, compression="none", row_group_size=group)
    server.files[name] = buffer.getvalue()
    address = f"{server.address}/{name}"
    summary = prepare.prepare("parquet", str(tmp_path / f"{group}"), "generation", address, **columns)
    assert summary["accepted"] == 8
    methods = [method for method, path in server.asked if path == name]
    assert methods.count("GET") * stores.BLOCK < len(buffer.getvalue())
    heads.add(methods.count("HEAD"))
  assert len(heads) == 1


def test_a_picture_that_a_store_does_not_give_ends_the_import(server, tmp_path):
  """Access that was lost is no fault of the record."""
  address = server.put(make_folder(tmp_path / "in"), "bucket/in")
  server.always["pictures/7.png"] = "403"
  with refused("pictures/7.png"):
    prepare.prepare("llava-jsonl", str(tmp_path / "out"), "understanding", address, max_rejected_share=1.0)
