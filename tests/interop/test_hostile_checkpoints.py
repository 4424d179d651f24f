"""Checkpoints from elsewhere: each one that lies is refused in one line, before anything is built or read."""

import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys

import numpy as np
import official_checkpoint
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import jflow
from jflow.__main__ import main
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.interop import checkpoints, vae
from jflow.interop import native as own
from jflow.models.autoencoders.kl import AutoencoderKLConfig
from jflow.models.weights import autoencoder_kl

HEAD, EMBED = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}  # a tensor of a header
DEEP = b"[" * 10_000 + b"]" * 10_000


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> pathlib.Path:
  return official_checkpoint.write(tmp_path_factory.mktemp("published") / "model", tokenizer=True)


@pytest.fixture(scope="module")
def jflows(tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp("jflows") / "model"
  config = {"model": tiny.CONFIG.to_dict(), "data": {"template": "plain"}}
  own.save_params(path, tiny.params(), config, Tokenizer.load(str(tiny.TOKENIZER)))
  return path


@pytest.fixture
def unread(monkeypatch):
  """No byte of a weight may be read: what is refused is refused by names, headers and metadata."""

  def read(*args, **kwargs):
    raise AssertionError("weights were read")

  monkeypatch.setattr("jflow.interop.safetensors_io.Checkpoint.read", read)
  monkeypatch.setattr("jflow.interop.native.load_params", read)


def _copy(source: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(source, tmp_path / "copy"))


def _refused(path: pathlib.Path, *parts: str) -> str:
  with pytest.raises(UserError) as caught:
    jflow.load(path)
  said = str(caught.value)
  assert all(part in said for part in parts), said
  assert "\n" not in said and len(said) < 1500
  return said


def _set(path: pathlib.Path, field: str, value) -> None:
  values = json.loads(path.read_text())
  *parents, last = field.split("/")
  place = values
  for parent in parents:
    place = place[parent]
  if value is ...:
    del place[last]
  else:
    place[last] = value
  path.write_text(json.dumps(values))


# --- config.json -------------------------------------------------------------------------------------------

_LANGUAGE, _UND = "language_config", "vision_und_enc_config/params"


@pytest.mark.parametrize(
  "field, value",
  [
    (f"{_LANGUAGE}/num_hidden_layers", 10**9),
    (f"{_LANGUAGE}/num_hidden_layers", 4),
    (f"{_LANGUAGE}/vocab_size", 2048),
    (f"{_LANGUAGE}/hidden_size", ...),
    (f"{_LANGUAGE}/vocab_size", ...),
    (f"{_LANGUAGE}/intermediate_size", 10**8),
    (f"{_LANGUAGE}/num_attention_heads", 8),
    (f"{_UND}/image_size", 128),
    (f"{_UND}/layers", 100),
    (f"{_UND}/width", 64),
    ("vision_gen_enc_config/params/layers_in_middle", 64),
    ("vision_gen_dec_config/params/layers_in_middle", 10**9),
  ],
)
def test_sizes_of_a_published_config_are_those_of_the_headers(published, tmp_path, unread, field, value):
  copy = _copy(published, tmp_path)
  _set(copy / "config.json", field, value)
  if field.endswith("num_attention_heads"):
    _set(copy / "config.json", f"{_LANGUAGE}/head_dim", 16)
    _set(copy / "config.json", f"{_LANGUAGE}/num_key_value_heads", 8)
  _refused(copy, "config.json", field.split("/")[-1])


@pytest.mark.parametrize(
  "field, value",
  [
    ("model/language_model/vocab_size", 2**62),
    ("model/language_model/vocab_size", 10**400),
    ("model/language_model/num_layers", 10**9),
    ("model/language_model/num_layers", 5),
    ("model/language_model/num_heads", 0),
    ("model/language_model/rope_theta", float("nan")),
    ("model/language_model/rope_theta", 10**30),
    ("model/language_model/max_length", True),
    ("model/understanding_encoder/image_size", 3 * 2**20),
    ("model/understanding_encoder/image_size", 1024),
    ("model/generation/encoder_blocks", 10**5),
    ("model/generation/decoder_blocks", 100),
    ("model/autoencoder/window", 4000),
    ("model/objectives/alignment/hidden_dim", 2**40),
    ("model/objectives/alignment/hidden_dim", 17),
    ("model/language_model/layers", 2),  # an old name beside the new one
    ("model/generation/width", 8),
    ("model/alignment_width", 8),
    ("model/autoencoder", None),
    (
      "model/autoencoder",
      tiny.DICT["autoencoder"]
      | dict(kind="autoencoder_kl", block_channels=[32, 32], layers_per_block=10**6, norm_groups=32),
    ),
    (
      "model/autoencoder",
      tiny.DICT["autoencoder"]
      | dict(kind="autoencoder_kl", block_channels=[32] * 10**5, layers_per_block=1, norm_groups=32),
    ),
    ("model", None),
    ("model", []),
    ("data/template", "poem"),
    ("data", 3),
    ("has_vae", "no"),
  ],
  ids=lambda x: str(x)[:40],
)
def test_sizes_of_jflows_own_config_are_those_of_the_step(jflows, tmp_path, unread, field, value):
  copy = _copy(jflows, tmp_path)
  _set(copy / "config.json", field, value)
  last = field.split("/")[-1]
  named = ("layers", "width", "autoencoder", "vocab_size", "num_heads")
  _refused(copy, "config.json", *[last] * (last in named))


@pytest.mark.parametrize(
  "content, part",
  [
    (b"", "config.json"),
    (DEEP, "deep"),
    (b'{"language_config": ' + DEEP + b"}", "deep"),
    (b'{"a": 1, "a": 2}', "'a' occurs twice"),
    (b'{"a": NaN}', "a is NaN"),
    (b'{"a": 1e999}', "a is 1e999"),
    (b'{"a": ' + b"9" * 4300 + b"}", "a is a whole number of 4300 digits"),
    (b'{"a": "\xff"}', "UTF-8"),
    (b'\xef\xbb\xbf{"a": 1}', "byte order mark"),
    ('{"a": 1}'.encode("utf-16"), "UTF-8"),
    (b"[1]", "object"),
    (None, "must be a file"),
  ],
  ids=lambda x: str(x)[:20],
)
@pytest.mark.parametrize("layout", ["published", "jflows"])
def test_a_config_that_is_no_json_is_one_line(request, tmp_path, unread, layout, content, part):
  path = _copy(request.getfixturevalue(layout), tmp_path) / "config.json"
  path.unlink()
  if content is None:
    path.mkdir()
  else:
    path.write_bytes(content)
  _refused(path.parent, "config.json", part)


def test_a_config_of_a_gigabyte_is_not_read(published, tmp_path, unread):
  copy = _copy(published, tmp_path)
  with open(copy / "config.json", "r+b") as file:
    file.truncate(2**30)
  _refused(copy, "config.json", "1,073,741,824 bytes")


# --- an index and its shards -------------------------------------------------------------------------------


def _sharded(tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  directory = official_checkpoint.write(tmp_path / "shards", shards=2, tokenizer=True)
  return directory, directory / "model.safetensors.index.json"


@pytest.mark.parametrize("total", [1, 10**15, -1, "4", True, 1.5])
def test_an_index_of_another_size_is_refused(tmp_path, unread, total):
  directory, index = _sharded(tmp_path)
  _set(index, "metadata/total_size", total)
  _refused(directory, "total_size")


def test_an_index_may_leave_its_size_out(tmp_path):
  directory, index = _sharded(tmp_path)
  _set(index, "metadata", ...)
  checkpoints.describe(directory)


@pytest.mark.parametrize(
  "shard", [None, 3, ["model.safetensors"], "a\0.safetensors", "\ud800.safetensors", "x\ny.safetensors"]
)
def test_an_index_that_names_no_file_is_refused(tmp_path, unread, shard):
  directory, index = _sharded(tmp_path)
  _set(index, "weight_map/beg_of_und_embed", shard)
  _refused(directory, "beg_of_und_embed", "shard")


def test_an_index_that_lists_a_tensor_twice_is_refused(tmp_path, unread):
  directory, index = _sharded(tmp_path)
  text = index.read_text()
  index.write_text(
    text.replace('"weight_map": {', '"weight_map": {"beg_of_und_embed": "model-00002-of-00002.safetensors", ')
  )
  _refused(directory, "index.json", "beg_of_und_embed", "twice")


def test_beside_a_whole_file_the_index_is_stale(tmp_path, capsys):
  """The file is read, as by transformers, and that is said; two models in one directory are refused."""
  directory, index = _sharded(tmp_path)
  shards = sorted(directory.glob("model-*.safetensors"))
  whole = {name: x for path in shards for name, x in load_file(path).items()}
  whole["beg_of_und_embed"] = whole["beg_of_und_embed"] + 1
  save_file(whole, directory / "model.safetensors")
  read = checkpoints.read_checkpoint(directory).params["understanding_start"]
  np.testing.assert_array_equal(read, whole["beg_of_und_embed"][0])
  assert "model.safetensors is read, and not the shards of model.safetensors.index.json" in capsys.readouterr().err
  for path in shards:
    path.unlink()
  checkpoints.describe(directory)
  _set(index, "weight_map/another.weight", shards[0].name)
  _refused(directory, "model.safetensors", "another.weight")
  _set(index, "weight_map/another.weight", ...)
  _set(index, "weight_map/beg_of_und_embed", ...)
  _refused(directory, "model.safetensors", "beg_of_und_embed")
  index.write_text("{")
  _refused(directory, "index.json")


# --- headers -----------------------------------------------------------------------------------------------


def _rewrite_header(path: pathlib.Path, change) -> None:
  data = path.read_bytes()
  (length,) = struct.unpack("<Q", data[:8])
  header = json.loads(data[8 : 8 + length])
  change(header)
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
  "change, part",
  [
    (lambda h: h[EMBED].update(shape=[10**18, 64]), "shape"),
    (lambda h: h[EMBED].update(shape=[1024, 10**9]), EMBED),
    (lambda h: h[EMBED].update(data_offsets=[4, 8]), EMBED),
    (lambda h: h[EMBED].update(dtype="F8_E8M0"), "F8_E8M0"),
    (lambda h: h[EMBED].update(dtype=["F32"]), "type"),
    (lambda h: h[EMBED].update(dtype="I32"), "I32"),
    (lambda h: h.update({"a\nb": EMPTY}), "named"),
    (lambda h: h.update({"x" * 5000: EMPTY}), "named"),
    (lambda h: h.update({f"empty.{i}": EMPTY for i in range(5000)}), "empty.0"),
    (lambda h: h.update({"language_model.model.layers.0.self_attn.q_norm.weight": EMPTY}), "q_norm"),
  ],
)
def test_a_header_that_lies_is_refused(published, tmp_path, unread, change, part):
  copy = _copy(published, tmp_path)
  _rewrite_header(copy / "model.safetensors", change)
  _refused(copy, "model.safetensors" if part not in ("q_norm", "empty.0") else str(copy), part)


def test_more_weights_than_memory_are_refused_unread(published, tmp_path, unread, monkeypatch):
  """A sparse file whose header and config.json agree on gibibytes."""
  copy = _copy(published, tmp_path)
  rows = 2**23
  _set(copy / "config.json", f"{_LANGUAGE}/vocab_size", rows)
  path = copy / "model.safetensors"
  values = load_file(path)
  shapes = {name: list(x.shape) for name, x in values.items()} | {EMBED: [rows, 64], HEAD: [rows, 64]}
  header, at = {}, 0
  for name, shape in shapes.items():
    size = 4 * int(np.prod(shape))
    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
    at += size
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text)
  os.truncate(path, 8 + len(text) + at)
  monkeypatch.setattr("jflow.memory.limit", lambda: 2**31)
  _refused(copy, "bytes of memory", "2,147,483,648")


