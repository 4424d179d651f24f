"""The command `parity`: golden files pass, every divergence is found and named, bad files are refused."""

import dataclasses
import json
import pathlib
import shutil
import zipfile

import jax.numpy as jnp
import numpy as np
import official_checkpoint
import pytest
from safetensors.numpy import save_file

from jflow.__main__ import main
from jflow.generation.flow.sampler import FlowSampler
from jflow.generation.flow.settings import Settings
from jflow.interop.checkpoints import read_checkpoint
from jflow.interop.comparison import line
from jflow.models.unified import UnifiedModel, for_inference
from jflow.world.codec import PatchPCAConfig

GOLDEN = official_checkpoint.TINY / "golden.npz"
PROCESSOR = official_checkpoint.PROCESSOR


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
  return official_checkpoint.write(tmp_path_factory.mktemp("parity") / "official")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
  """Its arrays, without those of training, which take a gradient."""
  with np.load(GOLDEN) as file:
    return {name: file[name] for name in file.files if not name.startswith("train/")}


def _run(checkpoint: pathlib.Path, golden: pathlib.Path, tmp_path: pathlib.Path, *flags: str) -> tuple[int, dict]:
  out = tmp_path / "result.json"
  code = main(["parity", f"--checkpoint={checkpoint}", f"--golden={golden}", f"--json={out}", *flags])
  return code, json.loads(out.read_text())


def _save(tmp_path: pathlib.Path, values: dict[str, np.ndarray]) -> pathlib.Path:
  np.savez(tmp_path / "golden.npz", **values)
  return tmp_path / "golden.npz"


@pytest.mark.smoke
def test_the_golden_file_of_the_reference_passes(checkpoint, tmp_path, capsys):
  code, result = _run(checkpoint, GOLDEN, tmp_path)
  assert code == 0 and result["passed"] and result["first_divergence"] is None
  inputs = {"pixels", "input_ids", "attention_mask", "prompt_ids", "z0", "t", "steps", "cfg_weight", "x"}
  with np.load(GOLDEN) as file:
    outputs = {name for name in file.files if name.split("/")[1] not in inputs}
  assert set(result["arrays"]) == outputs and len(outputs) == 24
  assert all(x["relative_l2"] <= 1e-5 for x in result["arrays"].values())
  assert result["arrays"]["und/greedy_tokens"]["max_error"] == 0
  printed = capsys.readouterr().out.splitlines()
  assert len(printed) == 25 and printed[-1] == "all 24 arrays agree within 1e-05"


def test_the_json_file_may_lie_in_a_new_folder(tmp_path, capsys):
  path = tmp_path / "a" / "b" / "report.json"
  assert main(["parity", f"--processor={PROCESSOR}", f"--json={path}"]) == 0
  assert json.loads(path.read_text())["passed"]
  (tmp_path / "file").write_text("")
  assert main(["parity", f"--processor={PROCESSOR}", f"--json={tmp_path / 'file' / 'report.json'}"]) == 2
  assert "--json: directory" in capsys.readouterr().err
  assert main(["parity", f"--processor={PROCESSOR}", f"--json={tmp_path}"]) == 2
  assert f"--json={tmp_path} is a directory: name a file" in capsys.readouterr().err


def test_a_converted_checkpoint_passes_too(checkpoint, golden, tmp_path):
  assert main(["convert", f"--input={checkpoint}", f"--output={tmp_path / 'jflow'}"]) == 0
  assert _run(tmp_path / "jflow", _save(tmp_path, golden), tmp_path)[0] == 0


