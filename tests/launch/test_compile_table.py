"""The table of steps compiled ahead of time: it goes on where it was, and what is published is what it writes."""

import json
import sys
import types

import pytest
import tiny

sys.path.insert(0, str(tiny.ROOT / "launch" / "experiments"))
import compile_table as table

_TABLE = tiny.ROOT / "launch" / "experiments" / "results" / "compile_table"


def test_a_table_goes_on_where_it_was(monkeypatch, tmp_path):
  """A row that is there is kept, what failed is tried again, and the file is whole after every row."""
  asked, wrong = [], {"h100:1x8"}

  def compiled(config: str, topology: str, rows: int) -> dict:
    asked.append(topology)
    memory = {"total": 2.0, "limit": 1.0}
    return {"topology": topology} | ({"error": "?"} if topology in wrong else {"fits": False, "memory_gib": memory})

  monkeypatch.setattr(table, "ROWS", (("h100:2x8", 4), ("v5e:2x4", 1), ("h100:1x8", 4)))
  monkeypatch.setattr(table, "compiled", compiled)
  assert table.write_table(tmp_path / "all") == 1
  assert asked == ["h100:2x8", "v5e:2x4", "h100:1x8"]
  wrong.clear()
  assert table.write_table(tmp_path / "all") == 0 and asked[3:] == ["h100:1x8"]
  written = json.loads((tmp_path / "all.json").read_text())
  assert [report["topology"] for report in written] == ["v5e:2x4", "h100:1x8", "h100:2x8"]  # by kind and size
  assert (tmp_path / "all.md").read_text().count("\n") == 2 + 3


def test_what_fits_is_asked_by_rows_and_what_is_kept(monkeypatch, tmp_path):
  """And said for both sizes of a device; without a loop over layers where everything is kept."""
  asked = []

  def compiled(config: str, topology: str, rows: int, *fields: str) -> dict:
    asked.append((topology, rows, *fields))
    if len(asked) == 2:
      return {"topology": topology, "error": "?"}
    return {"memory_gib": {"total": 20.0 * rows}, "executed_flops": 2e12, "seconds_by_launch": 0.1 * rows}

  monkeypatch.setattr(table, "FITS", (("full", 2), ("full", 4), ("none", 4)))
  monkeypatch.setattr(table, "compiled", compiled)
  assert table.write_fits(tmp_path / "fits", "stage2:tiny") == 1
  assert [one[:3] for one in asked[:2]] == [("h200:1x1", rows, "--config.compute.remat=full") for rows in (2, 4)]
  assert asked[2][2:] == ("--config.compute.remat=none", "--config.compute.unroll=4")
  assert table.write_fits(tmp_path / "fits", "stage2:tiny") == 0 and asked[3] == asked[1]
  rows = [line.split("|")[1:-1] for line in (tmp_path / "fits.md").read_text().splitlines()[2:]]
  assert [[cell.strip() for cell in row] for row in rows] == [
    ["full", "2", "40.0", "2", "400", "yes", "yes"],
    ["full", "4", "80.0", "2", "400", "no", "yes"],
    ["none", "4", "80.0", "2", "400", "no", "yes"],
  ]


def test_a_row_of_the_table_names_the_attention_that_it_was_made_with(monkeypatch):
  commands = []
  failed = types.SimpleNamespace(stderr="")
  monkeypatch.setattr(table.subprocess, "run", lambda command, **_: commands.append(command) or failed)
  for topology in ("h100:1x8", "v5e:2x4"):
    assert "error" in table.compiled("configs/stage2.py", topology, 1)
  assert ["--config.compute.attention=cudnn" in command for command in commands] == [True, False]
  assert "--config.compute.attention=splash" in commands[1]


def test_the_table_of_the_readme_shows_that_the_cost_per_chip_does_not_grow():
  """For every kind of chip: bytes of collectives within 10 % from 16 to 256 chips, and everything fits."""
  reports = {report["topology"]: report for report in json.loads((_TABLE.with_suffix(".json")).read_text())}
  assert all(report["fits"] for report in reports.values())
  for small, large in (
    ("v5e:4x4", "v5e:16x16"),
    ("v5p:2x2x4", "v5p:4x8x8"),
    ("v6e:4x4", "v6e:16x16"),
    ("h100:2x8", "h100:32x8"),
  ):
    assert (reports[small]["chips"], reports[large]["chips"]) == (16, 256)
    sent = [sum(reports[name]["collective_bytes"].values()) for name in (small, large)]
    assert sent[1] == pytest.approx(sent[0], rel=0.1)
  written = (_TABLE.with_suffix(".md")).read_text()
  assert written == table.markdown(list(reports.values()))
  assert written in (tiny.ROOT / "jflow" / "perf" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["compile_table_janus_1b", "compile_table_janus_7b"])
def test_the_tables_of_janus_are_what_their_files_say(name):
  file = _TABLE.with_name(name)
  reports = json.loads(file.with_suffix(".json").read_text())
  assert all(report["fits"] and report["config"].startswith("janus/stage2:") for report in reports)
  sent = {report["topology"]: report["collective_bytes_total"] for report in reports}
  assert sent["h100:32x8"] == pytest.approx(sent["h100:2x8"], rel=0.1)
  written = file.with_suffix(".md").read_text()
  assert written == table.markdown(reports)
  assert written in (tiny.ROOT / "jflow" / "perf" / "README.md").read_text(encoding="utf-8")