# --- a step of jflow's own ---------------------------------------------------------------------------------


def _reseal(step: pathlib.Path) -> None:
  (step / own.MANIFEST).unlink(missing_ok=True)
  own.seal(step, {"step": int(step.name)})


def test_a_step_without_readable_metadata_is_refused(jflows, tmp_path, unread):
  for name, content in (
    ("ema/_METADATA", b"{"),
    ("ema/_METADATA", DEEP),
    ("ema/manifest.ocdbt", b"x"),
    ("ema/_METADATA", b"{}"),
  ):
    copy = _copy(jflows, tmp_path)
    (copy / "checkpoints" / "0" / name).write_bytes(content)
    _reseal(copy / "checkpoints" / "0")
    _refused(copy, "checkpoints/0", "metadata")
    shutil.rmtree(copy)


def test_a_step_of_another_model_or_with_more_is_refused(tmp_path, unread):
  params = tiny.params()
  for change, part in (
    ({"vae": {"encoder": params["vae"]["encoder"]}}, "lacks vae/decoder/"),
    ({"extra": {"kernel": np.zeros(3, np.float32)}}, "holds extra/kernel"),
    ({"understanding_start": np.zeros(32, np.int32)}, "int32"),
    ({"understanding_start": np.zeros(31, np.float32)}, "(31,)"),
  ):
    config = {"model": tiny.CONFIG.to_dict(), "data": {"template": "plain"}}
    own.save_params(tmp_path / "m", {**params, **change}, config, Tokenizer.load(str(tiny.TOKENIZER)))
    _refused(tmp_path / "m", part)
    shutil.rmtree(tmp_path / "m")


