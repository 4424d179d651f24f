"""bench data: the report is there, counts what it says, and its plans fill the rows."""

import json

import pytest
from refusals import refused

from jflow.batch import RowShape
from jflow.cli import bench as command
from jflow.data import mixture
from jflow.perf import planning, reads
from jflow.training import config_files

SHAPE = RowShape(tokens=4096, images=7, image_patches=576, image_size=384, writer="flow")
TINY = "--config=stage2:tiny"


def test_the_report_compares_loop_and_pipeline_on_the_same_pictures(tmp_path, capsys):
  path = tmp_path / "deep" / "report.json"
  arguments = ["data", TINY, "--pictures=6", "--repeats=2", "--threads=1", f"--json={path}"]
  assert command.main(arguments) == 0
  report = json.loads(path.read_text())
  assert (report["workload"], report["image_size"], report["row_tokens"], report["threads"]) == (
    "data",
    32,
    128,
    1,
  )
  for task in ("understanding", "generation"):
    found = report[task]
    loop, ours = (found["seconds"][name]["median"] for name in ("loop", "pipeline"))
    assert found["ratio"] == pytest.approx(ours / loop)
    assert found["images_per_cpu_second"] * ours == pytest.approx(found["loop_images_per_cpu_second"] * loop)
    assert found["rows_per_cpu_second"] > 0
  assert "understanding" in capsys.readouterr().out


def test_planning_of_realistic_lengths_fills_the_rows():
  found = planning.measure(20_000, SHAPE, 0)
  for task, least in (("understanding", 0.97), ("generation", 0.95), ("text", 0.99)):
    assert least < found[task]["fill"] <= 1
    assert found[task]["rows"] >= planning.realistic_lengths(task, 20_000, SHAPE)[:, 0].sum() / 4096


@pytest.mark.parametrize("flag", ["--pictures=0", "--repeats=0", "--threads=-1"])
def test_numbers_below_1_are_refused(flag):
  with refused(flag):
    command.main(["data", TINY, flag])


def test_blocks_read_fewer_shards_of_the_same_batches():
  """Of a host for each lane: a shard comes once in an epoch, whatever else the host reads, and no sooner."""
  data = config_files.load("stage2").data
  sizes = dict(understanding=0, generation=60_000, text=0)
  found = {
    order: reads.count(data.replace(order=order, block_lanes=4), sizes, SHAPE, 64, 4, 40, 2.0**40)
    for order in ("global", "blocks")
  }
  rows = sum(mixture.rows_of_steps((0, 1, 0), 64, 40)[:, 1])
  for one in found.values():
    assert one["records"] * 4 * 40 == pytest.approx(6 * rows, rel=0.01)
    assert one["requests"] <= one["shards"] <= one["records"]
    assert one["fetched_bytes"] == one["requests"] * reads.RECORD_BYTES["generation"] * planning.SHARD
    assert one["cache_bytes"] <= one["fetched_bytes"] * 40 * 4
  assert found["blocks"]["requests"] * 40 * 4 < 0.6 * found["global"]["requests"] * 40 * 4
  assert found["blocks"]["shards_of_step"] < found["global"]["shards_of_step"] <= 15
