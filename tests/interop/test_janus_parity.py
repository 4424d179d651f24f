"""The command `parity` on Janus: the golden file passes in both layouts, parts of it too, and what differs is named."""

import json
import pathlib

import janus_checkpoint
import numpy as np
import official_checkpoint
import pytest
from janus_checkpoint import OFFICIAL, TRANSFORMERS
from safetensors.numpy import save_file

from jflow.__main__ import main
from jflow.interop import parity
from jflow.interop.golden import Output

GOLDEN = OFFICIAL / "golden.npz"
INPUTS = {"prompt_ids", "greedy_prompt_ids", "short_greedy_prompt_ids", "pixels", "input_ids", "attention_mask"}
INPUTS |= {"margin", "greedy_margin", "short_greedy_margin", "cfg_weight"}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
  with np.load(GOLDEN) as file:
    return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
  return janus_checkpoint.write(tmp_path_factory.mktemp("janus") / "official")


@pytest.fixture
def run(tmp_path, checkpoint):
  """values or a file -> (exit code, the arrays of the result)."""

  def call(values=GOLDEN, source=checkpoint):
    path = values
    if isinstance(values, dict):
      path = tmp_path / "golden.npz"
      np.savez(path, **values)
    out = tmp_path / "result.json"
    code = main(["parity", f"--checkpoint={source}", f"--golden={path}", f"--json={out}"])
    return code, json.loads(out.read_text()) if code < 2 else {}

  return call


def _of(golden, *starts):
  return {name: x for name, x in golden.items() if name.startswith(starts)}


@pytest.mark.parametrize("layout", [OFFICIAL, TRANSFORMERS], ids=["official", "transformers"])
def test_every_golden_array_agrees(run, tmp_path, golden, layout):
  code, result = run(source=janus_checkpoint.write(tmp_path / "source", layout))
  assert code == 0
  assert set(result["arrays"]) == {
    name for name in golden if name.split("/")[-1] not in INPUTS and name != "paint/codes"
  }
  exact = ("und/greedy_tokens", "vq/codes", "paint/greedy_codes", "paint/short_greedy_codes")
  assert all(result["arrays"][name]["max_error"] == 0 for name in exact)


def test_subsets_and_variants(run, golden):
  tokens = lambda x: x.reshape(*x.shape[:2], -1).transpose(0, 2, 1)  # [B, C, h, w] -> [B, h w, C]
  values = {name: golden[name] for name in ("vq/codes", "paint/prompt_ids", "paint/codes", "paint/greedy_prompt_ids")}
  values |= {
    "vq/quantised_first8": tokens(golden["vq/quantised"])[:, :8],
    "vq/decoded_mean": golden["vq/decoded"].mean(axis=(2, 3)),
    "vq/decoded_pooled": golden["vq/decoded"].reshape(2, 3, 8, 8, 8, 8).mean(axis=(3, 5)),
    "paint/logits_guided_last4": golden["paint/logits_guided"][:, -4:],
    "paint/hidden_cond_mean": golden["paint/hidden_cond"].mean(axis=1),
    "paint/greedy_codes_first8": golden["paint/greedy_codes"][:8],
    "paint/greedy_logits_first8": golden["paint/greedy_logits"][:8],
    "paint/image": golden["paint/image"],
    "train/image_loss": golden["train/image_loss"],
  }
  code, result = run(values)
  assert code == 0 and len(result["arrays"]) == 9
  wrong = golden["paint/greedy_codes"][1:9]
  code, result = run(values | {"paint/greedy_codes_first8": wrong})
  assert code == 1 and result["first_divergence"]["array"] == "paint/greedy_codes_first8"


def test_codes_are_compared_where_they_are_clear(run, golden):
  """An unclear code may differ, and what follows it in a greedy picture, which continues another one."""
  values = _of(golden, "vq/codes", "vq/margin", "vq/pixels", "paint/greedy", "paint/cfg_weight")
  values = {name: x.copy() for name, x in values.items() if name != "paint/greedy_logits"}
  values["vq/codes"][1, 3] += 1
  values["paint/greedy_codes"][5:] = 7
  code, result = run(values)
  assert (
    code == 1 and not result["arrays"]["vq/codes"]["passed"] and not result["arrays"]["paint/greedy_codes"]["passed"]
  )
  values["vq/margin"][1, 3] = values["paint/greedy_margin"][5] = 1e-4
  code, result = run(values)
  assert code == 0 and result["arrays"]["vq/codes"]["passed"]
  values["paint/greedy_codes"][4] = 7  # before the unclear one
  assert run(values)[0] == 1


def test_inputs_of_one_picture_may_have_an_axis_of_1(run, golden):
  values = _of(golden, "paint/greedy", "paint/prompt_ids", "paint/codes", "paint/gen_embeds", "paint/cfg_weight")
  values["paint/greedy_codes_first8"] = values["paint/greedy_codes"][:8]
  for name in ("paint/greedy_codes", "paint/greedy_prompt_ids", "paint/greedy_margin", "paint/codes"):
    values[name] = values[name][None]
  code, result = run(values)
  assert code == 0 and result["arrays"]["paint/greedy_codes"]["compared"] == 16


def test_margins_that_leave_nothing_to_compare_do_not_pass(run, golden, capsys):
  values = _of(golden, "vq/codes", "vq/margin", "vq/pixels")
  values["vq/margin"] = values["vq/margin"].copy()
  values["vq/margin"][0] = 0
  code, result = run(values)
  assert code == 0 and result["arrays"]["vq/codes"]["compared"] == 16
  assert "16 of 32" in capsys.readouterr().out
  code, result = run(values | {"vq/margin": np.zeros((2, 16))})
  assert code == 1 and result["arrays"]["vq/codes"]["compared"] == 0