def test_a_wrong_tokenizer_is_told_before_the_bytes_of_a_step(jflows, tmp_path, monkeypatch):
  monkeypatch.setattr(own, "damage", lambda *args: pytest.fail("the step was hashed"))
  for name, content in (("tokenizer/tokenizer.json", b"{"), ("config.json", b"{}")):
    copy = _copy(jflows, tmp_path)
    (copy / name).write_bytes(content)
    _refused(copy, name.rsplit("/")[-1])
    shutil.rmtree(copy)


# --- a tied head -------------------------------------------------------------------------------------------


def _head(directory: pathlib.Path, tied: bool, head: str, prefix: str) -> None:
  """Makes the head absent, the embedding, or another; config.json says whether it is tied."""
  path = directory / "model.safetensors"
  values = load_file(path)
  embed = values[f"{prefix}model.embed_tokens.weight"]
  values[f"{prefix}lm_head.weight"] = embed.copy() if head == "equal" else embed + 1
  if head == "absent":
    del values[f"{prefix}lm_head.weight"]
  save_file(values, path)
  _set(directory / "config.json", f"{_LANGUAGE}/tie_word_embeddings" if prefix else "tie_word_embeddings", tied)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, pathlib.Path]:
  """An LLM, a SigLIP and a VAE as their libraries write them, cut out of the small published checkpoint."""
  root = tmp_path_factory.mktemp("parts")
  rng = np.random.default_rng(0)
  values = official_checkpoint.tensors(1024)
  llm = {name.removeprefix("language_model."): x for name, x in values.items() if name.startswith("language_model.")}
  config = json.loads((official_checkpoint.TINY / "config.json").read_text())
  vision = dict(
    model_type="siglip_vision_model",
    image_size=64,
    patch_size=16,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
  )
  from jflow.interop import transformers_config
  from jflow.interop.fields import Fields
  from jflow.models import weights as names

  siglip = transformers_config.siglip_config(Fields(vision, ""))
  codec = AutoencoderKLConfig("autoencoder_kl", 4, 0.13025, (4, 4, 8, 8), 1, 4)
  draw = lambda entries: {e.name: rng.standard_normal(e.shape).astype(np.float32) for e in entries}
  for name, tensors, settings, stem in (
    ("llm", llm, config["language_config"] | {"vocab_size": 1024}, "model"),
    ("siglip", draw(names.siglip_transformers(siglip, "vision_model.", False)), vision, "model"),
    ("vae", draw(autoencoder_kl(codec)), vae.write_config(codec, 64), "diffusion_pytorch_model"),
  ):
    (root / name).mkdir()
    save_file(tensors, root / name / f"{stem}.safetensors")
    (root / name / "config.json").write_text(json.dumps(settings))
  for file in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copyfile(official_checkpoint.PROCESSOR / file, root / "llm" / file)
  return {name: root / name for name in ("llm", "siglip", "vae")}