def test_subsets_and_variants(checkpoint, golden, tmp_path):
  """A file may hold the last positions, the first tokens or the mean over tokens of an array."""
  tokens = lambda x: x.reshape(*x.shape[:2], -1).transpose(0, 2, 1)  # [B, C, H, W] -> [B, H W, C]
  values = {name: golden[name] for name in ("und/pixels", "und/input_ids", "und/attention_mask")}
  values |= {name: golden[name] for name in ("gen/prompt_ids", "gen/z0", "gen/t")}
  values |= {
    "und/features_first8": golden["und/features"][:, :8],
    "und/features_mean": golden["und/features"].mean(axis=1),
    "und/inputs_embeds_first8": golden["und/inputs_embeds"][:, :8],
    "und/logits_last4": golden["und/logits"][:, -4:],
    "gen/z_emb_first8": tokens(golden["gen/z_emb"])[:, :8],
    "gen/z_emb_mean": golden["gen/z_emb"].mean(axis=(2, 3)),
    "gen/velocity_cond_last8": tokens(golden["gen/velocity_cond"])[:, -8:].transpose(0, 2, 1),
    "gen/hidden_last4": golden["gen/hidden"][:, -4:],
  }
  code, result = _run(checkpoint, _save(tmp_path, values), tmp_path)
  assert code == 0 and len(result["arrays"]) == 8
  values["und/logits_last4"] = golden["und/logits"][:, -5:-1]
  code, result = _run(checkpoint, _save(tmp_path, values), tmp_path)
  assert code == 1 and result["first_divergence"]["array"] == "und/logits_last4"


def test_the_first_greedy_tokens_are_compared_without_the_others(checkpoint, golden, tmp_path):
  values = {name: x for name, x in golden.items() if name.startswith("und/") and name != "und/greedy_tokens"}
  first = golden["und/greedy_tokens"][:, :3]
  code, result = _run(checkpoint, _save(tmp_path, values | {"und/greedy_tokens_first3": first}), tmp_path)
  assert code == 0 and result["arrays"]["und/greedy_tokens_first3"]["max_error"] == 0
  code, _ = _run(checkpoint, _save(tmp_path, values | {"und/greedy_tokens_first3": first + 1}), tmp_path)
  assert code == 1


def test_a_file_says_which_ids_stand_for_an_image(checkpoint, golden, tmp_path):
  """Those positions hold what SigLIP gives, so that any ids serve, here two of the text's."""
  ids = golden["und/input_ids"]
  boi, image = np.setdiff1d(np.arange(200), ids)[:2]
  values = golden | {"und/input_ids": np.where(ids == 252, boi, np.where(ids == 253, image, ids))}
  assert main(["parity", f"--checkpoint={checkpoint}", f"--golden={_save(tmp_path, values)}"]) == 2
  values["und/special_ids"] = np.array([boi, image])
  assert _run(checkpoint, _save(tmp_path, values), tmp_path)[0] == 0


def test_padded_positions_are_not_compared(checkpoint, golden, tmp_path):
  padded = golden["und/attention_mask"] == 0
  assert padded.any()
  values = dict(golden)
  values["und/logits"] = np.where(padded[..., None], np.float32(1e9), golden["und/logits"])
  assert _run(checkpoint, _save(tmp_path, values), tmp_path)[0] == 0


def test_the_sampler_of_generate_gives_the_trajectory_of_the_reference(checkpoint, golden):
  """The cached prompt and the compact empty prompt end where PyTorch's repeated full passes end."""
  found = read_checkpoint(checkpoint)
  codec = PatchPCAConfig("patch_pca", 4, 1.0, patch_size=8, window=8)
  config = dataclasses.replace(found.config, autoencoder=codec)
  model = UnifiedModel(config, jnp.float32, remat="none", unroll=1, attention="xla")
  kernel = np.zeros((3, 3, 4, 192), np.float32)
  kernel[1, 1, np.arange(4), np.arange(4)] = 1.0  # a decoder that shows latent c at column c of its patch
  params = found.params | {"vae": {"decoder": {"kernel": kernel, "bias": np.zeros(192, np.float32)}}}
  prompt = golden["gen/prompt_ids"].astype(np.int32)
  tokens = np.full((2, 16), 255, np.int32)
  tokens[:, : len(prompt)] = prompt
  settings = Settings(steps=int(golden["gen/steps"]), guidance=float(golden["gen/cfg_weight"]))
  sampler, start = FlowSampler(*for_inference(model, params)), golden["gen/z0"].transpose(0, 2, 3, 1)
  pixels = sampler.sample(tokens, np.full(2, len(prompt), np.int32), start, settings)
  z1 = np.stack([pixels[:, ::8, c::8, 0] for c in range(4)], axis=1)
  assert line("gen/z1", "", z1, golden["gen/z1"], 1e-5).passed


