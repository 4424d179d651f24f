"""Weights both ways: bitwise round trips, the table against the model, and every kind of damaged input."""

import dataclasses
import json
import pathlib
import pickle
import random
import struct

import changes
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import official_checkpoint
import pytest
from refusals import refused
from safetensors.numpy import load_file, save_file

from jflow.__main__ import main
from jflow.errors import UserError
from jflow.generation.flow import weights as flow_weights
from jflow.interop import janusflow, published, transfer, vae
from jflow.interop.checkpoints import read_checkpoint
from jflow.interop.safetensors_io import Checkpoint, read_header
from jflow.models import weights as names
from jflow.models.autoencoders.kl import AutoencoderKLConfig
from jflow.models.config import ModelConfig
from jflow.models.unified import UnifiedModel
from jflow.sharding import unbox

ROOT = pathlib.Path(__file__).parents[2]
VAE = AutoencoderKLConfig("autoencoder_kl", 4, 0.13025, (4, 4, 8, 8), 1, 4)


def _all_tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
  out = {}
  for path in sorted(directory.glob("*.safetensors")):
    out |= load_file(path)
  return out


def _bitwise_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
  assert a.keys() == b.keys()
  for name, x in a.items():
    assert (x.shape, x.dtype) == (b[name].shape, b[name].dtype), name
    assert x.tobytes() == b[name].tobytes(), name


def _read_vae(directory):
  config, weights = vae.describe(directory)
  return config, weights.read(None)