@pytest.mark.parametrize(
  "layout, tied, head, message",
  [
    ("official", True, "absent", None),
    ("official", True, "equal", None),
    ("official", True, "other", "tie_word_embeddings"),
    ("official", False, "other", None),
    ("official", False, "absent", "tie_word_embeddings"),
    ("huggingface-parts", True, "other", "tie_word_embeddings"),  # tests/parity joins parts that fit
    ("huggingface-parts", False, "absent", "tie_word_embeddings"),
  ],
)
def test_a_tied_head_is_the_embedding_or_refused(published, parts, tmp_path, capsys, layout, tied, head, message):
  source = _copy(published if layout == "official" else parts["llm"], tmp_path)
  _head(source, tied, head, "language_model." if layout == "official" else "")
  argv = (
    [f"--input={source}"]
    if layout == "official"
    else [f"--llm={source}", *(f"--{x}={parts[x]}" for x in ("siglip", "vae"))]
  )
  out = tmp_path / "out"
  code = main(["convert", f"--from={layout}", "--to=official", *argv, f"--output={out}"])
  if message:
    assert code == 2 and message in capsys.readouterr().err and not out.exists()
    return
  assert code == 0
  written = load_file(out / "model.safetensors")
  assert np.array_equal(written[HEAD], written[EMBED]) == (head != "other")


