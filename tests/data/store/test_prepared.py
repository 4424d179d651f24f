"""The prepared directory: read back, refused where it is not whole, verified record by record."""

import gzip
import json
import pathlib

import numpy as np
import pytest
from data_config import data_config
from preparing import image, make_folder, read_back, run
from refusals import refused

from jflow.batch import RowShape
from jflow.data import held_out
from jflow.data.pipeline import Pipeline
from jflow.data.records import RecordError
from jflow.data.store import lengths, prepared
from jflow.data.store.prepared import PreparedSource
from jflow.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(pathlib.Path(__file__).parents[3] / "configs" / "tokenizer")


@pytest.fixture
def folder(tmp_path):
  return make_folder(tmp_path / "in")


def test_a_directory_that_is_not_whole_is_refused(folder):
  _, output = run(folder, part_records=6)
  with refused("understanding", "data.sources.text"):
    PreparedSource(output, "text")
  shard = pathlib.Path(output, prepared.shard_name("understanding", 1, 2))
  data = shard.read_bytes()
  shard.unlink()
  with refused(shard):
    PreparedSource(output, "understanding")
  shard.write_bytes(data[:-1])
  with refused(f"{len(data) - 1:,}", f"{len(data):,}"):
    PreparedSource(output, "understanding")
  shard.write_bytes(data)
  summary = pathlib.Path(output, "summary.json")
  whole = summary.read_text()
  for content, message in (
    ("{", "summary.json"),
    ('{"schema": 1}', "summary.json"),
    ("", "summary.json"),
    ("42", "summary.json"),
    ("\0" * 90, "summary.json"),
    ("[" * 100_000, "summary.json"),
    (whole.replace('"shard_lengths": [', '"shard_lengths": ["6", '), "summary.json"),
    (whole.replace('"shard_bytes": [', '"shard_bytes": [1, '), "summary.json"),
    (whole.replace('"accepted": 12', '"accepted": 11'), "summary.json"),
    (whole.replace('"fingerprint": "', '"fingerprint": ["'), "summary.json"),
    (summary.read_text().replace('"schema": 1', '"schema": 99'), "schema 99"),
  ):
    summary.write_text(content)
    with refused(message):
      PreparedSource(output, "understanding")


def _readable(output):
  """Returns the ids of the records that can be read, and the reasons of the others."""
  source, ids, reasons = PreparedSource(output, "understanding"), [], []
  for i in range(len(source)):
    try:
      ids.append(source[i].id)
      assert source[i].images == (image(i),)
    except RecordError as error:
      reasons.append(error.reason)
  return ids, reasons


def _flip(output, place):
  shard = pathlib.Path(output, prepared.shard_name("understanding", 0, 1))
  data = bytearray(shard.read_bytes())
  data[place] ^= 1
  shard.write_bytes(data)


def test_a_flipped_bit_costs_its_record(folder):
  _, output = run(folder)
  lost = set()
  for place in range(500, 2500, 150):  # among the records
    _flip(output, place)
    ids, reasons = _readable(output)
    assert len(ids) == 11 and reasons == ["corrupt"]
    lost |= {f"r{i}" for i in range(12)} - set(ids)
    _flip(output, place)  # back
  assert len(lost) > 3 and len(_readable(output)[0]) == 12


def test_an_image_that_is_not_what_was_stored_costs_its_record(folder, monkeypatch):
  _, output = run(folder)
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


def test_a_record_has_the_same_bytes_in_every_process(folder):
  """Protobuf writes the fields of a map in an order of each process, unless they are sorted."""
  _, output = run(folder)
  for index in range(12):
    entry = bytes(PreparedSource(output, "understanding")._records[index])
    places = [entry.index(b"\n" + bytes([len(name)]) + name) for name in (b"conversations", b"id", b"meta", b"text")]
    assert places == sorted(places)


def _pipeline(output):
  config = data_config(mixture=((0, (1, 0, 0)),), sources={"understanding": ((output, 1.0),)})
  return Pipeline(config, TOKENIZER, RowShape(tokens=64, images=2, image_patches=4, image_size=8, writer="flow"), 4, 0)


@pytest.mark.parametrize("damage", [b"\x07", b""])
def test_damaged_outlines_are_named(tmp_path, damage):
  """The first byte of the compressed stream names a kind of block that there is none of; or the file ends there."""
  data = gzip.compress(b"[]" * 500)
  path = tmp_path / "outlines-00000-of-00001.jsonl.gz"
  path.write_bytes(data[:10] + damage + (data[11:] if damage else b""))
  with refused("outlines-00000"):
    list(prepared.read_outlines(str(path)))


@pytest.mark.parametrize(
  "lines",
  [
    b"",
    b'["a", 1, "t", []]\n',
    b'["a", 1, "t", []]\n' * 3,
    b"42\n" * 2,
    b'["a", 1, "t"]\n' * 2,
    b'["a", 1e9, "t", []]\n' * 2,
    b'["a", 99999999999, "t", []]\n' * 2,
    b'["a", ["short"], "t", []]\n' * 2,
    b'["a", [1], "t", []]\n' * 2,
    b'["a", 1, "t", [["user"]]]\n' * 2,
    b'["a", 1, null, []]\n' * 2,
    b"[" * 100_000 + b"\n\n",
    b"\xff\n" * 2,
  ],
  ids=lambda value: ascii(value)[:24],
)
def test_outlines_that_are_not_those_of_the_shard_are_named(tmp_path, lines):
  """An empty file is no damage to gzip, and would leave the shard's records out of the plan without a word."""
  path = tmp_path / "outlines-00000-of-00001.jsonl.gz"
  for content in (gzip.compress(lines), *([b""] if not lines else [])):
    path.write_bytes(content)
    with refused("outlines-00000"):
      list(prepared.read_outlines(str(path), 2))


def test_outlines_hold_out_what_the_records_do(folder):
  """Also those of an earlier version, which hold the number of images in place of their digests."""
  _, output = run(folder)
  source = PreparedSource(output, "understanding")
  wanted = [held_out.is_held_out(record, 0.5) for record in read_back(output)]
  assert 0 < sum(wanted) < 12 and held_out.held_out(source, 0.5).tolist() == wanted
  (path,) = source.outline_paths
  with gzip.open(path, "rt") as lines:
    outlines = [[name, len(images), *rest] for name, images, *rest in map(json.loads, lines)]
  with gzip.open(path, "wt") as new:
    new.writelines(json.dumps(outline) + "\n" for outline in outlines)
  assert held_out.held_out(source, 0.5).tolist() == wanted


def test_the_pipeline_reads_the_directory_and_counts_what_is_damaged(folder):
  _, output = run(folder)
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
  _, output = run(folder)

  def measure():
    return lengths.measure(PreparedSource(output, "understanding"), "understanding", TOKENIZER, "plain", 4, "flow")

  first, rejected = measure()
  assert (first[:, 1] == 1).all() and (first[:, 0] > 8).all() and not rejected

  def never(*_, **__):
    raise AssertionError("measured again")

  with monkeypatch.context() as patch:
    patch.setattr(lengths.examples, "build", never)
    np.testing.assert_array_equal(measure()[0], first)
    with pytest.raises(AssertionError):  # another template has other lengths
      lengths.measure(PreparedSource(output, "understanding"), "understanding", TOKENIZER, "chat", 4, "flow")
  (cache,) = pathlib.Path(output).glob("lengths-*.npz")
  cache.write_bytes(b"damaged")
  np.testing.assert_array_equal(measure()[0], first)
