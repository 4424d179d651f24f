"""The step compiled for a TPU that is not there. Needs libtpu (JFLOW_COMPILE=1 launch/test.sh), and no hardware."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import tiny
from refusals import refused

from jflow.cli import compile
from jflow.perf import hlo, targets

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
  file = tmp_path_factory.mktemp("compile") / "report.json"
  command = [
    sys.executable,
    "-m",
    "jflow",
    "compile",
    "--config=configs/stage2.py:tiny",
    "--topology=v5e:2x4",
    "--effort=-1",  # a third of the time; the full effort gathers less, and moves as much
  ]
  done = subprocess.run([*command, f"--json={file}"], cwd=tiny.ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return json.loads(file.read_text())


@needs_libtpu
def test_parameters_are_gathered_one_by_one(report):
  """The largest gather is that of one weight (the head's, 64 x 1024), far below the tree of all parameters."""
  everything = 8 * 2**30 * report["memory_gib"]["ema"]
  assert report["largest_gather_bytes"] <= 64 * 1024 * 4 < everything / 2
  gathered = sum(size for name, size in report["collective_bytes"].items() if name.startswith("all-gather"))
  assert 0 < gathered < 3 * everything


@needs_libtpu
def test_activations_are_not_moved_to_other_devices(report):
  """But for the rows of the embedding table: each device looks up its columns for all, then swaps."""
  moved = ("all-to-all", "collective-permute")
  assert sum(size for name, size in report["collective_bytes"].items() if name.startswith(moved)) < 300_000
  assert all(name.endswith(" fsdp") for name in report["collective_bytes"])


@needs_libtpu
def test_the_report_says_what_a_device_holds_and_what_bounds_it(report):
  memory = report["memory_gib"]
  parts = sum(memory[name] for name in ("parameters", "ema", "optimizer", "batch", "temporaries"))
  assert report["fits"] and memory["total"] == pytest.approx(parts, rel=0.15)  # small arrays are padded
  assert memory["optimizer"] == pytest.approx(2 * memory["ema"], rel=0.01)  # two moments
  assert report["bound"] == max(report["seconds"], key=report["seconds"].get)
  assert report["flops"]["program"] > report["flops"]["model"] > 0
  assert report["executed_flops"] > report["model_flops"] == report["flops"]["model"]


@pytest.mark.parametrize("name, package", [("v5e:2x4", "libtpu"), ("h100:1x8", "CUDA plugin")])
def test_a_compiler_that_is_missing_is_asked_for_in_one_line(monkeypatch, name, package):
  def absent(module: str) -> None:  # as the real one where a package is missing, too
    if "." in module:
      raise ModuleNotFoundError(module)

  monkeypatch.setattr(importlib.util, "find_spec", absent)
  with refused(f"{package}", "pip install"):
    targets.devices(targets.Topology.parse(name))


def test_a_mistake_is_one_line_before_anything_is_compiled():
  command = [
    sys.executable,
    "-m",
    "jflow",
    "compile",
    "--config=configs/stage2.py:tiny",
    "--topology=v5e:4x4",
  ]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [*command, "--config.mesh.fsdp=3"], cwd=tiny.ROOT, capture_output=True, text=True, env=environment
  )
  assert done.returncode == 2 and "Traceback" not in done.stderr
  assert done.stderr == "jflow: mesh.data x mesh.fsdp x mesh.model = 1 x 3 x 1 is not the 16 chips of v5e:4x4\n"


@pytest.mark.parametrize(
  "topology, field", [("v5e:2x4", "--topology"), ("h200:1x8", "--topology"), ("h200:1x1", "--slots=0")]
)
def test_painting_and_answering_are_compiled_for_one_gpu(topology, field):
  given = ["--config=configs/stage3.py:tiny", f"--topology={topology}", "--program=understand"]
  with refused(field):
    compile.main([*given, *([field] if "=" in field else [])])


_COLLECTIVES = """\
HloModule step

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %gather = f32[16,8]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %sum = f32[4,8]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  %alone = f32[4,8]{1,0} all-reduce(%p), channel_id=2, replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %one = f32[2,8]{1,0} all-to-all(%p), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %two = f32[2,8]{1,0} all-to-all(%p), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %out = f32[4,8]{1,0} copy(%sum)
}
"""


def test_collectives_are_counted_once_each():
  """Those that jax wrote share channel 1; one that TPU has cut stands twice; a sum over one device sends nothing."""
  counts = hlo.count(_COLLECTIVES, {"data": 2, "fsdp": 4}, lambda loop: 1.0)
  assert counts.collective_bytes == {
    ("all-gather", "fsdp"): 16 * 8 * 4,
    ("all-reduce", "data"): 4 * 8 * 4,
    ("all-to-all", "fsdp"): 2 * 8 * 4,
  }
  assert counts.largest_gather == 16 * 8 * 4


_IN_PLACE = """\
HloModule step

%sliced (a: f32[64,8]) -> f32[4,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %flat = f32[512]{0} bitcast(%a)
  %cut = f32[32]{0} slice(%flat), slice={[0:32]}
  ROOT %b = f32[4,8]{1,0} bitcast(%cut)
}

%scattered (old: f32[64,8], at: s32[2], new: f32[2,8]) -> f32[64,8] {
  %old = f32[64,8]{1,0} parameter(0)
  %at = s32[2]{0} parameter(1)
  %new = f32[2,8]{1,0} parameter(2)
  ROOT %put = f32[64,8]{1,0} scatter(%old, %at, %new), update_window_dims={1}, to_apply=%second
}

ENTRY %main (x: f32[64,8], i: s32[2], y: f32[2,8]) -> f32[64,8] {
  %x = f32[64,8]{1,0} parameter(0)
  %i = s32[2]{0} parameter(1)
  %y = f32[2,8]{1,0} parameter(2)
  %few = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%sliced
  ROOT %out = f32[64,8]{1,0} fusion(%x, %i, %y), kind=kLoop, calls=%scattered
}
"""


def test_a_buffer_that_is_only_cut_or_written_in_part_counts_in_part():
  """The slice is read and written; of the cache that is scattered into, the new rows are read twice and written."""
  cut, put = 2 * 4 * 8 * 4, 3 * 2 * 8 * 4 + 2 * 4
  assert hlo.count(_IN_PLACE, {}, lambda loop: 1.0).memory_bytes == cut + put
