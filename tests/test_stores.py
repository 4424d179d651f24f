"""Files in a store that drops, delays, cuts and refuses, on loopback: what is read and written is right, or told."""

import io
import random

import loopback
import pytest
from refusals import refused

from jflow import stores, uploads

DATA = random.Random(0).randbytes(50_000)
FAULTS = ["429", "503", "drop", "cut", "hang"]


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setattr(stores, "WAITS", (0.01,) * 6)
  monkeypatch.setattr(stores, "BLOCK", 4096)
  with loopback.serving() as server:
    server.files["bucket/data.bin"] = DATA
    yield server


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_a_further_try(server, fault):
  address = f"{server.address}/bucket/data.bin"
  server.fail(fault)
  with stores.open_file(address) as file:
    server.fail(fault, "drop")
    assert file.read() == DATA and stores.size_of(file) == len(DATA)
  server.fail(fault)
  assert stores.listed(f"{server.address}/bucket")["data.bin"].size == len(DATA)
  server.fail(fault)
  uploads.write_bytes(f"{server.address}/bucket/new", DATA)
  assert server.files["bucket/new"] == DATA and not server.faults


def test_a_file_reads_as_one_of_this_machine(server):
  chance, here = random.Random(1), io.BytesIO(DATA)
  with stores.open_file(f"{server.address}/bucket/data.bin") as there:
    for _ in range(200):
      at, count = chance.randrange(len(DATA) + 5000), chance.choice((0, 1, 100, 5000, 20_000))
      assert there.seek(at) == here.seek(at)
      assert there.read(count) == here.read(count)
    there.seek(0), here.seek(0)
    assert list(there) == list(here)
  assert all(path == "bucket/data.bin" for _, path in server.asked)


def test_folders_are_listed_whole(server):
  names = ["a", "b/c", "b/d/e", "b-c", "f.g"]
  server.files |= {f"bucket/in/{name}": name.encode() for name in names} | {"bucket/in-2/x": b"", "bucket/inner": b""}
  assert {name: known.size for name, known in stores.listed(f"{server.address}/bucket/in").items()} == {
    name: len(name) for name in names
  }
  assert stores.listed(f"{server.address}/bucket/none") == {}
  assert stores.exists(f"{server.address}/bucket/in/b") and not stores.exists(f"{server.address}/bucket/in/z")


@pytest.mark.parametrize("status", ["401", "403", "404", "400"])
def test_what_no_try_can_mend_is_refused_at_once(server, status):
  server.always["data.bin"] = status
  address = f"{server.address}/bucket/data.bin"
  with refused(address):
    stores.open_file(address)
  assert [method for method, _ in server.asked if method != "LIST"] == ["HEAD"]


def test_a_server_that_gives_no_ranges_is_refused_at_once(server):
  server.always["data.bin"] = "whole"
  with refused(f"{server.address}/bucket/data.bin", "ranges"):
    stores.head(f"{server.address}/bucket/data.bin", 16)
  assert [method for method, _ in server.asked] == ["HEAD", "GET"]


def test_a_server_that_says_so_is_asked_for_no_ranges(server):
  server.ranges, server.always["data.bin"] = False, "whole"
  address = f"{server.address}/bucket/data.bin"
  for read in (lambda: stores.head(address, 16), lambda: stores.open_file(address)):
    with refused(address, "ranges"):
      read()
  with refused(address, "ranges"):
    stores.download(address, stores.stat(address), io.BytesIO())
  assert {method for method, _ in server.asked} == {"HEAD"}
  server.files["bucket/data.bin"] = DATA[:4096]  # one request gives all of it
  assert stores.open_file(address).read() == DATA[:4096]


def test_a_lost_store_is_given_up_after_tries_that_are_told(server, capsys):
  address = f"{server.address}/bucket/data.bin"
  with stores.open_file(address) as file:
    server.always["data.bin"] = "503"
    with pytest.raises(OSError) as error:
      file.read()
  assert error.value.filename == address and "503" in str(error.value) and "7 tries" in str(error.value)
  assert address in capsys.readouterr().err


def test_one_that_never_answers_is_a_mistake(server, monkeypatch):
  monkeypatch.setattr(stores, "_answered", set())
  server.always["bucket"] = "drop"
  with refused(f"{server.address}/bucket/data.bin", f"{stores.FIRST + 1} tries"):
    stores.open_file(f"{server.address}/bucket/data.bin")


def test_a_file_that_changes_while_it_is_read_is_noticed(server):
  with stores.open_file(f"{server.address}/bucket/data.bin") as file:
    file.read(10)
    server.files["bucket/data.bin"] = DATA[::-1]
    with pytest.raises(OSError, match="changed"):
      file.read()


@pytest.mark.parametrize("tags_of_parts", [False, True])
@pytest.mark.parametrize("fault", ["cut", "flip"])
def test_what_arrived_otherwise_is_sent_again(server, tmp_path, fault, tags_of_parts):
  server.tags_of_parts = tags_of_parts
  (tmp_path / "file").write_bytes(DATA)
  server.fail(fault)
  uploads.upload(str(tmp_path / "file"), f"{server.address}/bucket/new/file")
  assert server.files["bucket/new/file"] == DATA
  assert [method for method, _ in server.asked].count("PUT") == 2


def test_a_bucket_that_is_not_there_is_told(server):
  server.always["none/"] = "404"
  with refused(f"{server.address}/none/file", "bucket"):
    uploads.write_bytes(f"{server.address}/none/file", DATA)
  assert [method for method, _ in server.asked] == ["PUT"]


def test_files_are_copied_and_removed_in_the_store(server):
  uploads.copy(f"{server.address}/bucket/data.bin", f"{server.address}/bucket/two/data.bin")
  assert server.files["bucket/two/data.bin"] == DATA
  for _ in range(2):
    stores.remove(f"{server.address}/bucket/two")
  assert list(server.files) == ["bucket/data.bin"]


@pytest.mark.parametrize(
  "address, said", [("gs://bucket/a", "gcs"), ("https://host/a", "http"), ("nowhere://bucket/a", "nowhere")]
)
def test_a_library_that_is_missing_is_named(address, said, monkeypatch):
  def missing(*_, **__):
    raise ImportError("install it")

  stores._store.cache_clear()
  if said != "nowhere":
    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    monkeypatch.setitem(__import__("sys").modules, "aiohttp", None)
  with refused(address, said):
    stores.stat(address)


def test_a_store_with_folders_gets_those_of_its_files(tmp_path):
  for name in ("a/b/one", "a/c/two"):
    uploads.write_bytes(f"file://{tmp_path}/{name}", DATA)
  uploads.copy(f"file://{tmp_path}/a/b/one", f"file://{tmp_path}/d/three")
  found = stores.listed(f"file://{tmp_path}")
  assert list(found) == ["a/b/one", "a/c/two", "d/three"] and {known.size for known in found.values()} == {len(DATA)}
  assert (tmp_path / "d" / "three").read_bytes() == DATA
  stores.remove(f"file://{tmp_path}/a")
  assert list(stores.listed(f"file://{tmp_path}")) == ["d/three"]


def test_a_web_server_takes_no_files(tmp_path):
  with refused("https://host/a"):
    uploads.need_writable("--output", "https://host/a")