_TOWER = "vision_und_enc_model.vision_tower"
_BLOCK = "mid_block.res_blocks.1"


@pytest.mark.parametrize(
  "name, array, component",
  [
    (f"{_TOWER}.blocks.1.attn.qkv.weight", "und/features", "understanding_encoder"),
    ("beg_of_und_embed", "und/inputs_embeds", "understanding_start"),
    ("vision_und_enc_aligner.bias", "und/inputs_embeds", "understanding_projector"),
    ("language_model.model.layers.2.mlp.down_proj.weight", "und/logits", "language_model"),
    ("vision_gen_enc_model.time_embed.linear_1.weight", "gen/t_emb", "time embedding"),
    (f"vision_gen_enc_model.{_BLOCK}.channelwise_norm.weight", "gen/z_emb", "generation_encoder"),
    ("vision_gen_enc_aligner.weight", "gen/hidden", "language_model"),
    ("vision_gen_dec_aligner_norm.weight", "gen/velocity_cond", "generation_output_norm"),
    (f"vision_gen_dec_model.{_BLOCK}.cond_embeds_mapper.bias", "gen/velocity_cond", "generation_decoder"),
  ],
)
def test_the_first_component_that_diverges_is_named(golden, tmp_path, capsys, name, array, component):
  """One value of one tensor moves: everything before it still agrees."""
  source = official_checkpoint.write(tmp_path / "official")
  values = official_checkpoint.tensors()
  values[name].reshape(-1)[-1] += 0.5
  save_file(values, source / "model.safetensors")
  code, result = _run(source, _save(tmp_path, golden), tmp_path)
  assert code == 1 and not result["passed"]
  assert result["first_divergence"]["array"] == array
  assert component in result["first_divergence"]["component"]
  assert f"first to diverge: {array}, made by" in capsys.readouterr().out


def test_guidance_and_step_count_are_seen_in_the_trajectory_alone(checkpoint, golden, tmp_path):
  for name, value in (("gen/cfg_weight", 2.5), ("gen/t", 0.26)):
    code, result = _run(checkpoint, _save(tmp_path, golden | {name: np.asarray(value)}), tmp_path)
    assert code == 1
    first = "gen/trajectory" if name == "gen/cfg_weight" else "gen/t_emb"
    assert result["first_divergence"]["array"] == first


def test_the_tolerance_is_a_flag(checkpoint, golden, tmp_path):
  path = _save(tmp_path, golden)
  assert _run(checkpoint, path, tmp_path, "--tolerance=1e-9")[0] == 1
  code, result = _run(checkpoint, path, tmp_path, "--tolerance=1e-3")
  assert code == 0 and result["tolerance"] == 1e-3


def test_a_comparison_is_the_relative_l2_error():
  golden = np.array([3.0, 4.0])
  found = line("x", "y", golden + np.array([0.0, 0.05]), golden, 0.02)
  assert found.relative_l2 == pytest.approx(0.01) and found.max_error == pytest.approx(0.05) and found.passed
  assert not line("x", "y", np.array([np.nan, 4.0]), golden, 1e9).passed
  assert not line("x", "y", golden[:1], golden, 1e9).passed
  assert not line("x", "y", np.array([1, 2]), np.array([1, 3]), 1e9).passed
  zero = np.zeros(3)
  assert line("x", "y", zero, zero, 1e-5).passed and not line("x", "y", zero + 1e-3, zero, 1e-5).passed
  mask = np.array([True, False])
  found = line("x", "y", np.array([3.0, 9.0]), golden, 0.0, mask)
  assert found.passed and found.compared == 1
  assert not line("x", "y", golden, golden, 0.0, mask & False).passed


