"""An import on Apache Beam is that of one machine, where its extra is installed; without it one line names the
extra."""

import importlib.util
import pathlib
import sys
import types

import pytest
from preparing import chat, make_folder, run, write_lines
from refusals import refused

from jflow.data.filters import Filters

THERE = importlib.util.find_spec("apache_beam") is not None
RUNNER = "--runner=BundleBasedDirectRunner --no_pipeline_type_check"


def contents(output):
  return {path.name: path.read_bytes() for path in sorted(pathlib.Path(output).iterdir()) if path.is_file()}


@pytest.fixture
def folder(tmp_path):
  folder = make_folder(tmp_path / "in")
  write_lines(folder / "more.jsonl", [chat("pictures/none.png"), chat("pictures/3.png", answer="Number 3, né.")])
  return folder


@pytest.mark.skipif(THERE, reason="Apache Beam is installed")
def test_the_missing_extra_is_named(folder):
  with refused("apache_beam", "[beam]"):
    run(folder, beam="")


@pytest.mark.skipif(not THERE, reason="Apache Beam is not installed")
def test_records_order_and_fingerprint_are_those_of_one_machine(folder):
  options = dict(part_records=2, max_rejected_share=0.5, filters=Filters(duplicates="exact"), name="")
  whole, one = run(folder, **options)
  beam, many = run(folder, output=str(folder.parent / "many"), beam=RUNNER, **options)
  assert beam == whole and contents(many) == contents(one) and whole["filtered"] == {"duplicate": 1}


@pytest.mark.skipif(not THERE, reason="Apache Beam is not installed")
def test_a_fault_is_tried_again_and_what_stays_is_one_line_and_goes_on(folder, monkeypatch):
  faults, seen = ["r1"] * 2 + ["r4"] * 99, []

  def failing(record, meta):
    seen.append(record.id)
    if record.id in faults:
      faults.remove(record.id)
      raise ValueError(f"no {record.id}")
    return True

  monkeypatch.setitem(sys.modules, "filters_of_mine", types.SimpleNamespace(failing=failing))
  options = dict(part_records=2, filters=Filters(filter=("filters_of_mine:failing",)), beam=RUNNER)
  with refused("filters_of_mine:failing", "no r4", "go on"):
    run(folder, **options)
  faults.clear()
  seen.clear()
  summary, output = run(folder, **options)
  assert summary["accepted"] == 12 and len(seen) < 12
  assert sorted(path.name for path in folder.parent.iterdir()) == ["in", "out"]


@pytest.mark.skipif(not THERE, reason="Apache Beam is not installed")
def test_a_flag_that_is_none_of_beams_is_named(folder):
  with refused("--beam"):
    run(folder, beam="--direct_num_workers=many")
