"""Janus in the official layout and in transformers': names, sizes, bitwise round trips, and what is refused."""

import json
import pathlib

import changes
import janus_checkpoint
import ml_dtypes
import numpy as np
import pytest
from janus_checkpoint import OFFICIAL, TRANSFORMERS
from refusals import refused
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jflow.__main__ import main
from jflow.interop import janus, janus_transformers, layouts, published
from jflow.interop.checkpoints import read_checkpoint, read_config
from jflow.models import weights as names
from jflow.models.build import parameter_shapes

LAYOUTS = {OFFICIAL: janus.LAYOUT, TRANSFORMERS: janus_transformers.LAYOUT}
UNUSED = {"gen_vision_model.quantize.codebook_used"}
LLAMA_7B = {"num_hidden_layers": 30, "vocab_size": 102_400, "max_position_embeddings": 16_384}  # all that it holds
LLAMA_1B = LLAMA_7B | {
  "hidden_size": 2048,
  "intermediate_size": 5632,
  "num_hidden_layers": 24,
  "num_attention_heads": 16,
  "num_key_value_heads": 16,
}


def _tensors(directory: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
  out = {}
  for path in directory.glob("*.safetensors"):
    with safe_open(path, "numpy") as file:
      for name in file.keys():
        x = file.get_tensor(name)
        out[name] = (str(x.dtype), x.shape, x.tobytes())
  return out


def _published(width: int, language: dict) -> dict:
  """config.json of a published model, by what is said of it."""
  mlp = lambda into: {"depth": 2, "input_dim": into, "n_embed": width, "projector_type": "mlp_gelu"}
  parts = {
    "vision": ("CLIPVisionTower", dict(image_size=384, model_name="siglip_large_patch16_384", select_feature="same")),
    "aligner": ("MlpProjector", mlp(1024)),
    "gen_vision": ("VQ-16", dict(image_token_size=16_384, n_embed=8)),
    "gen_aligner": ("MlpProjector", mlp(8)),
    "gen_head": ("vision_head", dict(image_token_embed=width, image_token_size=16_384, n_embed=width)),
  }
  parts["vision"][1]["select_layer"] = -1
  values = {f"{name}_config": dict(cls=cls, model_type=name, params=params) for name, (cls, params) in parts.items()}
  return values | {"model_type": "multi_modality", "language_config": {"model_type": "llama"} | language}


# --- names and sizes -------------------------------------------------------------------------------------


def test_both_tables_are_the_published_manifests_and_cover_the_model():
  config = janus.config_from_official(janus_checkpoint.config(), "config.json")
  assert config == janus_transformers.read_config(janus_checkpoint.config(TRANSFORMERS), "config.json")
  official = {
    entry.name: list(entry.shape) for entry in (*janus.LAYOUT.entries(config, False), *janus.LAYOUT.unwritten(config))
  }
  assert official == json.loads((OFFICIAL / "manifest.json").read_text())
  manifest = json.loads((TRANSFORMERS / "manifest.json").read_text())
  theirs = {entry.name: list(entry.shape) for entry in janus_transformers.entries(config)}
  assert theirs == {name: entry["shape"] for name, entry in manifest.items()}
  shapes: dict[str, tuple[int, ...]] = {}
  for entry in janus.LAYOUT.entries(config, False):
    shape = names.jflow_shape(entry.kind, entry.part_shape)
    if entry.layer is not None:
      shape = (max(shapes.get(entry.path, (0,))[0], entry.layer + 1), *shape)
    shapes[entry.path] = shape
  assert shapes == parameter_shapes(config)


@pytest.mark.parametrize(
  "width, language, parameters, tensors",
  [(2048, LLAMA_1B, 2_089_232_011, 882), (4096, LLAMA_7B, 7_420_368_523, 936)],
)
def test_the_published_models_have_their_number_of_parameters(width, language, parameters, tensors):
  values = _published(width, language)
  config = janus.config_from_official(values, "config.json")
  shapes = {entry.name: entry.shape for entry in janus.LAYOUT.entries(config, False)}
  assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters
  assert len(shapes) == tensors - 1  # the buffer of the codebook is the last
  lm = config.language_model
  assert (lm.embed_dim, lm.num_heads, lm.head_dim, lm.max_length) == (width, width // 128, 128, 16_384)
  assert (lm.rms_norm_epsilon, lm.rope_theta) == (1e-6, 10_000.0)
  for layout in LAYOUTS.values():
    assert layout.read_config(layout.write_config(config, "bfloat16", None), "config.json", None) == config
  written = janus.config_to_official(config, "bfloat16")
  assert written["gen_vision_config"]["params"] == values["gen_vision_config"]["params"]
  assert written["vision_config"]["params"]["model_name"] == "siglip_large_patch16_384"


# --- round trips -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("start", [OFFICIAL, TRANSFORMERS], ids=["official", "transformers"])
def test_every_layout_becomes_every_other_bit_for_bit(tmp_path, dtype, start):
  source = janus_checkpoint.write(tmp_path / "source", start, dtype, shards=2, tokenizer=True)
  other = "transformers" if start == OFFICIAL else "official"
  convert = lambda source, to, output: main(
    ["convert", f"--input={source}", f"--to={to}", f"--output={tmp_path / output}"]
  )
  first, last = LAYOUTS[start].name, other
  assert convert(source, "jflow", "jflow") == 0
  assert convert(tmp_path / "jflow", first, "back") == 0
  assert convert(tmp_path / "jflow", last, "other") == 0
  assert convert(source, last, "direct") == 0
  assert convert(tmp_path / "direct", first, "again") == 0
  made = {path.name: _tensors(path) for path in tmp_path.iterdir()}
  assert made["direct"] == made["other"] and made["source"].keys() == made["back"].keys() == made["again"].keys()
  lost = {name for name in made["source"] if "attn_pool" in name}  # transformers has no place for it
  for name, x in made["source"].items():
    assert name in UNUSED or made["back"][name] == x, name
    assert name in UNUSED | lost or made["again"][name] == x, name
  assert not any(any(made["again"][name][2]) for name in lost | (UNUSED & made["again"].keys()))
  for path in ("back", "other", "direct", "again"):
    assert (tmp_path / path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
  configs = {read_config(path) for path in tmp_path.iterdir()}
  assert len(configs) == 1


def test_all_three_open_directly_as_the_same_model(tmp_path):
  paths = [janus_checkpoint.write(tmp_path / "a"), janus_checkpoint.write(tmp_path / "b", TRANSFORMERS)]
  assert main(["convert", f"--input={paths[0]}", f"--output={tmp_path / 'c'}"]) == 0
  first, *others = [read_checkpoint(path) for path in (*paths, tmp_path / "c")]
  for each in others:
    assert (each.config, each.template, each.has_vae) == (first.config, first.template, True)
    for part in first.params.keys() - {"understanding_encoder"}:
      np.testing.assert_equal(each.params[part], first.params[part])


def test_the_prompts_are_those_of_the_tokenizer(tmp_path):
  pro = janus_checkpoint.write(tmp_path / "pro", tokenizer=True)
  assert read_checkpoint(pro).template == "pro"
  text = (pro / "tokenizer.json").read_text()
  (pro / "tokenizer.json").write_text(text.replace("<|User|>", "<user>").replace("<|Assistant|>", "<assistant>"))
  assert read_checkpoint(pro).template == "chat"


@pytest.mark.parametrize("tied", [None, True])
def test_the_head_is_the_files_and_without_one_the_embedding(tmp_path, tied):
  """Whatever tie_word_embeddings says: older files of transformers' layout leave the library's default, true."""
  source = janus_checkpoint.write(tmp_path / "source", TRANSFORMERS)
  values = janus_checkpoint.config(TRANSFORMERS)
  del values["tie_word_embeddings"], values["text_config"]["tie_word_embeddings"]
  (source / "config.json").write_text(json.dumps(values if tied is None else values | {"tie_word_embeddings": tied}))
  head = lambda: published.load(source).params["language_model/head/kernel"]
  tensors = load_file(source / "model.safetensors")
  np.testing.assert_array_equal(head(), tensors["lm_head.weight"].T)
  del tensors["lm_head.weight"]
  save_file(tensors, source / "model.safetensors")
  np.testing.assert_array_equal(head(), tensors["model.language_model.embed_tokens.weight"].T)


def test_the_tokens_around_an_image_are_written_for_transformers(tmp_path):
  source = janus_checkpoint.write(tmp_path / "source", tokenizer=True)
  assert main(["convert", f"--input={source}", "--to=transformers", f"--output={tmp_path / 'out'}"]) == 0
  read = lambda name: json.loads((tmp_path / "out" / name).read_text())
  assert read("config.json")["image_token_id"] == 1003
  words = read("tokenizer_config.json")
  assert (words["boi_token"], words["pad_token"]) == ("<begin_of_image>", "<｜▁pad▁｜>")
  found = read("generation_config.json")
  assert (found["guidance_scale"], found["pad_token_id"], found["bos_token_id"]) == (5, 1002, 1000)
  assert found["generation_kwargs"] == {"boi_token_id": 1004}


def test_what_transformers_conversion_leaves_in_the_config_changes_nothing():
  values = janus_checkpoint.config(TRANSFORMERS)
  wanted = janus_transformers.read_config(values, "config.json")
  values["vq_config"] |= {"depth": 2, "initializer_range": 0.02}
  del values["vq_config"]["num_hidden_layers"], values["vq_config"]["dropout"], values["vision_config"]["depth"]
  values["text_config"] |= {"pretraining_tp": 1, "rope_scaling": None, "use_cache": True}
  assert janus_transformers.read_config(values, "config.json") == wanted


# --- refusals --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[pathlib.Path, pathlib.Path]:
  root = tmp_path_factory.mktemp("janus")
  return {layout: janus_checkpoint.write(root / layout.name, layout) for layout in LAYOUTS}


_ALIGNER, _VQ, _HEAD = (f"{part}_config" for part in ("aligner", "gen_vision", "gen_head"))


@pytest.mark.parametrize(
  "layout, change, words",
  [
    (
      OFFICIAL,
      changes.put("low_high_hybrid_split_mlp_gelu", _ALIGNER, "params", "projector_type"),
      "projector_type low_high_hy",
    ),
    (OFFICIAL, changes.put("linear", "gen_aligner_config", "params", "projector_type"), "projector_type 'linear'"),
    (OFFICIAL, changes.put(32, _ALIGNER, "params", "n_embed"), "aligner_config n_embed=32 64"),
    (OFFICIAL, changes.put(47, _ALIGNER, "params", "input_dim"), "aligner_config input_dim=47 48"),
    (OFFICIAL, changes.put(3, _ALIGNER, "params", "depth"), "aligner_config depth=3 weights"),
    (OFFICIAL, changes.put(16, _HEAD, "params", "image_token_embed"), "gen_head_config image_token_embed=16 weights"),
    (OFFICIAL, changes.put(500, _HEAD, "params", "image_token_size"), "gen_head_config image_token_size=500 512"),
    (OFFICIAL, changes.put("VQ-8", _VQ, "cls"), "gen_vision_config cls VQ-8"),
    (OFFICIAL, changes.put([1, 1, 2], _VQ, "params", "ch_mult"), "gen_vision_config ch_mult 256 16"),
    (OFFICIAL, changes.put([1, 0], _VQ, "params", "ch_mult"), "gen_vision_config ch_mult"),
    (OFFICIAL, changes.put(0.1, _VQ, "params", "dropout"), "gen_vision_config dropout=0.1"),
    (OFFICIAL, changes.put(1, _VQ, "params", "num_res_blocks"), "gen_vision_config num_res_blocks=1 weights"),
    (OFFICIAL, changes.put("patch", "vision_config", "params", "select_feature"), "vision_config select_feature patch"),
    (OFFICIAL, changes.put({}, "something_config"), "something_config"),
    (TRANSFORMERS, changes.put("relu", "vision_config", "hidden_act"), "vision_config hidden_act relu"),
    (TRANSFORMERS, changes.put(True, "vision_config", "use_qk_norm"), "vision_config use_qk_norm"),
    (TRANSFORMERS, changes.put(0.5, "vision_config", "attention_dropout"), "vision_config attention_dropout"),
    (TRANSFORMERS, changes.put(9, "vision_config", "num_image_tokens"), "vision_config num_image_tokens=9 16"),
    (TRANSFORMERS, changes.put(1e308, "vision_config", "mlp_ratio"), "vision_config mlp_ratio=1e+308"),
    (TRANSFORMERS, changes.put(1e-9, "vision_config", "mlp_ratio"), "vision_config mlp_ratio=1e-09"),
    (TRANSFORMERS, changes.put(3, "vision_config", "depth"), "vision_config depth=3 weights"),
    (TRANSFORMERS, changes.put(32, "vq_config", "projection_dim"), "vq_config projection_dim=32 64"),
    (TRANSFORMERS, changes.put(True, "vq_config", "double_latent"), "vq_config double_latent"),
    (TRANSFORMERS, changes.put(256, "vq_config", "num_embeddings"), "vq_config num_embeddings=256 weights"),
    (TRANSFORMERS, changes.put("gemma", "text_config", "model_type"), "text_config model_type gemma"),
    (TRANSFORMERS, changes.put(1, "quantization_config"), "quantization_config=1"),
  ],
)
def test_what_is_not_computed_is_refused_by_field_and_value(sources, tmp_path, capsys, layout, change, words):
  values = janus_checkpoint.config(layout)
  change(values)
  source = tmp_path / "source"
  source.mkdir()
  (source / "config.json").write_text(json.dumps(values))
  (source / "model.safetensors").symlink_to(sources[layout] / "model.safetensors")
  assert main(["convert", f"--input={source}", f"--output={tmp_path / 'out'}"]) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and all(any(part in error for part in word.split("|")) for word in words.split()), error


def test_a_width_that_the_llm_leaves_to_a_default_is_explained():
  values = _published(2048, LLAMA_7B)
  with refused("hidden_size", "4096", "n_embed=2048"):
    janus.config_from_official(values, "config.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", None])
def test_a_pickle_is_refused_with_the_ways_to_safetensors(tmp_path, capsys, name):
  (tmp_path / "config.json").write_text((OFFICIAL / "config.json").read_text())
  if name:
    (tmp_path / name).write_bytes(b"\x80\x04.")
  assert main(["convert", f"--input={tmp_path}", f"--output={tmp_path / 'out'}"]) == 2
  error = capsys.readouterr().err
  assert "deepseek-community/Janus-Pro-7B" in error and "refs/pr/" in error and (name or "neither") in error


@pytest.mark.parametrize("token, name", [("<｜▁pad▁｜>", "pad"), ("<begin_of_image>", "image_start")])
def test_a_tokenizer_without_pad_or_boi_is_refused_before_weights_are_read(tmp_path, capsys, monkeypatch, token, name):
  monkeypatch.setattr("jflow.interop.safetensors_io.Checkpoint.read", lambda *args: pytest.fail("weights were read"))
  source = janus_checkpoint.write(tmp_path / "source", tokenizer=True)
  path = source / "tokenizer.json"
  path.write_text(path.read_text().replace(token, "<renamed>"))
  assert main(["understand", f"--checkpoint={source}", "--question=?"]) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and token in error and name in error


def test_a_head_of_another_width_has_no_place_in_transformers_layout(tmp_path, capsys):
  source = tmp_path / "source"
  source.mkdir()
  values, tensors = janus_checkpoint.config(), janus_checkpoint.tensors()
  values["gen_head_config"]["params"]["image_token_embed"] = 48
  tensors["gen_head.output_mlp_projector.weight"] = tensors["gen_head.output_mlp_projector.weight"][:48]
  tensors["gen_head.output_mlp_projector.bias"] = tensors["gen_head.output_mlp_projector.bias"][:48]
  tensors["gen_head.vision_head.weight"] = np.ascontiguousarray(tensors["gen_head.vision_head.weight"][:, :48])
  (source / "config.json").write_text(json.dumps(values))
  save_file(tensors, source / "model.safetensors")
  assert main(["convert", f"--input={source}", "--to=transformers", f"--output={tmp_path / 'out'}"]) == 2
  error = capsys.readouterr().err
  assert "model.generation.hidden_dim=48" in error and "64" in error and not (tmp_path / "out").exists()
  assert main(["convert", f"--input={source}", "--to=official", f"--output={tmp_path / 'out'}"]) == 0


def test_what_only_janusflow_has_is_refused(tmp_path, capsys):
  source = janus_checkpoint.write(tmp_path / "source")
  vae = f"--vae={tmp_path}"
  assert main(["convert", f"--input={source}", vae, f"--output={tmp_path / 'out'}"]) == 2
  assert "is not read" in capsys.readouterr().err
  from jflow.interop.janusflow import config_from_official

  flow = config_from_official(json.loads((janus_checkpoint.GOLDEN / "tiny" / "config.json").read_text()), "", None)
  with refused("'flow'", "transformers"):
    layouts.of(flow, "transformers")