def test_errors_that_are_not_finite_are_null_in_json(checkpoint, golden, tmp_path):
  wrong = golden | {"text/logits": golden["text/logits"][:, :-1]}
  code, result = _run(checkpoint, _save(tmp_path, wrong), tmp_path)
  assert code == 1 and result["arrays"]["text/logits"]["relative_l2"] is None
  assert "ours is [2, 16, 256]" in result["first_divergence"]["component"]


# --- the processor ---------------------------------------------------------------------------------------


@pytest.fixture
def processor(tmp_path) -> pathlib.Path:
  shutil.copytree(PROCESSOR, tmp_path / "processor")
  return tmp_path / "processor"


@pytest.mark.smoke
@pytest.mark.parametrize("directory", [PROCESSOR, PROCESSOR.parent / "janus_processor"], ids=lambda path: path.name)
def test_the_golden_processor_passes(tmp_path, directory):
  assert main(["parity", f"--processor={directory}", f"--json={tmp_path / 'r.json'}"]) == 0
  result = json.loads((tmp_path / "r.json").read_text())
  with np.load(directory / "golden.npz") as file:
    assert set(result["arrays"]) == set(file.files)
  assert all(x["max_error"] <= 1e-6 for x in result["arrays"].values())


@pytest.mark.parametrize(
  "key, component",
  [("input_ids", "tokenizer"), ("images_seq_mask", "image slots"), ("pixel_values", "image processor")],
)
def test_a_single_wrong_value_of_the_processor_is_found(processor, tmp_path, key, component):
  with np.load(processor / "golden.npz") as file:
    values = {name: file[name] for name in file.files}
  name = f"two_images/{key}"
  flat = values[name].reshape(-1)
  flat[7] = not flat[7] if flat.dtype == bool else flat[7] + 1 if flat.dtype == np.int64 else flat[7] + 2e-6
  np.savez(processor / "golden.npz", **values)
  assert main(["parity", f"--processor={processor}", f"--json={tmp_path / 'r.json'}"]) == 1
  first = json.loads((tmp_path / "r.json").read_text())["first_divergence"]
  assert first["array"] == name and component in first["component"]


# --- bad input -------------------------------------------------------------------------------------------


def _refused(capsys, message: str, *argv: str) -> None:
  capsys.readouterr()
  assert main(["parity", *argv]) == 2
  error = [x for x in capsys.readouterr().err.splitlines() if x.startswith("jflow: ")]
  assert len(error) == 1 and message in error[0], error


@pytest.fixture
def unopened(monkeypatch):
  """No checkpoint may be opened."""
  monkeypatch.setattr("jflow.interop.parity.describe", lambda *args: pytest.fail("the checkpoint was opened"))


def _without(golden, *names):
  return {name: x for name, x in golden.items() if name not in names}


