"""convert --from=huggingface-parts: what the libraries wrote becomes the starting point of stage 1."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

REASON = "PyTorch is not installed: JFLOW_PARITY=1 bash launch/test.sh installs it"
torch = pytest.importorskip("torch", reason=REASON)
pytest.importorskip("diffusers", reason=REASON)

import torch_models

from jflow.__main__ import main
from jflow.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from jflow.interop.checkpoints import read_checkpoint
from jflow.interop.safetensors_io import Checkpoint
from jflow.interop.transfer import flatten

BOS, EOS = SPECIAL_TOKENS["bos"], SPECIAL_TOKENS["eos"]


def write_tokenizer(directory: pathlib.Path, names: tuple[str, ...] = (BOS, EOS)) -> None:
  """A byte tokenizer without image tokens: 95 ids."""
  tokenizer = tokenizers.Tokenizer(models.WordLevel({chr(32 + i): i for i in range(93)}, unk_token=" "))
  tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
  tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in names])
  tokenizer.save(str(directory / "tokenizer.json"))
  config = {"bos_token": BOS, "eos_token": EOS}
  (directory / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, pathlib.Path]:
  root = tmp_path_factory.mktemp("parts")
  found = {name: root / name for name in ("llm", "siglip", "vae")}
  torch_models.llama(found["llm"], 0)
  torch_models.siglip(found["siglip"], 0)
  torch_models.vae(found["vae"], 0, channels=(4, 4, 8, 8))
  write_tokenizer(found["llm"])
  return found


def flags(directories: dict[str, pathlib.Path]) -> list[str]:
  return [f"--{name}={path}" for name, path in directories.items()]


def test_parts_become_a_whole_model(directories, tmp_path):
  out = tmp_path / "start"
  argv = ["convert", "--from=huggingface-parts", *flags(directories), f"--output={out}"]
  assert main(argv) == 0
  found = read_checkpoint(out)
  params = flatten(found.params)
  assert found.template == "plain" and found.has_vae
  assert found.config.understanding_encoder.gelu == "tanh"
  llm = Checkpoint(directories["llm"], ("model",))
  # 95 ids + 5 special ones are more than the 97 rows: the table grows to 128, by the mean of the old rows.
  table = llm.read("model.embed_tokens.weight")
  assert params["language_model/embed"].shape == (128, 48)
  np.testing.assert_array_equal(params["language_model/embed"][:97], table)
  mean = np.broadcast_to(table.mean(0), (31, 48))
  np.testing.assert_allclose(params["language_model/embed"][97:], mean, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(params["language_model/head/kernel"][:, :97], llm.read("lm_head.weight").T)
  siglip = Checkpoint(directories["siglip"], ("model",))
  np.testing.assert_array_equal(params["understanding_encoder/head/latent"], siglip.read("head.probe").reshape(-1))
  tokenizer = Tokenizer.load(str(out / "tokenizer"))
  assert len({getattr(tokenizer, name) for name in SPECIAL_TOKENS}) == 7
  assert tokenizer.vocabulary_size == 100
  fresh = params["generation_decoder/blocks_1/expand/kernel"]
  assert fresh.shape == (1536, 6144) and 0.9 < fresh.std() * np.sqrt(1536) < 1.1
  np.testing.assert_array_equal(params["understanding_start"], 0)


def test_the_result_exports_to_the_published_layout_and_reads_back(directories, tmp_path):
  argv = ["convert", "--from=huggingface-parts", "--to=official", *flags(directories)]
  assert main([*argv, f"--output={tmp_path / 'official'}"]) == 0
  assert main([*argv, "--to=jflow", f"--output={tmp_path / 'jflow'}"]) == 0
  theirs, ours = read_checkpoint(tmp_path / "official"), read_checkpoint(tmp_path / "jflow")
  assert theirs.config == ours.config and theirs.has_vae
  a, b = flatten(theirs.params), flatten(ours.params)
  assert a.keys() == b.keys()
  for path, x in a.items():  # the same seed gives the same fresh parts
    np.testing.assert_array_equal(x, b[path], err_msg=path)


def test_wrong_parts_are_refused(directories, tmp_path, capsys):
  for name, other, message in (
    ("llm", "siglip", "model_type='siglip_vision_model' is not supported, only 'llama'"),
    ("siglip", "llm", "model_type='llama' is not supported, only 'siglip'"),
    ("vae", "llm", "block_out_channels"),
    ("vae", "nowhere", "config.json not found"),
  ):
    capsys.readouterr()
    changed = directories | {name: directories.get(other, tmp_path / other)}
    argv = ["convert", "--from=huggingface-parts", *flags(changed), f"--output={tmp_path / 'out'}"]
    assert main(argv) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jflow: ")]
    assert len(error) == 1 and message in error[0], error
    assert not list(tmp_path.glob("out*"))


def test_a_tokenizer_without_bos_is_refused(directories, tmp_path, capsys):
  llm = tmp_path / "llm"
  shutil.copytree(directories["llm"], llm)
  write_tokenizer(llm, (EOS,))
  argv = [
    "convert",
    "--from=huggingface-parts",
    *flags(directories | {"llm": llm}),
    f"--output={tmp_path / 'o'}",
  ]
  assert main(argv) == 2
  assert "bos_token='<｜begin▁of▁sentence｜>'" in capsys.readouterr().err
