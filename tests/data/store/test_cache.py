"""A prepared data set in a store: the same records, through copies that are bounded, checked, and shared."""

import concurrent.futures
import errno
import os
import pathlib
import pickle
import random
import time

import loopback
import numpy as np
import pytest
from data_config import data_config
from preparing import make_folder, read_back, run
from refusals import refused

from jflow import stores
from jflow.batch import RowShape
from jflow.data.pipeline import Pipeline
from jflow.data.records import RecordError
from jflow.data.sources import open_source
from jflow.data.store import shards
from jflow.data.store.cache import Cache
from jflow.data.store.prepared import PreparedSource
from jflow.data.tokenizer import Tokenizer
from jflow.errors import Stopped

TOKENIZER = Tokenizer.load(pathlib.Path(__file__).parents[3] / "configs" / "tokenizer")
TASK = "understanding"


@pytest.fixture
def output(tmp_path):
  """Twelve records in six shards."""
  return run(make_folder(tmp_path / "in"), part_records=2)[1]


@pytest.fixture
def server(output, monkeypatch):
  monkeypatch.setattr(stores, "WAITS", (0.01,) * 6)
  with loopback.serving() as server:
    server.put(pathlib.Path(output), "bucket/set")
    yield server


def held(cache_folder) -> dict[str, int]:
  return {path.name: path.stat().st_size for path in (cache_folder / "shards").iterdir() if path.is_file()}


def records(address, cache):
  source = PreparedSource(address, TASK, cache)
  return [source[i] for i in range(len(source))]


def fetched(server) -> list[str]:
  return [path for method, path in server.asked if method == "GET" and "array_record" in path]


def test_the_records_are_those_of_the_folder_and_each_shard_comes_once(server, output, tmp_path):
  address, cache = f"{server.address}/bucket/set", Cache(str(tmp_path / "cache"), 2**30)
  source = PreparedSource(address, TASK, cache)
  assert list(source.outlines()) == list(PreparedSource(output, TASK).outlines())
  assert not fetched(server)
  assert records(address, cache) == read_back(output)
  again = pickle.loads(pickle.dumps(PreparedSource(address, TASK, Cache(str(tmp_path / "cache"), 2**30))))
  assert [again[i] for i in range(len(again))] == read_back(output)
  assert len(fetched(server)) == len(set(fetched(server))) == 6


def test_copies_stay_within_their_bound_and_the_least_used_goes_first(server, output, tmp_path):
  address = f"{server.address}/bucket/set"
  most = int(2.5 * max(os.path.getsize(p) for p in pathlib.Path(output).glob("*array_record*")))
  source = PreparedSource(address, TASK, Cache(str(tmp_path / "cache"), most))
  for index in (0, 2, 0, 4, 0, 6):
    source[index]
    for number, copy in enumerate(sorted((tmp_path / "cache" / "shards").glob("*array_record*"))):
      assert number < 2 and copy.stat().st_size
    os.utime(next((tmp_path / "cache" / "shards").glob(f"*{shards_name(0)}")))  # seconds would pass
  names = sorted(name[25:] for name in held(tmp_path / "cache"))
  assert names == [shards_name(0), shards_name(3)]


def shards_name(number: int) -> str:
  return f"jflow_{TASK}-train.array_record-{number:05d}-of-00006"


def test_threads_of_several_processes_read_the_same_through_a_small_cache(server, output, tmp_path):
  """Locks are those of open files, so that several caches in one process stand for several processes."""
  address, truth = f"{server.address}/bucket/set", read_back(output)
  most = int(3.5 * max(os.path.getsize(p) for p in pathlib.Path(output).glob("*array_record*")))
  sources = [PreparedSource(address, TASK, Cache(str(tmp_path / "cache"), most)) for _ in range(3)]

  def read(seed: int) -> bool:
    chance, source = random.Random(seed), sources[seed % 3]
    return all(source[i] == truth[i] for i in (chance.randrange(12) for _ in range(30)))

  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    assert all(pool.map(read, range(6)))
  assert sum(held(tmp_path / "cache").values()) <= most and not [n for n in held(tmp_path / "cache") if "part" in n]


@pytest.mark.parametrize("fault", ["503", "cut", "drop", "flip"])
def test_a_shard_comes_whole_in_spite_of_faults(server, output, tmp_path, fault):
  source = PreparedSource(f"{server.address}/bucket/set", TASK, Cache(str(tmp_path / "cache"), 2**30))
  truth = read_back(output)
  for index in range(0, 12, 2):
    server.fail(fault)
    assert source[index] == truth[index]


def test_a_shard_that_was_changed_in_the_store_is_named(server, tmp_path):
  source = PreparedSource(f"{server.address}/bucket/set", TASK, Cache(str(tmp_path / "cache"), 2**30))
  name = f"bucket/set/{shards_name(1)}"
  server.files[name] = loopback._flipped(server.files[name])
  assert source[0].id == "r0"
  with refused(f"{server.address}/{name}"):
    source[2]
  assert not [one for one in held(tmp_path / "cache") if shards_name(1) in one]