@pytest.mark.parametrize(
  "change, part",
  [
    (lambda g: _without(g, "und/pixels"), "und/pixels"),
    (lambda g: _without(g, "und/attention_mask"), "und/attention_mask"),
    (lambda g: _without(g, "gen/steps"), "gen/steps"),
    (lambda g: _without(g, "gen/t"), "gen/t"),
    (lambda g: _without(g, "text/input_ids"), "text/input_ids"),
    (lambda g: {"gen/z0": g["gen/z0"]}, "no output"),
    (lambda g: g | {"und/input_ids": g["und/input_ids"].astype(np.float32)}, "und/input_ids"),
    (lambda g: g | {"und/input_ids": g["und/input_ids"][0]}, "und/input_ids"),
    (lambda g: g | {"und/attention_mask": g["und/attention_mask"][:, 1:]}, "und/attention_mask"),
    (lambda g: g | {"und/attention_mask": 0 * g["und/attention_mask"]}, "und/attention_mask"),
    (lambda g: g | {"und/pixels": np.full_like(g["und/pixels"], np.nan)}, "und/pixels"),
    (lambda g: g | {"und/pixels": g["und/pixels"][..., 0]}, "und/pixels"),
    (lambda g: g | {"und/greedy_tokens": g["und/greedy_tokens"][0]}, "greedy_tokens"),
    (lambda g: g | {"und/greedy_margin": np.ones((2, 5))}, "und/greedy_margin"),
    (lambda g: g | {"und/greedy_margin": np.full((2, 12), np.nan)}, "und/greedy_margin"),
    (lambda g: g | {"und/greedy_margin": np.ones((2, 12), bool)}, "und/greedy_margin"),
    (lambda g: g | {"und/greedy_margin": np.full((2, 12), -0.1)}, "und/greedy_margin"),
    (
      lambda g: (
        {k: g[k] for k in ("und/pixels", "und/input_ids", "train/text_loss") if k in g}
        | {"und/attention_mask": g["und/attention_mask"][:, 1:], "train/text_loss": np.array(5.0)}
      ),
      "und/attention_mask",
    ),
    (lambda g: g | {"gen/steps": np.array(0)}, "gen/steps"),
    (lambda g: g | {"gen/steps": np.array(10**9)}, "gen/steps"),
    (lambda g: g | {"gen/steps": np.array(6.5)}, "gen/steps"),
    (lambda g: g | {"gen/t": np.array(1.5)}, "gen/t"),
    (lambda g: g | {"gen/t": np.array([0.1, 0.2, 0.3])}, "gen/t"),
    (lambda g: g | {"gen/cfg_weight": np.array(np.inf)}, "gen/cfg_weight"),
    (lambda g: g | {"gen/z0": g["gen/z0"][0]}, "gen/z0"),
    (lambda g: g | {"gen/z0": g["gen/z0"][:0]}, "gen/z0"),
    (lambda g: g | {"text/logits": g["text/logits"].astype(np.complex64)}, "text/logits"),
    (lambda g: g | {"text/logits": np.array(["a"])}, "text/logits"),
    (lambda g: g | {"text/logits": np.zeros((0, 4))}, "text/logits"),
    (lambda g: g | {"text/logits": np.array([{}], dtype=object)}, "npz"),
  ],
)
def test_an_incomplete_golden_file_is_told_before_the_checkpoint_is_opened(
  golden, tmp_path, capsys, unopened, change, part
):
  path = _save(tmp_path, change(golden))
  _refused(capsys, part, "--checkpoint=anywhere", f"--golden={path}")


def test_a_file_that_unpacks_to_far_more_is_refused(tmp_path, capsys, unopened):
  with (
    zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as file,
    file.open("text/logits.npy", "w") as out,
  ):
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": (2**27,)})
    for _ in range(512):
      out.write(bytes(2**20))
  _refused(capsys, "would unpack to", "--checkpoint=anywhere", f"--golden={tmp_path / 'bomb.npz'}")