def _write_vae(directory: pathlib.Path, dtype: type = np.float32, old: bool = False) -> pathlib.Path:
  directory.mkdir(parents=True)
  rng = np.random.default_rng(7)
  shapes = {entry.name: entry.shape for entry in names.autoencoder_kl(VAE, old)}
  values = {name: (0.2 * rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}
  save_file(values, directory / "diffusion_pytorch_model.safetensors")
  config = vae.write_config(VAE, 64)
  (directory / "config.json").write_text(json.dumps(config))
  return directory


# --- the table -------------------------------------------------------------------------------------------


def _model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  from jflow.models.build import initial_params

  model = UnifiedModel(config, jnp.float32, "none", 1, "xla")
  tree = unbox(jax.eval_shape(lambda: initial_params(model, 0)))
  return {path: x.shape for path, x in transfer.flatten(tree).items()}


def _table_shapes(entries: list[names.Entry]) -> dict[str, tuple[int, ...]]:
  out: dict[str, tuple[int, ...]] = {}
  for entry in entries:
    shape = names.jflow_shape(entry.kind, entry.part_shape)
    if entry.layer is not None:
      shape = (max(out.get(entry.path, (0,))[0], entry.layer + 1), *shape)
    out[entry.path] = shape
  return out


def _full_config() -> ModelConfig:
  from configs import models

  return ModelConfig.from_dict(models.janusflow_384() | {"objectives": {}})


@pytest.mark.parametrize("size", ["tiny", "384"])
def test_the_table_names_every_parameter_of_the_model_with_its_shape(size):
  if size == "tiny":
    values = json.loads((official_checkpoint.TINY / "config.json").read_text())
    config = janusflow.config_from_official(values, "config.json", None)
  else:
    config = _full_config()
  table = _table_shapes(flow_weights.official(config) + names.autoencoder_kl(config.autoencoder))
  assert table == _model_shapes(config)


def test_the_table_is_the_published_manifest():
  values = json.loads((official_checkpoint.TINY / "config.json").read_text())
  config = janusflow.config_from_official(values, "config.json", None)
  manifest = json.loads((official_checkpoint.TINY / "manifest.json").read_text())
  assert {entry.name: list(entry.shape) for entry in flow_weights.official(config)} == manifest


def test_the_full_table_has_the_published_number_of_parameters():
  shapes = {entry.name: entry.shape for entry in flow_weights.official(_full_config())}
  assert sum(int(np.prod(shape)) for shape in shapes.values()) == 2_046_367_504


@pytest.mark.parametrize(
  "kind, shape",
  [
    (names.SAME, (5, 3)),
    (names.VECTOR, (1, 1, 1, 6)),
    (names.TABLE, (1, 4, 6)),
    (names.LINEAR, (5, 3)),
    (names.CONV, (5, 3, 2, 4)),
    (names.PATCH, (5, 3, 2, 4)),
    (names.DEPTHWISE, (5, 1, 7, 7)),
  ],
)
def test_each_layout_is_undone_exactly(kind, shape):
  x = np.arange(np.prod(shape)).reshape(shape)
  there = names.to_jflow(kind, x)
  assert there.shape == names.jflow_shape(kind, shape)
  np.testing.assert_array_equal(names.to_pytorch(kind, there, shape), x)


# --- round trips -----------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_official_to_jflow_and_back_is_bitwise(tmp_path, dtype):
  source = official_checkpoint.write(tmp_path / "official", dtype, shards=3, tokenizer=True)
  for name in ("preprocessor_config.json", "processor_config.json", "special_tokens_map.json"):
    (source / name).write_text(json.dumps({"made_up": name}))
  _write_vae(source / "vae", dtype)
  assert main(["convert", "--from=official", f"--input={source}", f"--output={tmp_path / 'jflow'}"]) == 0
  back = tmp_path / "back"
  assert main(["convert", "--to=official", f"--input={tmp_path / 'jflow'}", f"--output={back}"]) == 0
  _bitwise_equal(_all_tensors(source), _all_tensors(back))
  _bitwise_equal(_all_tensors(source / "vae"), _all_tensors(back / "vae"))
  for path in source.iterdir():
    if path.suffix == ".json" and path.name not in ("config.json", "model.safetensors.index.json"):
      assert (back / path.name).read_bytes() == path.read_bytes(), path.name
  theirs, ours = (published.load(d).config for d in (source, back))
  assert theirs == ours and theirs.autoencoder == VAE


def test_the_unused_pooling_head_survives_and_a_trained_start_vector_is_exported(tmp_path):
  source = official_checkpoint.write(tmp_path / "official")
  loaded = published.load(source)
  params = loaded.params
  assert {p for p in params if p.startswith("understanding_encoder/head/")}
  assert params["understanding_start"].shape == (64,)
  params["understanding_start"] = params["understanding_start"] + 1
  published.save(janusflow.LAYOUT, tmp_path / "out", loaded, None, None, 2**30)
  before, after = _all_tensors(source), _all_tensors(tmp_path / "out")
  changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
  assert changed == {"beg_of_und_embed"}


def test_an_export_without_the_original_files_describes_itself(tmp_path):
  """A trained checkpoint has no processor's files: the export writes them, and reads back the same."""
  source = official_checkpoint.write(tmp_path / "official", tokenizer=True)
  loaded = published.load(source)
  heads = {"alignment_head/linear_1/kernel": np.zeros((64, 8), np.float32)}
  trained = loaded._replace(params=loaded.params | heads)
  assert published.left_out(janusflow.LAYOUT, trained) == ["alignment_head"]
  published.save(janusflow.LAYOUT, tmp_path / "out", trained, None, None, 2**30)
  files = {path.name for path in (tmp_path / "out").iterdir()}
  assert files == {
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
  }
  again = published.load(tmp_path / "out")
  assert again.config == loaded.config
  _bitwise_equal(again.params, loaded.params)
  processor = json.loads((tmp_path / "out" / "processor_config.json").read_text())
  assert processor["num_image_tokens"] == 16 and processor["image_tag"] == "<image_placeholder>"


def test_other_types_and_shards(tmp_path):
  source = official_checkpoint.write(tmp_path / "official")
  argv = [f"--input={source}", "--to=official", "--dtype=bfloat16", "--shard_bytes=200000"]
  assert main(["convert", *argv, f"--output={tmp_path / 'out'}"]) == 0
  assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
  expected = {name: x.astype(ml_dtypes.bfloat16) for name, x in official_checkpoint.tensors().items()}
  _bitwise_equal(expected, _all_tensors(tmp_path / "out"))
  Checkpoint(tmp_path / "out", ("model",))  # the index fits the shards


def test_float16_becomes_float32_exactly_and_old_attention_names_are_known(tmp_path):
  config, new = _read_vae(_write_vae(tmp_path / "new", np.float16))
  assert config == VAE and {x.dtype for x in new.values()} == {np.dtype(np.float32)}
  _, old = _read_vae(_write_vae(tmp_path / "old", np.float16, old=True))
  assert new.keys() == old.keys()
  _bitwise_equal(new, old)


def test_read_checkpoint_takes_either_layout(tmp_path):
  source = official_checkpoint.write(tmp_path / "official", tokenizer=True)
  assert main(["convert", f"--input={source}", f"--output={tmp_path / 'jflow'}"]) == 0
  theirs, ours = read_checkpoint(source), read_checkpoint(tmp_path / "jflow")
  assert (theirs.config, theirs.template, theirs.has_vae) == (ours.config, ours.template, ours.has_vae)
  assert theirs.has_vae is False and ours.template == "chat"
  _bitwise_equal(transfer.flatten(theirs.params), transfer.flatten(ours.params))
  given = read_checkpoint(source, vae=_write_vae(tmp_path / "vae"))
  assert given.has_vae and "vae" in given.params and given.config.autoencoder == VAE


def test_a_converted_checkpoint_without_a_vae_takes_one_to_paint_with(tmp_path, capsys):
  source = official_checkpoint.write(tmp_path / "official", tokenizer=True)
  vae, run = _write_vae(tmp_path / "vae"), tmp_path / "jflow"
  assert main(["convert", f"--input={source}", f"--output={run}"]) == 0
  paint = ["generate", f"--checkpoint={run}", "--prompt=a star", "--steps=1", f"--output={tmp_path / 'out'}"]
  capsys.readouterr()
  for command in (
    [*paint, f"--vae={vae}"],
    ["convert", f"--input={run}", f"--vae={vae}", f"--output={tmp_path / 'b'}"],
  ):
    assert main(command) == 2
    assert "vae must hold the VAE that" in capsys.readouterr().err
  fields = json.loads((run / "config.json").read_text())
  fields["model"]["autoencoder"] = dataclasses.asdict(VAE)  # as if it had been converted beside SDXL's
  (run / "config.json").write_text(json.dumps(fields))
  assert main(paint) == 2 and "this checkpoint has no VAE" in capsys.readouterr().err
  assert main([*paint, f"--vae={vae}"]) == 0 and (tmp_path / "out" / "0000_00.png").is_file()
  found = read_checkpoint(run, vae=vae)
  assert found.has_vae
  _bitwise_equal(transfer.flatten(found.params["vae"], "vae/"), _read_vae(vae)[1])
  assert main(["convert", f"--input={run}", f"--vae={vae}", f"--output={tmp_path / 'back'}"]) == 0
  _bitwise_equal(_all_tensors(tmp_path / "back" / "vae"), _all_tensors(vae))


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
# --- config.json -----------------------------------------------------------------------------------------


def _tiny_config() -> dict:
  return json.loads((official_checkpoint.TINY / "config.json").read_text())


def test_config_fields_that_the_layout_allows():
  values = _tiny_config()
  language = values["language_config"]
  language |= {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}
  del language["rope_theta"]
  language["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
  config = janusflow.config_from_official(values, "config.json", None)
  lm = config.language_model
  assert (lm.num_kv_heads, lm.rms_norm_epsilon, lm.rope_theta, lm.head_dim) == (2, 1e-5, 5e5, 16)
  del language["rope_parameters"], language["num_key_value_heads"], language["rms_norm_eps"]
  lm = janusflow.config_from_official(values, "config.json", None).language_model
  assert (lm.num_kv_heads, lm.rms_norm_epsilon, lm.rope_theta) == (4, 1e-6, 10_000.0)


@pytest.mark.parametrize("image, patch, factor", [(96, 16, 8), (64, 8, 4), (56, 14, 7), (32, 2, 1)])
def test_any_patch_count_is_read_without_a_vae(image, patch, factor):
  values = _tiny_config()
  values["vision_und_enc_config"]["params"] |= {"image_size": image, "patch_size": patch}
  config = janusflow.config_from_official(values, "config.json", None)
  assert config.autoencoder.factor == factor and config.patches == (image // patch) ** 2


@pytest.mark.parametrize("width, mlp_width", [(112, 976), (1152, 4304), (48, 96)])
def test_the_mlp_width_survives_the_ratio_that_the_layout_keeps(width, mlp_width):
  config = _full_config()
  vision = dataclasses.replace(config.understanding_encoder, embed_dim=width, mlp_dim=mlp_width)
  values = janusflow.config_to_official(dataclasses.replace(config, understanding_encoder=vision), "float32")
  assert janusflow.config_from_official(values, "config.json", None).understanding_encoder == vision


def test_config_of_the_release_names_a_preset():
  config = _full_config()
  values = janusflow.config_to_official(config, "bfloat16")
  params = values["vision_und_enc_config"]["params"]
  assert params == {
    "image_size": 384,
    "model_name": "siglip_large_patch16_384",
    "select_feature": "same",
    "select_layer": -1,
  }
  assert janusflow.config_from_official(values, "config.json", config.autoencoder) == config


_SIGLIP = ("vision_und_enc_config", "params")
_ENCODER = ("vision_gen_enc_config", "params")


@pytest.mark.parametrize(
  "change, message",
  [
    (changes.remove("language_config", "hidden_size"), "language_config has no field hidden_size"),
    (changes.remove("language_config", "vocab_size"), "language_config has no field vocab_size"),
    (changes.remove("vision_und_enc_config"), "has no field vision_und_enc_config"),
    (changes.remove(*_SIGLIP, "image_size"), "vision_und_enc_config: params has no field image_size"),
    (changes.remove(*_SIGLIP, "width"), "model_name='siglip_custom' is unknown"),
    (changes.remove(*_ENCODER, "stride"), "vision_gen_enc_config: params has no field stride"),
    (changes.put("64", "language_config", "hidden_size"), "hidden_size='64' should be a positive int"),
    (changes.put(0, "language_config", "num_hidden_layers"), "num_hidden_layers=0 should be a positive int"),
    (changes.put(True, "language_config", "num_hidden_layers"), "num_hidden_layers=True should be"),
    (
      changes.put({"type": "linear", "factor": 2.0}, "language_config", "rope_scaling"),
      "type='linear' is not supported",
    ),
    (changes.put("mistral", "language_config", "model_type"), "model_type='mistral' is not supported"),
    (changes.put(3, "language_config", "num_key_value_heads"), "kv_heads=3"),
    (changes.put(7, *_ENCODER, "kernel_size"), "kernel_size=7 is not supported, only 2"),
    (changes.put(False, *_ENCODER, "use_bias"), "use_bias=False is not supported"),
    (changes.put(32, *_ENCODER, "hidden_size"), "hidden_size=32 is not supported, only 64"),
    (changes.put([], "language_config"), "language_config should be a JSON object"),
    (changes.put({"AutoModel": "evil.Model"}, "auto_map"), "asks to run Python code"),
    (changes.put(True, "trust_remote_code"), "asks to run Python code"),
  ],
)
def test_a_wrong_config_is_one_clear_line(tmp_path, capsys, change, message):
  source = official_checkpoint.write(tmp_path / "official")
  values = _tiny_config()
  change(values)
  (source / "config.json").write_text(json.dumps(values))
  _refused(source, tmp_path, capsys, message)


# --- damaged input ---------------------------------------------------------------------------------------


def _refused(source: pathlib.Path, tmp_path: pathlib.Path, capsys, message: str, *flags: str) -> None:
  capsys.readouterr()
  argv = ["convert", "--from=official", f"--input={source}", f"--output={tmp_path / 'out'}", *flags]
  assert main(argv) == 2
  error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jflow: ")]
  assert len(error) == 1 and message in error[0], error
  assert not [p.name for p in tmp_path.iterdir() if p.name.startswith("out")]


@pytest.fixture
def source(tmp_path) -> pathlib.Path:
  return official_checkpoint.write(tmp_path / "official")


def _rewrite(source: pathlib.Path, change) -> None:
  values = official_checkpoint.tensors()
  change(values)
  save_file(values, source / "model.safetensors")


def test_a_missing_tensor_is_named(source, tmp_path, capsys):
  _rewrite(source, lambda t: t.pop("vision_gen_dec_aligner.bias"))
  _refused(source, tmp_path, capsys, "lacks tensor vision_gen_dec_aligner.bias [32]")


def test_a_published_checkpoint_has_no_raw_weights(source, tmp_path, capsys):
  _refused(source, tmp_path, capsys, "--weights=raw must be ema", "--weights=raw")
  with refused("weights='raw' must be 'ema'", source):
    read_checkpoint(source, weights="raw")


def test_an_unexpected_tensor_is_named(source, tmp_path, capsys):
  _rewrite(source, lambda t: t.update({"vision_gen_dec_model.extra": np.zeros(3, np.float32)}))
  _refused(source, tmp_path, capsys, "holds tensor vision_gen_dec_model.extra")


def test_a_transposed_tensor_is_named(source, tmp_path, capsys):
  name = "language_model.model.layers.1.mlp.up_proj.weight"
  _rewrite(source, lambda t: t.update({name: np.ascontiguousarray(t[name].T)}))
  _refused(source, tmp_path, capsys, f"tensor {name} has the shape [64, 160], the model asks for [160, 64]")


def test_a_tensor_of_integers_is_named(source, tmp_path, capsys):
  _rewrite(source, lambda t: t.update({"vision_gen_enc_aligner.bias": np.zeros(64, np.int64)}))
  _refused(source, tmp_path, capsys, "vision_gen_enc_aligner.bias has the type I64")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_values_that_are_not_finite_are_refused(tmp_path, capsys, value, dtype):
  source = official_checkpoint.write(tmp_path / "official")
  values = {name: x.astype(dtype) for name, x in official_checkpoint.tensors().items()}
  values["vision_gen_enc_aligner.weight"][3, 5] = value
  save_file(values, source / "model.safetensors")
  _refused(source, tmp_path, capsys, "tensor vision_gen_enc_aligner.weight holds values that are not finite")


def test_buffers_of_old_files_are_ignored(source, tmp_path):
  name = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
  _rewrite(source, lambda t: t.update({name: np.ones(8, np.float32)}))
  assert main(["convert", f"--input={source}", f"--output={tmp_path / 'out'}"]) == 0


def test_a_cut_or_longer_file_is_refused(source, tmp_path, capsys):
  path = source / "model.safetensors"
  whole = path.read_bytes()
  (header,) = struct.unpack("<Q", whole[:8])
  for length, message in (
    (0, "must be a safetensors file"),
    (5, "must be a safetensors file"),
    (8 + header // 2, "claims a header of"),
    (8 + header, "is cut"),
    (len(whole) - 1, "is cut"),
  ):
    path.write_bytes(whole[:length])
    _refused(source, tmp_path, capsys, message)
  path.write_bytes(whole + b"\0")
  _refused(source, tmp_path, capsys, "is too long")
  path.write_bytes(struct.pack("<Q", 200 * 2**20) + whole[8:])
  _refused(source, tmp_path, capsys, "claims a header of 209,715,200 bytes")
  path.write_bytes(struct.pack("<Q", 2**64 - 1) + whole[8:])
  _refused(source, tmp_path, capsys, "claims a header of")


def _with_header(path: pathlib.Path, header: bytes, payload: bytes = b"\0" * 8) -> None:
  path.write_bytes(struct.pack("<Q", len(header)) + header + payload)


@pytest.mark.parametrize(
  "header",
  [
    b"",
    b"[]",
    b"null",
    b"{",
    b"\xff\xfe{}",
    b'{"a": {}}',
    b'{"a": 3}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "more": 1}}',
    b'{"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [true, 2], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296, 4294967296], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [2], '
    b'"data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {"dtype": "F32", "shape": [2], '
    b'"data_offsets": [0, 8]}}',
    b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, ' + b"9" * 5000 + b"]}}",
  ],
)
def test_every_hostile_header_is_a_user_error(tmp_path, header):
  path = tmp_path / "model.safetensors"
  _with_header(path, header)
  with refused(path):
    read_header(path)


def test_mutated_files_never_raise_anything_else(tmp_path):
  """3,000 mutations of a small file: read as it was described, or refused with one line."""
  path = tmp_path / "model.safetensors"
  good = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(4, np.float16)}
  save_file(good, path, metadata={"format": "pt"})
  whole = path.read_bytes()
  rng = random.Random(0)
  refused = 0
  for _ in range(3_000):
    data = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
      choice, at = rng.random(), rng.randrange(len(data))
      if choice < 0.6:
        data[at] = rng.randrange(256)
      elif choice < 0.8:
        del data[at : at + rng.randint(1, 8)]
      else:
        data[at:at] = rng.randbytes(rng.randint(1, 8))
    path.write_bytes(data)
    try:
      checkpoint = Checkpoint(tmp_path, ("model",))
      for name, tensor in checkpoint.tensors.items():
        if tensor.dtype in ("F32", "F16", "BF16"):
          assert checkpoint.read(name).shape == tensor.shape
    except UserError as error:
      refused += 1
      assert "\n" not in str(error)
  assert refused > 1_800


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_a_pickle_is_refused_and_never_run(tmp_path, capsys, suffix):
  source = official_checkpoint.write(tmp_path / "official")
  (source / "model.safetensors").unlink()
  canary = tmp_path / "canary"

  class Evil:
    def __reduce__(self):
      return pathlib.Path.touch, (canary,)

  (source / f"pytorch_model{suffix}").write_bytes(pickle.dumps(Evil()))
  _refused(source, tmp_path, capsys, f"pytorch_model{suffix} is a pickle")
  assert not canary.exists()


def test_a_missing_shard_is_named(tmp_path, capsys):
  source = official_checkpoint.write(tmp_path / "official", shards=3)
  (source / "model-00002-of-00003.safetensors").unlink()
  _refused(source, tmp_path, capsys, "model-00002-of-00003.safetensors not found")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", ".."])
def test_an_index_cannot_name_files_elsewhere(tmp_path, capsys, shard):
  source = official_checkpoint.write(tmp_path / "official", shards=2)
  path = source / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  index["weight_map"]["beg_of_und_embed"] = shard
  path.write_text(json.dumps(index))
  _refused(source, tmp_path, capsys, "names the shard")


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path, capsys):
  source = official_checkpoint.write(tmp_path / "official", shards=2)
  path = source / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  moved = dict(index["weight_map"])
  moved["beg_of_und_embed"] = "model-00002-of-00002.safetensors"
  path.write_text(json.dumps({"weight_map": moved}))
  _refused(source, tmp_path, capsys, "tensor beg_of_und_embed is not in model-00002-of-00002.safetensors")
  removed = dict(index["weight_map"])
  del removed["beg_of_und_embed"]
  path.write_text(json.dumps({"weight_map": removed}))
  _refused(source, tmp_path, capsys, "does not list tensor beg_of_und_embed")
  path.write_text("[]")
  _refused(source, tmp_path, capsys, "must hold a JSON object")


def test_a_wrong_tokenizer_is_refused_before_the_weights_are_read(tmp_path, capsys):
  source = official_checkpoint.write(tmp_path / "official", tokenizer=True)
  path = source / "tokenizer.json"
  good = path.read_text()
  path.write_text(good[:1000])
  _refused(source, tmp_path, capsys, "not a readable tokenizer")
  path.write_text(good.replace("<image_placeholder>", "<picture>"))
  _refused(source, tmp_path, capsys, "has no <image_placeholder> token")
  path.write_text(good)
  values = json.loads((source / "config.json").read_text())
  values["language_config"]["vocab_size"] = 256
  (source / "config.json").write_text(json.dumps(values))
  _refused(source, tmp_path, capsys, "they belong to different models")


def test_a_vae_of_another_kind_is_refused(source, tmp_path, capsys):
  vae = _write_vae(tmp_path / "vae")
  values = json.loads((vae / "config.json").read_text())
  for change, message in (
    ({"latent_channels": 16}, "writes 4 latent channels, the VAE has 16"),
    ({"use_quant_conv": False}, "use_quant_conv=False is not supported"),
    ({"shift_factor": 0.1}, "shift_factor=0.1 is not supported"),
    ({"_class_name": "AutoencoderTiny"}, "_class_name='AutoencoderTiny' is not supported"),
    ({"block_out_channels": [8, 15]}, "should hold multiples of norm_num_groups"),
  ):
    (vae / "config.json").write_text(json.dumps(values | change))
    _refused(source, tmp_path, capsys, message, f"--vae={vae}")


def test_a_failure_while_writing_leaves_nothing(source, tmp_path, monkeypatch, capsys):
  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("jflow.interop.safetensors_io.os.fsync", full)
  argv = ["convert", f"--input={source}", "--to=official", f"--output={tmp_path / 'out'}"]
  assert main(argv) == 1
  assert "out cannot be written: No space left on device" in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ["official"]


def test_flags_that_contradict_each_other(source, tmp_path, capsys):
  (tmp_path / "there").mkdir()
  for argv, message in (
    (["--from=official", f"--input={source}", f"--output={tmp_path / 'there'}"], "exists"),
    (
      ["--from=jflow", f"--input={source}", f"--output={tmp_path / 'out'}"],
      "is of the official layout: use --from=official",
    ),
    (
      ["--from=official", f"--input={tmp_path / 'there'}", f"--output={tmp_path / 'out'}"],
      "config.json is missing",
    ),
    (
      ["--from=official", f"--input={tmp_path / 'nowhere'}", f"--output={tmp_path / 'out'}"],
      "is not a directory",
    ),
    (["--from=official", f"--output={tmp_path / 'out'}"], "give --input=DIR"),
    (["--from=huggingface-parts", f"--output={tmp_path / 'out'}"], "needs --llm, --siglip, --vae"),
  ):
    capsys.readouterr()
    assert main(["convert", *argv]) == 2
    assert message in capsys.readouterr().err
  assert not (tmp_path / "out").exists()