class Slow(Cache):
  """A cache in which other threads meet the damage that one of them has met."""

  def drop_damaged(self, remote):
    time.sleep(0.2)
    return super().drop_damaged(remote)


def test_a_damaged_copy_is_fetched_again_and_a_damaged_shard_costs_its_record(server, output, tmp_path):
  address, cache = f"{server.address}/bucket/set", Cache(str(tmp_path / "cache"), 2**30)
  assert records(address, cache) == read_back(output)
  (copy,) = (tmp_path / "cache" / "shards").glob(f"*{shards_name(0)}")
  data = bytearray(copy.read_bytes())
  data[400] ^= 1
  copy.write_bytes(data)
  assert records(address, cache) == read_back(output) and copy.read_bytes() != data
  copy.write_bytes(data)
  source, truth = PreparedSource(address, TASK, Slow(str(tmp_path / "cache"), 2**30)), read_back(output)[0]
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    assert all(pool.map(lambda _: source[0] == truth, range(4)))
  copy.write_bytes(data[:-1])
  assert records(address, cache) == read_back(output)
  # In the store itself, in a set without a list of hashes, as of earlier versions:
  del server.files[f"bucket/set/{shards.CHECKSUMS}"]
  server.files[f"bucket/set/{shards_name(0)}"] = bytes(data)
  source = PreparedSource(address, TASK, cache)
  reasons = []
  for index in (0, 1):
    try:
      source[index]
    except RecordError as error:
      reasons.append(error.reason)
  assert reasons == ["corrupt"] and source[2].id == "r2"


def test_a_full_disk_costs_old_copies_and_is_waited_for(server, output, tmp_path, monkeypatch, capsys):
  """The kernel refuses to reserve room, as on a full disk."""
  source = PreparedSource(f"{server.address}/bucket/set", TASK, Cache(str(tmp_path / "cache"), 2**30))
  source[0], source[2]
  full, reserve = [], os.posix_fallocate

  def refuse(descriptor, offset, size):
    if full:
      full.pop()
      raise OSError(errno.ENOSPC, "No space left on device")
    reserve(descriptor, offset, size)

  monkeypatch.setattr(os, "posix_fallocate", refuse)
  full += [1] * 4
  assert source[4].id == "r4" and len(held(tmp_path / "cache")) == 1
  assert "full" in capsys.readouterr().err
  full += [1] * 100
  with refused(tmp_path / "cache", "data.cache", error=Stopped):
    source[6]
  full.clear()
  assert source[6].id == "r6"


def test_a_lost_store_stops_the_run_and_what_is_here_is_still_read(server, tmp_path):
  address = f"{server.address}/bucket/set"
  source = PreparedSource(address, TASK, Cache(str(tmp_path / "cache"), 2**30))
  source[0]
  server.always["bucket"] = "drop"
  assert source[1].id == "r1"
  with refused(f"{address}/{shards_name(1)}", "tries", error=Stopped):
    source[2]


def test_mistakes_are_named_before_a_run_starts(server, tmp_path):
  address = f"{server.address}/bucket/set"
  (tmp_path / "file").write_bytes(b"")
  with refused("data.cache", tmp_path / "file"):
    open_source(address, TASK, data_config(cache=str(tmp_path / "file")))
  with refused("data.cache_gib", f"{address}/jflow_"):
    open_source(address, TASK, data_config(cache=str(tmp_path / "cache"), cache_gib=1e-7))
  with refused(f"{server.address}/bucket/none"):
    open_source(f"{server.address}/bucket/none", TASK, data_config(cache=str(tmp_path / "cache")))
  with refused("data.sources.text"):
    open_source(address, "text", data_config(cache=str(tmp_path / "cache")))
  lost = server.files.pop(f"bucket/set/{shards_name(3)}")
  with refused(f"{address}/{shards_name(3)}"):
    open_source(address, TASK, data_config(cache=str(tmp_path / "cache")))
  server.files[f"bucket/set/{shards_name(3)}"] = lost[:-1]
  with refused(shards_name(3), f"{len(lost):,}"):
    open_source(address, TASK, data_config(cache=str(tmp_path / "cache")))
  server.always["summary.json"] = "403"
  with refused("summary.json"):
    open_source(address, TASK, data_config(cache=str(tmp_path / "cache")))


def test_the_batches_are_those_of_the_folder(server, output, tmp_path):
  def pipeline(place):
    fields = dict(cache=str(tmp_path / "cache"), plan_cache=str(tmp_path / "plans"))
    config = data_config(mixture=((0, (1, 0, 0)),), sources={TASK: ((place, 1.0),)}, **fields)
    shape = RowShape(tokens=64, images=2, image_patches=4, image_size=8, writer="flow")
    return Pipeline(config, TOKENIZER, shape, 4, 0)

  here, there = pipeline(output), pipeline(f"{server.address}/bucket/set/")
  for step in range(3):
    for one, other in zip(here.batch(step), there.batch(step)):
      np.testing.assert_array_equal(one, other)
  fingerprints = [[s["fingerprint"] for s in one.identity()[TASK]] for one in (here, there)]
  assert fingerprints[0] == fingerprints[1] and len(list((tmp_path / "plans").iterdir())) >= 2