def test_ids_that_the_model_has_not_are_told_before_weights_are_read(checkpoint, golden, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr("jflow.interop.safetensors_io.Checkpoint.read", lambda *args: pytest.fail("weights were read"))
  for name in ("text/input_ids", "gen/prompt_ids"):
    for wrong in (-1, 256):
      ids = golden[name].copy()
      ids.reshape(-1)[3] = wrong
      path = _save(tmp_path, golden | {name: ids})
      _refused(capsys, name, f"--checkpoint={checkpoint}", f"--golden={path}")


def test_arrays_that_are_not_compared_are_said(checkpoint, golden, tmp_path, capsys):
  path = _save(
    tmp_path,
    {name: golden[f"text/{name[5:]}"] for name in ("text/input_ids", "text/logits")} | {"text/logit": np.zeros(3)},
  )
  assert main(["parity", f"--checkpoint={checkpoint}", f"--golden={path}"]) == 0
  assert "text/logit" in capsys.readouterr().err


@pytest.mark.parametrize(
  "change, part",
  [
    (dict(image_size="48"), "image_size"),
    (dict(image_size=10**9), "image_size"),
    (dict(patch_size=0), "patch_size"),
    (dict(cases={}), "cases"),
    (dict(cases=["one"]), "cases[0]"),
    (dict(cases=[{"name": "one", "conversation": ["x"]}]), "turn"),
    (
      dict(cases=[{"name": "one", "conversation": [{"role": "User", "content": "a", "images": ["../x.png"]}]}]),
      "../x.png",
    ),
    (
      dict(cases=[{"name": "one", "conversation": [{"role": "User", "content": "a", "images": ["/etc/hostname"]}]}]),
      "/etc/hostname",
    ),
    (dict(cases=[{"name": "one", "conversation": [{"role": "User", "content": "a", "images": ["no.png"]}]}]), "no.png"),
  ],
)
def test_cases_are_checked_before_the_tokenizer_is_built(processor, capsys, monkeypatch, change, part):
  monkeypatch.setattr("jflow.interop.processor_parity.Tokenizer", lambda *args: pytest.fail("the tokenizer was built"))
  path = processor / "cases.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  _refused(capsys, part, f"--processor={processor}")


def test_bad_input_is_one_clear_line(checkpoint, golden, tmp_path, capsys, processor):
  at = f"--checkpoint={checkpoint}"
  _refused(capsys, "give --checkpoint=DIR and --golden=FILE.npz", at)
  _refused(capsys, "give --processor, or", at, f"--processor={processor}")
  _refused(capsys, "nowhere.npz not found", at, f"--golden={tmp_path / 'nowhere.npz'}")
  _refused(capsys, "is not a directory", f"--checkpoint={tmp_path / 'no'}", f"--golden={GOLDEN}")
  (tmp_path / "text.npz").write_text("hello")
  _refused(capsys, "is not a readable npz file", at, f"--golden={tmp_path / 'text.npz'}")
  np.savez(tmp_path / "objects.npz", **{"text/logits": np.array([{}], dtype=object)})
  _refused(capsys, "is not a readable npz file", at, f"--golden={tmp_path / 'objects.npz'}")
  only = {"text/logits": golden["text/logits"]}
  _refused(capsys, "has text/logits but not its input text/input_ids", at, f"--golden={_save(tmp_path, only)}")
  only = {"text/input_ids": golden["text/input_ids"]}
  _refused(capsys, "holds no output to compare with", at, f"--golden={_save(tmp_path, only)}")
  ids = golden["und/input_ids"].copy()
  ids[1][ids[1] == 252] = 5  # the begin-of-image id of row 1
  wrong = golden | {"und/input_ids": ids}
  _refused(capsys, "has 1 images, und/pixels 2", at, f"--golden={_save(tmp_path, wrong)}")
  for name, value, message in (
    ("und/pixels", golden["und/pixels"][..., :-8], "und/pixels is [3, 64, 56] where this model takes [3, 64, 64]"),
    ("gen/z0", golden["gen/z0"][..., :-2], "gen/z0 is [4, 8, 6] where this model takes [4, 8, 8]"),
    ("und/special_ids", np.array([252]), "und/special_ids is [1] where this model takes [2]"),
    ("und/special_ids", np.array(252), "und/special_ids is [] where this model takes [2]"),
  ):
    _refused(capsys, message, at, f"--golden={_save(tmp_path, golden | {name: value})}")
  last = {name: x for name, x in golden.items() if name != "und/greedy_tokens"}
  last["und/greedy_tokens_last4"] = golden["und/greedy_tokens"][:, -4:]
  _refused(capsys, "greedy_tokens_last4 needs und/greedy_tokens beside", at, f"--golden={_save(tmp_path, last)}")
  with np.load(processor / "golden.npz") as file:
    values = {name: file[name] for name in file.files}
  np.savez(processor / "golden.npz", **values, **{"two_image/input_ids": np.zeros(3)})
  _refused(capsys, "golden.npz holds two_image/input_ids, which no case", f"--processor={processor}")
  np.savez(processor / "golden.npz")
  _refused(capsys, "golden.npz holds no arrays", f"--processor={processor}")
  (processor / "cases.json").write_text("{}")
  _refused(capsys, "cases.json does not follow the format", f"--processor={processor}")
  (processor / "tokenizer.json").unlink()
  _refused(capsys, "tokenizer.json not found", f"--processor={processor}")
