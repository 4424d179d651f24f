"""bench data: the report is there, counts what it says, and its plans fill the rows."""

import json

import pytest
from refusals import refused

from jflow.batch import RowShape
from jflow.cli import bench as command
from jflow.perf import planning

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
