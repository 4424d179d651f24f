"""A checkpoint in a store is copied once and read as it is here; the store is fsspec's in memory."""

import json
import shutil

import fsspec
import jax
import numpy as np
import pytest
import tiny
from refusals import refused

from jflow.data.tokenizer import Tokenizer
from jflow.evaluation.report import fingerprint
from jflow.interop import native, remote
from jflow.interop.checkpoints import locate, read_checkpoint
from jflow.interop.steps import MANIFEST, sealed_steps


@pytest.fixture
def store(tmp_path, monkeypatch):
  """A workdir with two steps, the second without its manifest, as memory://bucket/run."""
  monkeypatch.setattr(remote.fetch, "__defaults__", (tmp_path / "cache",))
  config = {"model": tiny.DICT | {"reader": "siglip"}, "data": {"template": "plain"}}
  native.save_params(tmp_path / "run", tiny.params(), config, Tokenizer.load(tiny.TOKENIZER))
  steps = tmp_path / "run" / "checkpoints"
  (step,) = sealed_steps(steps)
  shutil.copytree(steps / str(step), steps / str(step + 7))
  (steps / str(step + 7) / MANIFEST).unlink()
  memory = fsspec.filesystem("memory")
  memory.put(str(tmp_path / "run"), "/bucket/run", recursive=True)
  yield memory, step
  memory.rm("/bucket", recursive=True)


def same(a, b) -> bool:
  return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def test_the_newest_complete_step_is_read_and_copied_once(store, monkeypatch, tmp_path):
  memory, step = store
  here = read_checkpoint(tmp_path / "run" / "checkpoints" / str(step))
  found = read_checkpoint("memory://bucket/run")
  assert same(found.params, here.params) and found.config == here.config
  assert (found.tokenizer / "tokenizer.json").read_bytes() == (tiny.TOKENIZER / "tokenizer.json").read_bytes()
  monkeypatch.setattr(memory, "get_file", None)
  for path in ("memory:/bucket/run", f"memory://bucket/run/checkpoints/{step}", "memory://bucket/run/checkpoints/"):
    assert same(read_checkpoint(path).params, here.params)


def test_what_has_changed_is_copied_anew_and_a_flipped_bit_is_found(store):
  memory, step = store
  read_checkpoint("memory://bucket/run")
  name = "/bucket/run/config.json"
  config = json.loads(memory.cat(name))
  memory.pipe(name, json.dumps(config | {"data": {"template": "chat"}}).encode())
  assert read_checkpoint("memory://bucket/run").template == "chat"
  largest = max(memory.find(f"/bucket/run/checkpoints/{step}"), key=memory.size)
  data = bytearray(memory.cat(largest))
  data[len(data) // 2] ^= 1
  memory.pipe(largest, bytes(data))
  with refused("checkpoints"):
    read_checkpoint("memory://bucket/run")


def test_of_a_run_that_stopped_early_the_best_step_is_read(store, tmp_path):
  memory, step = store
  later = f"/bucket/run/checkpoints/{step + 7}"
  memory.pipe(f"{later}/{MANIFEST}", memory.cat(f"/bucket/run/checkpoints/{step}/{MANIFEST}"))
  best = lambda content: (memory.pipe("/bucket/run/best.json", content), locate("memory://bucket/run").name)[1]
  assert locate("memory://bucket/run").name == str(step + 7)
  assert best(json.dumps({"step": step, "val_loss": 1.0}).encode()) == str(step)
  assert locate(f"memory://bucket/run/checkpoints/{step + 7}").name == str(step + 7)
  for damaged in (b"{", b"[]", json.dumps({"step": step + 1}).encode()):
    assert best(damaged) == str(step + 7)


@pytest.mark.parametrize(
  "path, said",
  [
    ("memory://bucket/none", "bucket/none"),
    ("memory://bucket/run/checkpoints/99", "checkpoints/99"),
    ("nowhere://bucket/run", "nowhere://bucket/run"),
  ],
)
def test_a_mistake_is_one_line(store, path, said):
  with refused(said):
    read_checkpoint(path)


def test_a_library_that_is_missing_is_named(monkeypatch):
  def missing(url):
    raise ImportError("Please install gcsfs to access Google Storage")

  monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
  with refused("gs://bucket/run", "gcs"):
    read_checkpoint("gs://bucket/run")


def test_a_copy_that_came_short_is_refused_and_not_kept(store, monkeypatch, tmp_path):
  memory, _ = store
  whole = type(memory).get_file

  def cut(source, target):
    whole(memory, source, target)
    with open(target, "r+b") as file:
      file.truncate(1)

  monkeypatch.setattr(memory, "get_file", cut)
  with refused("memory://bucket/run", "1 bytes"):
    read_checkpoint("memory://bucket/run")
  assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_name_that_leads_out_of_the_folder_is_refused():
  with refused("../../evil.json"):
    remote.files_wanted("gs://bucket/run", {"config.json", "../../evil.json"}, None, lambda name: b"")


def test_a_remote_checkpoint_has_the_fingerprint_of_its_copy(store, tmp_path):
  assert fingerprint(locate("memory://bucket/run"), "ema") == fingerprint(locate(tmp_path / "run"), "ema")


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_the_folder_of_the_moment(name):
  with refused():
    remote.local(name)