# --- commands ----------------------------------------------------------------------------------------------


def test_convert_says_what_is_cheap_first(published, tmp_path, capsys, unread):
  (tmp_path / "file").write_text("")
  at = f"--input={published}"
  for argv, part in (
    ([at, f"--output={tmp_path / 'file' / 'out'}"], "--output"),
    (["--from=official", at, f"--output={tmp_path / 'out'}", "--llm=nowhere"], "--llm"),
    (
      ["--from=huggingface-parts", at, f"--output={tmp_path / 'out'}", "--llm=a", "--siglip=b", "--vae=c"],
      "--input",
    ),
    ([at, f"--output={tmp_path / 'out'}", "--seed=-1"], "seed"),
    ([at, f"--output={tmp_path / 'out'}", "--shard_bytes=0"], "--shard_bytes"),
  ):
    capsys.readouterr()
    assert main(["convert", *argv]) == 2, argv
    assert part in capsys.readouterr().err
  assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_the_command_line_has_no_traceback(published, tmp_path):
  copy = _copy(published, tmp_path)
  _set(copy / "config.json", f"{_LANGUAGE}/num_hidden_layers", 10**9)
  argv = [sys.executable, "-m", "jflow", "convert", f"--input={copy}", f"--output={tmp_path / 'out'}"]
  done = subprocess.run(argv, capture_output=True, text=True, cwd=tiny.ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"})
  assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "num_hidden_layers" in done.stderr