@pytest.mark.parametrize("by, code", [(1, 0), (2, 1)])
def test_pixels_may_differ_by_one(run, golden, by, code):
  values = {name: golden[name] for name in ("paint/greedy_codes", "paint/image_uint8")}
  changed = values["paint/image_uint8"].astype(int)
  changed[0, 0, 0, 0] += by if changed[0, 0, 0, 0] < 128 else -by
  assert run(values | {"paint/image_uint8": changed.astype(np.uint8)})[0] == code


@pytest.mark.parametrize(
  "name, array, component",
  [
    ("vision_model.vision_tower.norm.bias", "und/features", "understanding_encoder"),
    ("aligner.layers.2.weight", "und/inputs_embeds", "understanding_projector"),
    ("language_model.model.norm.weight", "und/logits", "language_model"),
    ("gen_vision_model.encoder.mid.1.q.weight", "vq/encoder_output", "vq/encoder"),
    ("gen_vision_model.quant_conv.bias", "vq/latents", "vq/quant_conv"),
    ("gen_vision_model.decoder.conv_out.bias", "vq/decoded", "vq/decoder"),
    ("gen_embed.weight", "paint/gen_embeds", "generation_embed"),
    ("gen_aligner.layers.2.bias", "paint/aligned", "generation_projector"),
    ("gen_head.vision_head.bias", "paint/logits_cond", "generation_head"),
  ],
)
def test_the_first_component_that_diverges_is_named(run, tmp_path, golden, name, array, component):
  source = janus_checkpoint.write(tmp_path / "source")
  values = janus_checkpoint.tensors()
  values[name] = values[name] + np.float32(0.5)
  save_file(values, source / "model.safetensors")
  kept = _of(golden, "und/", "vq/", "paint/prompt", "paint/codes", "paint/gen", "paint/aligned", "paint/logits_cond")
  kept = {key: x for key, x in kept.items() if "greedy" not in key}
  code, result = run(kept, source)
  assert code == 1 and result["first_divergence"]["array"] == array
  assert component in result["first_divergence"]["component"]


@pytest.mark.parametrize(
  "values, part",
  [
    (lambda g: _of(g, "vq/decoded"), "vq/decoded vq/codes vq/pixels"),
    (lambda g: _of(g, "paint/logits_cond", "paint/codes"), "paint/prompt_ids"),
    (lambda g: _of(g, "vq/") | {"vq/codes": g["vq/codes"] + 512}, "vq/codes 512"),
    (lambda g: _of(g, "vq/") | {"vq/codes": g["vq/codes"][:, :9]}, "vq/codes [9] [16]"),
    (lambda g: _of(g, "vq/") | {"vq/pixels": g["vq/pixels"][..., :32]}, "vq/pixels [3, 64, 32]"),
    (lambda g: _of(g, "paint/") | {"paint/prompt_ids": g["paint/prompt_ids"] + 256}, "paint/prompt_ids 256"),
    (lambda g: _of(g, "paint/") | {"paint/greedy_prompt_ids": g["paint/prompt_ids"][:1]}, "greedy_prompt_ids BOI"),
    (lambda g: _of(g, "vq/pixels", "vq/latents") | {"vq/margin": np.ones((3, 5))}, "vq/margin [3, 5] [2, 16]"),
    (lambda g: _of(g, "vq/") | {"vq/margin": g["vq/margin"][:1]}, "vq/margin [1, 16] [2, 16]"),
    (lambda g: _of(g, "vq/") | {"vq/margin": -g["vq/margin"]}, "vq/margin negative"),
    (lambda g: _of(g, "paint/") | {"paint/greedy_margin": np.ones(15)}, "paint/greedy_margin [15] [16]"),
    (lambda g: _of(g, "paint/") | {"paint/greedy_margin": np.ones(16, bool)}, "paint/greedy_margin bool"),
    (lambda g: _of(g, "und/", "train/text_loss") | {"und/input_ids": g["und/input_ids"] % 254}, "und/input_ids 254"),
  ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(run, golden, capsys, monkeypatch, values, part):
  monkeypatch.setattr("jflow.interop.safetensors_io.Checkpoint.read", lambda *args: pytest.fail("weights were read"))
  assert run(values(golden))[0] == 2
  error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jflow: ")]
  assert len(error) == 1 and all(word in error[0] for word in part.split(" ")), error


def test_arrays_of_another_family_are_said_or_refused(run, golden, capsys):
  with np.load(official_checkpoint.TINY / "golden.npz") as file:
    flow = {name: file[name] for name in file.files if name.startswith("gen/")}
  assert run(flow)[0] == 2 and "no output to compare" in capsys.readouterr().err
  assert run(flow | _of(golden, "text/"))[0] == 0
  assert "gen/hidden" in capsys.readouterr().err


def test_a_part_of_a_picture():
  picture = np.random.default_rng(0).normal(size=(1, 3, 384, 384))
  of = lambda ending, shape: parity.variant(Output(picture), f"vq/decoded_{ending}", shape).value
  np.testing.assert_array_equal(of("crop", (1, 3, 64, 64)), picture[:, :, 100:164, 200:264])
  np.testing.assert_allclose(of("pooled", (1, 3, 48, 48))[0, 1, 2, 3], picture[0, 1, 16:24, 24:32].mean())
  np.testing.assert_allclose(of("mean", (1, 3)), picture.mean(axis=(2, 3)))
  np.testing.assert_allclose(of("mean", (1,)), picture.mean(axis=(1, 2, 3)))
  np.testing.assert_allclose(of("mean", ()), picture.mean())
