"""`bench train --suite` as a user runs it: what its report says of kernels, losses and the step on a CPU."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import tiny

from jflow.perf import train

ROWS, ROW_TOKENS = 2, 128
FIELDS = (
  "config.model.autoencoder.kind=patch_pca",
  "config.model.autoencoder.block_channels=()",
  "config.model.autoencoder.patch_size=4",
  "config.model.autoencoder.window=4",
)


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> dict:
  file = tmp_path_factory.mktemp("bench") / "suite.json"
  command = [
    sys.executable,
    "-m",
    "jflow",
    "bench",
    "train",
    "--suite",
    "--config=configs/stage2.py:tiny",
    f"--rows={ROWS}",
    "--steps=1",
    f"--json={file}",
    "--fields",
    *FIELDS,
  ]
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
  done = subprocess.run(command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return json.loads(file.read_text())


@pytest.fixture(scope="module")
def report(suite) -> dict:
  """That of the step, as `bench train` alone gives it; on a CPU the suite measures one."""
  (step,) = suite["steps"]
  return step


def test_the_report_of_a_step_adds_up(report):
  tokens, step = report["tokens_per_step"], report["seconds_per_step"]["median"]
  assert 0 < tokens <= ROWS * ROW_TOKENS
  assert report["tokens_per_second"] == pytest.approx(tokens / step)
  assert report["model_flops_per_token"] == pytest.approx(report["model_flops"] / tokens)
  assert report["mfu"] is None  # no table has the peak of a CPU
  assert report["peak_bytes"] > 0 and report["compile_seconds"] > 0
  assert (report["dtype"], report["remat"], report["attention"]) == ("float32", "full", "xla")


def test_each_part_is_timed_and_has_its_share_of_the_work(report):
  parts = report["parts"]
  assert {"llm", "head", "siglip", "vae", "heads", "optimizer"} <= parts.keys()
  assert all(part["seconds"] > 0 for part in parts.values())
  work = sum(part["model_flops"] or 0 for part in parts.values())
  assert 0.9 * report["model_flops"] < work <= 1.0001 * report["model_flops"]


def test_the_suite_measures_all_its_sections(suite):
  assert suite["ceiling"]["flops_per_second"] > 0 < suite["ceiling"]["bytes_per_second"]
  kernels = suite["attention"]
  assert kernels["xla"]["leak"] == 0 and kernels["xla"]["gradient_error"] == 0
  assert {name for name, found in kernels.items() if "skipped" in found} == {*kernels} - {"xla"}
  assert all(loss["seconds"]["median"] > 0 for loss in suite["head_loss"].values())


def test_a_part_of_the_suite_can_be_chosen(monkeypatch):
  chosen = []
  note = lambda config, steps, sections: chosen.append(tuple(sections)) or {}
  monkeypatch.setattr("jflow.perf.suite.run_suite", note)
  parser = argparse.ArgumentParser()
  train.add_flags(parser)
  for flags in (["--suite", "attention", "ceiling"], ["--suite"]):
    train.run(parser.parse_args(["--config=configs/stage2.py:tiny", *flags]))
  assert chosen == [("attention", "ceiling"), train.SECTIONS]
  with pytest.raises(SystemExit):
    parser.parse_args(["--config=configs/stage2.py:tiny", "--suite", "kernels"])
