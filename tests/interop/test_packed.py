"""The flat layout of a model: what was packed is what is read, damage is refused, and a name finds the shipped one."""

import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from refusals import refused

import jflow
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.evaluation import report
from jflow.interop import checkpoints, packed, remote

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def pack(folder: pathlib.Path, checkpoint: str, dtype: str = "float32") -> pathlib.Path:
  folder.mkdir()
  found = checkpoints.describe(checkpoint, tokenizer=True)
  params = flatten_dict(found.read_params(), sep="/")
  packed.save(folder, found.config, found.template, params, found.tokenizer, found.has_vae, DTYPES[dtype])
  return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_read_is_what_was_packed_without_the_heads_of_training(tmp_path, tiny_checkpoint, dtype):
  folder = pack(tmp_path / "packed", tiny_checkpoint, dtype)
  read, was = checkpoints.read_checkpoint(folder), checkpoints.read_checkpoint(tiny_checkpoint)
  flat, wanted = flatten_dict(read.params, sep="/"), flatten_dict(was.params, sep="/")
  assert set(wanted) - set(flat) == {name for name in wanted if name.startswith("alignment_head/")} != set()
  for name, x in flat.items():
    np.testing.assert_array_equal(x, wanted[name].astype(DTYPES[dtype]), strict=True)
  assert read.config.to_dict() == was.config.to_dict() | {"objectives": {}} == checkpoints.read_config(folder).to_dict()
  assert (read.template, read.has_vae) == (was.template, was.has_vae)
  assert Tokenizer.load(str(read.tokenizer)).fingerprint == Tokenizer.load(str(was.tokenizer)).fingerprint
  assert checkpoints.locate(folder) == folder


def test_a_packed_model_paints_and_answers_the_same(tmp_path, tiny_checkpoint):
  models = [jflow.load(path) for path in (tiny_checkpoint, pack(tmp_path / "packed", tiny_checkpoint))]
  pictures = [np.asarray(model.generate(["a red circle"], steps=2)[0]) for model in models]
  np.testing.assert_array_equal(*pictures)
  picture = np.zeros((tiny.CONFIG.image_size,) * 2 + (3,), np.uint8)
  assert len({model.understand("what?", [picture], max_tokens=4) for model in models}) == 1


def test_fingerprints_tell_packed_models_apart(tmp_path, tiny_checkpoint):
  folder = pack(tmp_path / "packed", tiny_checkpoint)
  before = report.fingerprint(folder, "ema")
  assert report.fingerprint(pack(tmp_path / "bfloat16", tiny_checkpoint, "bfloat16"), "ema") != before
  (folder / "tokenizer_config.json").write_text("{}")
  assert report.fingerprint(folder, "ema") != before


def _rewritten(folder: pathlib.Path, section: str, field: str, value) -> None:
  fields = json.loads((folder / "config.json").read_text())
  fields["model"][section][field] = value
  (folder / "config.json").write_text(json.dumps(fields))


def _cut(folder: pathlib.Path) -> None:
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
  "damage, words",
  [
    (lambda folder: _rewritten(folder, "language_model", "mlp_dim", 40), "mlp"),
    (lambda folder: _rewritten(folder, "language_model", "num_layers", 3), "language_model/layers"),
    (lambda folder: _rewritten(folder, "generation", "decoder_blocks", 2), "lacks generation_decoder"),
    (lambda folder: _rewritten(folder, "generation", "decoder_blocks", 0), "generation"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    (_cut, "model.safetensors"),
  ],
)
def test_a_folder_that_does_not_fit_together_is_one_clear_line(tmp_path, tiny_checkpoint, damage, words):
  folder = pack(tmp_path / "packed", tiny_checkpoint)
  damage(folder)
  with pytest.raises(UserError) as error:
    checkpoints.describe(folder, tokenizer=True)
  assert words in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("given, value", [(dict(weights="raw"), "'raw'"), (dict(vae="."), "VAE")])
def test_what_a_packed_model_does_not_have_is_refused(tmp_path, tiny_checkpoint, given, value):
  with refused(value):
    checkpoints.describe(pack(tmp_path / "packed", tiny_checkpoint), **given)


def test_the_name_world_is_the_model_that_comes_along(tmp_path, tiny_checkpoint, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(remote.SHIPPED, "world", tmp_path / "none")
  with pytest.raises(UserError) as error:
    checkpoints.describe("world")
  assert "checkpoint world" in str(error.value) and str(tmp_path / "none") in str(error.value)
  folder = pack(tmp_path / "packed", tiny_checkpoint)
  monkeypatch.setitem(remote.SHIPPED, "world", folder)
  assert checkpoints.locate("world") == folder
  assert checkpoints.read_config("world") == checkpoints.read_config(folder)
  shutil.copytree(folder, tmp_path / "world")  # a folder of one's own goes first
  assert checkpoints.locate("world") == pathlib.Path("world")
