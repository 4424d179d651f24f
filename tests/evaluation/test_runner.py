"""A benchmark that is one file outside of jflow: found by its path, run, refused and resumed as any other."""

import json
import pathlib

import pytest

from jflow.__main__ import main
from jflow.errors import UserError
from jflow.evaluation import benchmarks

TOY = pathlib.Path(__file__).parent / "toy_benchmark.py"


@pytest.fixture(autouse=True)
def known(monkeypatch):
  """The table of benchmarks is as before once a test ends."""
  monkeypatch.setattr(benchmarks, "_KNOWN", dict(benchmarks._KNOWN))


def test_a_benchmark_of_one_file_is_asked_scored_and_reported(tiny_checkpoint, tmp_path, capsys):
  flags = [f"--benchmark={TOY}", f"--checkpoint={tiny_checkpoint}", f"--output={tmp_path}", "--batch_size=2"]
  assert main(["evaluate", *flags]) == 0
  body = json.loads((tmp_path / "report.json").read_text())
  records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
  assert sorted(record["key"] for record in records) == ["blue", "green", "red"]
  right = sum(record["answer"].strip(" .").lower() == record["key"] for record in records)
  assert body["scores"]["overall"]["value"] == pytest.approx(100 * right / 3)
  assert body["settings"]["prompt"].startswith("<image>QUESTION") and body["settings"]["max_tokens"] == 4
  assert main(["evaluate", *flags, "--limit=2"]) == 2  # another evaluation than the one on disk
  assert main(["evaluate", *flags, "--split=val"]) == 2
  assert "--split=val does not belong to --benchmark=colors, but to records, vqav2" in capsys.readouterr().err
  assert main(["evaluate", *flags, "--sweep_steps=2"]) == 2  # it paints nothing


REGISTERED = "from jflow.evaluation import benchmarks\nbenchmarks.register({})\n"
TEXTS = [
  "",
  "1 / 0",
  "import no_such_module",
  "from jflow.nowhere import x",
  "(",
  "raise SystemExit(0)",
  "raise ValueError('two\\nlines')",
  REGISTERED.format("3"),
  REGISTERED.format("type('X', (), {'name': 'x'})"),
  REGISTERED.format("benchmarks.Benchmark"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_file_without_a_benchmark_is_refused_by_its_name(text, tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(text)
  with pytest.raises(UserError) as error:
    benchmarks.get(str(path))
  assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_may_define_dataclasses(tmp_path):
  lines = ["from __future__ import annotations", "import dataclasses", "@dataclasses.dataclass", "class A:", "  x: int"]
  path = tmp_path / "mine.py"
  path.write_text("\n".join([*lines, TOY.read_text()]))
  assert benchmarks.get(str(path)).name == "colors"


def test_a_name_that_is_unknown_is_told_the_known_ones():
  with pytest.raises(UserError) as error:
    benchmarks.get("pop")
  assert "pop " in str(error.value) and "pope" in str(error.value)
  with pytest.raises(UserError):
    benchmarks.get("no/such.py")
