"""`bench train` as a user runs it on a CPU."""

import json
import os
import subprocess
import sys

import pytest
import tiny

ROWS, ROW_TOKENS = 2, 128
FIELDS = (
  "config.model.autoencoder.kind=patch_pca",
  "config.model.autoencoder.block_channels=()",
  "config.model.autoencoder.patch_size=4",
  "config.model.autoencoder.window=4",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
  file = tmp_path_factory.mktemp("bench") / "report.json"
  command = [
    sys.executable,
    "-m",
    "jflow",
    "bench",
    "train",
    "--config=configs/stage2.py:tiny",
    f"--rows={ROWS}",
    "--steps=1",
    f"--json={file}",
    "--fields",
    *FIELDS,
  ]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return json.loads(file.read_text())


def test_the_report_of_a_step_adds_up(report):
  tokens, step = report["tokens_per_step"], report["seconds_per_step"]["median"]
  assert 0 < tokens <= ROWS * ROW_TOKENS
  assert report["tokens_per_second"] == pytest.approx(tokens / step)
  assert report["model_flops_per_token"] == pytest.approx(report["model_flops"] / tokens)
  assert report["mfu"] is None  # no table has the peak of a CPU
  assert report["peak_bytes"] > 0 and report["compile_seconds"] > 0
  assert (report["dtype"], report["remat"], report["attention"]) == ("float32", "none", "xla")


def test_each_part_is_timed_and_has_its_share_of_the_work(report):
  parts = report["parts"]
  assert {"llm", "head", "siglip", "vae", "heads", "optimizer"} <= parts.keys()
  assert all(part["seconds"] > 0 for part in parts.values())
  work = sum(part["model_flops"] or 0 for part in parts.values())
  assert 0.9 * report["model_flops"] < work <= 1.0001 * report["model_flops"]
