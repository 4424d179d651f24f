"""The cost of a picture and a token by formula, and the reports of `bench generate` and `bench understand`."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from refusals import refused

from configs import models
from jflow.__main__ import main
from jflow.errors import Stopped
from jflow.generation.flow import flops
from jflow.generation.flow.settings import Settings
from jflow.models import build
from jflow.models import flops as model_flops
from jflow.models.config import ModelConfig
from jflow.models.unified import UnifiedModel
from jflow.perf import inference, versus

FULL = ModelConfig.from_dict(models.janusflow_384())
CONFIG = f"--config={tiny.ROOT}/configs/stage3.py:tiny"


def _counted(function, *shapes) -> float:
  """FLOPs as XLA counts them, of a program without loops."""
  return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]


def test_a_picture_of_the_paper_s_model_costs_92_teraflop():
  """30 steps with guidance and the VAE: 92.6 where the prompt is seen by both halves, a little less here."""
  assert flops.image(FULL, Settings(), 32) == pytest.approx(92.6e12, rel=0.01)
  assert FULL.autoencoder.decoder_flops(48) == pytest.approx(1.406e12, rel=0.001)  # torch's counter
  assert flops.image(FULL, Settings(guidance=1.0), 32) < 0.52 * flops.image(FULL, Settings(), 32)


def test_a_token_reads_every_weight_once():
  weights = jax.eval_shape(lambda: build.initial_params(UnifiedModel(FULL, jnp.dtype("float32"), "none", 1, "xla"), 0))
  lm = weights["language_model"]
  matrices = [x.size for x in jax.tree.leaves((lm["layers"], lm["head"])) if x.ndim > 1]
  norms = 2 * FULL.language_model.num_layers * FULL.language_model.embed_dim
  read = model_flops.token_bytes(FULL.language_model, 0, 1, 2)
  assert read == 2 * (sum(matrices) - norms)
  cache = model_flops.token_bytes(FULL.language_model, 100, 3, 2) - read
  assert cache == 2 * 3 * 100 * 24 * 2 * 2048  # bf16, rows, positions, layers, keys and values, width


def test_the_formulas_are_what_xla_counts():
  """The VAE and one evaluation of the velocity; norms and activations are what the formulas leave out."""
  config = ModelConfig.from_dict(models.mid())
  config = dataclasses.replace(config, language_model=dataclasses.replace(config.language_model, num_layers=2))
  model = UnifiedModel(config, jnp.dtype("float32"), "none", 0, "xla")
  params = jax.eval_shape(lambda: inference.sharding.unbox(build.initial_params(model, 0)))
  side, slots = config.latent_size, 1 + config.patches
  z = jax.ShapeDtypeStruct((1, side, side, config.autoencoder.latent_channels), jnp.float32)

  def velocity(params, z):
    apply = functools.partial(model.apply, {"params": params})
    x, skip, time = apply(z, jnp.ones(1), method=lambda m, *x: m.writer.slots(*x))
    ones = jnp.ones((1, slots), jnp.int32)
    hidden = apply(x, jnp.arange(slots)[None], ones, method="backbone").hidden[:, 1:]
    return apply(hidden, skip, time, method=lambda m, *x: m.writer.velocity(*x))

  vae = _counted(lambda p, z: model.apply({"params": p}, z, method=lambda m, x: m.writer.decode(x)), params, z)
  widths = config.autoencoder.block_channels[:0:-1]  # of the levels that end by doubling, lowest resolution first
  doubled = [2 * (side * 2 ** (i + 1)) ** 2 * 9 * width**2 for i, width in enumerate(widths)]
  saved = sum(doubled) * 20 / 36  # taps that meet the same pixel are added first: 16 products in place of 36
  assert config.autoencoder.decoder_flops(side) - saved == pytest.approx(vae, rel=0.05)
  whole = flops.image(config, Settings(steps=1, guidance=1.0), 0) - config.autoencoder.decoder_flops(side)
  assert whole == pytest.approx(_counted(velocity, params, z), rel=0.05)


@pytest.mark.parametrize(
  "workload, flags, wanted",
  [
    ("generate", ("--steps=2",), ("images_per_second", "model_flops", "seconds_per_step")),
    (
      "generate",
      ("--config=janus/stage3:tiny", "--temperature=0"),
      ("images_per_second", "temperature", "bytes_per_step"),
    ),
    ("understand", ("--new_tokens=6",), ("tokens_per_second", "seconds_to_first", "bytes_per_step")),
  ],
)
def test_a_report_has_what_the_contract_names(tmp_path, workload, flags, wanted):
  file = tmp_path / "report.json"
  assert main(["bench", workload, CONFIG, "--repeats=1", f"--json={file}", *flags]) == 0
  report = json.loads(file.read_text())
  assert {"workload", "device", "dtype", "compile_seconds", *wanted} <= report.keys()
  assert report["workload"] == workload and report["dtype"] == "float32"
  assert report["mfu" if workload == "generate" else "bandwidth_share"] is None  # a CPU has no peak in the table


def test_a_checkpoint_is_timed_as_it_is_sampled(tmp_path):
  """`world` sets a guidance of 3; a flag counts more."""
  file = tmp_path / "report.json"
  for flags, guidance in (((), 3.0), (("--guidance=1",), 1.0)):
    assert main(["bench", "generate", "--checkpoint=world", "--steps=1", "--repeats=1", f"--json={file}", *flags]) == 0
    assert json.loads(file.read_text())["guidance"] == guidance


@pytest.mark.parametrize("workload", ["generate", "understand"])
@pytest.mark.parametrize(
  "flags", [("--checkpoint=world", "--config=nonsense"), ("--vae=/nowhere",), ("--weights=raw",)]
)
def test_a_flag_of_the_other_kind_of_model_is_refused(workload, flags, capsys):
  assert main(["bench", workload, *flags]) == 2
  said = capsys.readouterr().err
  assert flags[-1].split("=")[0] in said and "--checkpoint" in said


def test_frameworks_that_differ_are_not_timed():
  with refused("latents", error=Stopped):
    versus.agree("latents", np.ones(4), np.zeros(4) + 2, "float32")
  with refused("latents", error=Stopped):
    versus.agree("latents", np.full(4, np.nan), np.ones(4), "float32")
  codes = versus.WORK["codes"].differ
  with refused("25%", error=Stopped):
    codes(np.arange(4)[None], np.array([[0, 9, 9, 9]]), "float32")
  with refused("codes", error=Stopped):
    codes(np.arange(4)[None], np.arange(3)[None], "bfloat16")


def test_codes_are_compared_in_float32_alone():
  codes = versus.WORK["codes"].differ
  ours, theirs = np.arange(4)[None], np.array([[0, 1, 2, 9]])
  assert codes(ours, theirs, "float32") == 0.25
  assert codes(ours, theirs, "bfloat16") is None  # null in the report: not checked
