"""A run whose own files are damaged or missing goes on without loss or is refused untouched; it never begins again."""

import json
import os
import pathlib
import random
import shutil
import sys

import pytest
from refusals import refused
from tools import fuzz_run_files as sample

from jflow.interop import native
from jflow.training import tracking
from jflow.training import workdir as workdirs
from jflow.training.metrics import Lines, read_lines, read_metrics, wrong_metrics

MANIFESTS = [f"checkpoints/{step}/manifest.json" for step in sample.SAVED]
STEPS = [f"checkpoints/{step}" for step in sample.SAVED]
DEEP = b"[" * 100_000


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
  """A run with steps 2, 4 and 6, and metrics up to step 7."""
  workdir = tmp_path_factory.mktemp("made") / "run"
  sample.make_run(workdir)
  return workdir


@pytest.fixture
def run(made, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(made, tmp_path / "run"))


def go_on(run: pathlib.Path) -> int:
  return sample.go_on(run, random.Random(0))


def put(run: pathlib.Path, content: bytes | None, *names: str) -> None:
  """Puts content in the place of files or folders; None removes them."""
  for name in names:
    path = run / name
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path)
    else:
      path.unlink(missing_ok=True)
    if content is not None:
      path.write_bytes(content)


def folder(run: pathlib.Path, name: str) -> None:
  put(run, None, name)
  (run / name).mkdir()


def link(run: pathlib.Path, name: str) -> None:
  put(run, None, name)
  (run / name).symlink_to("nowhere")


def other_config(run: pathlib.Path) -> None:
  config = json.loads((run / "config.json").read_text())
  (run / "config.json").write_text(json.dumps(config | {"train": config["train"] | {"seed": 99}}))


REFUSED = {
  "no manifest": (lambda run: put(run, None, *MANIFESTS), "checkpoints/2 metrics.jsonl"),
  "no manifest, one step": (lambda run: put(run, None, *STEPS[1:], *MANIFESTS[:1]), "checkpoints/2"),
  "no manifest, no metrics": (lambda run: put(run, None, *MANIFESTS, "metrics.jsonl"), "checkpoints/4"),
  "no steps": (lambda run: put(run, None, *STEPS), "metrics.jsonl"),
  "no checkpoints": (lambda run: put(run, None, "checkpoints"), "metrics.jsonl"),
  "no checkpoints, damaged metrics": (
    lambda run: (put(run, None, "checkpoints"), put(run, b"\0" * 90, "metrics.jsonl")),
    "metrics.jsonl",
  ),
  "goodput alone": (lambda run: put(run, None, "checkpoints", "metrics.jsonl", "config.json"), "goodput.jsonl"),
  "steps under other names": (
    lambda run: [(run / name).rename(run / f"checkpoints/old{i}") for i, name in enumerate(STEPS)],
    "old0",
  ),
  "manifests cut": (lambda run: [os.truncate(run / name, 40) for name in MANIFESTS], "checkpoints"),
  "manifests empty": (lambda run: put(run, b"", *MANIFESTS), "checkpoints"),
  "manifests NUL": (lambda run: put(run, b"\0" * 50, *MANIFESTS), "checkpoints"),
  "manifests nested": (lambda run: put(run, DEEP, *MANIFESTS), "checkpoints"),
  "manifests without files": (lambda run: put(run, b'{"files": {}}', *MANIFESTS), "checkpoints"),
  "checkpoints a file": (lambda run: put(run, b"", "checkpoints"), "checkpoints folder"),
  "checkpoints a link to nowhere": (lambda run: link(run, "checkpoints"), "checkpoints folder"),
  "metrics a folder": (lambda run: folder(run, "metrics.jsonl"), "metrics.jsonl"),
  "metrics a pipe": (lambda run: (put(run, None, "metrics.jsonl"), os.mkfifo(run / "metrics.jsonl")), "metrics.jsonl"),
  "config a folder": (lambda run: folder(run, "config.json"), "config.json"),
  "lock a folder": (lambda run: folder(run, "lock"), "lock"),
  "lock a link": (
    lambda run: (put(run, None, "lock"), (run / "lock").symlink_to("config.json")),
    "lock",
  ),
  "another config": (other_config, "train.seed 99 3"),
  "another step's folder": (lambda run: (run / STEPS[2]).rename(run / "checkpoints/8"), "checkpoints/8 6"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_cannot_go_on_is_refused_and_left_as_it_is(run, case):
  harm, said = REFUSED[case]
  harm(run)
  before = sample.snapshot(run)
  for _ in range(2):
    with refused(*said.split()):
      go_on(run)
  after = sample.snapshot(run)
  assert {name: content for name, content in after.items() if name != "lock"} == {
    name: content for name, content in before.items() if name != "lock"
  }


def cut_newest(run: pathlib.Path) -> None:
  path = max((run / STEPS[2]).rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
  path.write_bytes(path.read_bytes()[:-1])


def foreign(run: pathlib.Path, name: str) -> None:
  (run / "checkpoints" / name).mkdir()
  (run / "checkpoints" / name / "notes").write_text("mine")


GOES_ON = {
  "untouched": (lambda run: None, 6, ""),
  "no metrics": (lambda run: put(run, None, "metrics.jsonl"), 6, ""),
  "no config.json": (lambda run: put(run, None, "config.json"), 6, "is missing; the run's config is taken"),
  "config.json cut": (lambda run: os.truncate(run / "config.json", 99), 6, "config.json cannot be read"),
  "config.json a list": (lambda run: put(run, b"[]", "config.json"), 6, "config.json cannot be read"),
  "config.json nested": (lambda run: put(run, DEEP, "config.json"), 6, "config.json cannot be read"),
  "config.json no UTF-8": (lambda run: put(run, b'{"a": "\xff"}', "config.json"), 6, "config.json cannot be read"),
  "no config.json, no metrics": (lambda run: put(run, None, "config.json", "metrics.jsonl"), 6, "is missing"),
  "no tokenizer": (lambda run: put(run, None, "tokenizer"), 6, "written again"),
  "tokenizer cut": (lambda run: os.truncate(run / "tokenizer/tokenizer.json", 99), 6, "written again"),
  "newest without manifest": (lambda run: put(run, None, MANIFESTS[2]), 4, "6 is not used"),
  "newest manifest of another type": (lambda run: put(run, b"42", MANIFESTS[2]), 4, "6 is not used"),
  "newest cut": (cut_newest, 4, "6 is not used"),
  "newest a file": (lambda run: put(run, b"", STEPS[2]), 4, ""),
  "newest a link to nowhere": (lambda run: link(run, STEPS[2]), 4, ""),
  "two damaged": (lambda run: put(run, b"{", *MANIFESTS[1:]), 2, "4 is not used"),
  "goodput no lines": (lambda run: put(run, b"\xff\0[]\n42\n", "goodput.jsonl"), 6, "goodput.jsonl: line 1 is damaged"),
  "no goodput": (lambda run: put(run, None, "goodput.jsonl", "goodput.json"), 6, ""),
  "lock no UTF-8": (lambda run: put(run, b"\xff\xfe\0" * 900, "lock"), 6, "did not end in order"),
  "no lock": (lambda run: put(run, None, "lock"), 6, ""),
  "folders of others": (lambda run: [foreign(run, name) for name in ("٣", "²", "007", "9" * 30, "3", "best")], 6, ""),
}


@pytest.mark.parametrize("case", GOES_ON)
def test_a_run_goes_on_and_loses_nothing_that_is_whole(run, case, capsys):
  harm, step, said = GOES_ON[case]
  harm(run)
  before = sample.snapshot(run)
  lines = sample.whole_lines(run)
  assert go_on(run) == step
  assert said in capsys.readouterr().err
  after = sample.snapshot(run)
  for name, content in before.items():
    assert not name.startswith("checkpoints/") or content in after.values(), name
  steps = [row["step"] for row in read_metrics(run)]
  assert len(set(steps)) == len(steps)
  assert all(n in steps for n in lines if n <= step)
  kept = "".join(p.read_text() for p in run.glob("metrics.jsonl*"))
  assert all(line in kept for line in lines.values())
  if case in ("config.json cut", "no tokenizer"):  # what was mended is not said again
    capsys.readouterr()
    go_on(run)
    assert capsys.readouterr().err == ""


# --- lines of metrics -----------------------------------------------------------------------------------------


def rows(count: int) -> list[bytes]:
  return [json.dumps({"step": step, "loss": 0.1 * step}).encode() for step in range(1, count + 1)]


def line(number: int, text: bytes):
  return lambda lines: [*lines[: number - 1], text, *lines[number:]]


LINES = {  # harm to lines 1 to 6 -> steps that are read, whether damage is said and kept
  "none": (lambda lines: lines, [1, 2, 3, 4, 5, 6], False),
  "a semicolon": (line(4, b'{"step"; 4}'), [1, 2, 3, 5, 6], True),
  "no UTF-8": (line(2, b'{"step": 2, "x": "\xff\xfe"}'), [1, 3, 4, 5, 6], True),
  "a number": (line(6, b"42"), [1, 2, 3, 4, 5], True),
  "a list": (line(1, b"[1, 2]"), [2, 3, 4, 5, 6], True),
  "null": (line(3, b"null"), [1, 2, 4, 5, 6], True),
  "no step": (line(3, b'{"loss": 1.0}'), [1, 2, 4, 5, 6], True),
  "a negative step": (line(3, b'{"step": -3}'), [1, 2, 4, 5, 6], True),
  "a huge step": (line(3, b'{"step": 9999999999}'), [1, 2, 4, 5, 6], True),
  "a step of text": (line(3, b'{"step": "3"}'), [1, 2, 4, 5, 6], True),
  "a step that is true": (line(3, b'{"step": true}'), [1, 2, 4, 5, 6], True),
  "a step that is no number": (line(3, b'{"step": NaN}'), [1, 2, 4, 5, 6], True),
  "a loss of text": (line(3, b'{"step": 3, "loss": "x"}'), [1, 2, 4, 5, 6], True),
  "nested": (line(3, DEEP), [1, 2, 4, 5, 6], True),
  "NUL alone": (line(3, b"\0" * 40), [1, 2, 4, 5, 6], True),
  "NUL in front": (lambda lines: [*lines[:3], b"\0" * 9 + lines[3], *lines[4:]], [1, 2, 3, 4, 5, 6], False),
  "a blank": (lambda lines: [*lines[:3], b"", *lines[3:]], [1, 2, 3, 4, 5, 6], False),
  "CRLF": (lambda lines: [text + b"\r" for text in lines], [1, 2, 3, 4, 5, 6], False),
  "a mark in front": (line(1, b"\xef\xbb\xbf" + rows(1)[0]), [1, 2, 3, 4, 5, 6], False),
  "twice": (lambda lines: [*lines[:4], *lines[2:]], [1, 2, 3, 4, 5, 6], False),
  "twice, the last counts": (lambda lines: [*lines, b'{"step": 5, "loss": 7.0}'], [1, 2, 3, 4, 6, 5], False),
}


@pytest.mark.parametrize("case", LINES)
@pytest.mark.parametrize("tail", [b"", b'{"step": 7, "lo', b'{"step": 7, "x": "\xff', b"\0\0"])
def test_a_damaged_line_costs_that_line_alone(tmp_path, case, tail, capsys):
  """Of one that a kill or a power cut has left without its end, nothing is said."""
  harm, steps, damaged = LINES[case]
  path = tmp_path / "metrics.jsonl"
  content = b"".join(text + b"\n" for text in harm(rows(6))) + tail
  path.write_bytes(content)
  assert [row["step"] for row in read_metrics(tmp_path)] == steps
  assert ("is damaged" in capsys.readouterr().err) == damaged
  assert path.read_bytes() == content  # reading changes nothing
  lines = Lines(path, 6)
  lines.write({"step": 6, "loss": 1.0})
  lines.close()
  assert [row["step"] for row in read_metrics(tmp_path)] == [*(s for s in steps if s < 6), 6]
  assert ("is damaged" in capsys.readouterr().err) == damaged
  assert [p.read_bytes() for p in tmp_path.glob("metrics.jsonl.damaged")] == [content] * damaged
  if case == "twice, the last counts":
    assert read_metrics(tmp_path)[4]["loss"] == 7.0


def test_a_damaged_line_is_named_by_its_number(tmp_path, capsys):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b"\n".join((*rows(3), b"nonsense", b"[]", b"")))
  assert len(read_lines(path, wrong_metrics)) == 3
  assert "metrics.jsonl: line 4 is damaged (" in capsys.readouterr().err
  Lines(path, 9).close()
  Lines(path, 9).close()
  assert capsys.readouterr().err.count("kept in metrics.jsonl.damaged") == 1


def test_of_a_step_that_is_passed_over_the_later_lines_are_kept(run):
  put(run, None, MANIFESTS[2])
  before = (run / "metrics.jsonl").read_bytes()
  assert go_on(run) == 4
  assert (run / "metrics.jsonl.replaced").read_bytes() == before


# --- beginnings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interrupted", ["before the first save", "in the first save"])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path, interrupted):
  def begin() -> None:
    held = workdirs.claim(tmp_path, sample.configuration(), sample.tokenizer())
    assert sample.open_checkpoints(tmp_path).restore(sample.abstract()) is None
    workdirs.write_config(tmp_path, sample.configuration(), sample.tokenizer())
    lines = Lines(tmp_path / "metrics.jsonl", 1)
    for step in range(1, 5):
      lines.write(sample.line(step))
    lines.close()
    held.close()  # as a kill does

  begin()
  if interrupted == "in the first save":
    checkpointer = sample.open_checkpoints(tmp_path)
    checkpointer.save(sample.state(4))
    checkpointer.wait()
    (tmp_path / "checkpoints" / "4" / "manifest.json").unlink()
    (tmp_path / "checkpoints" / "4.unfinished").write_text("")  # written before the folder, removed after the manifest
    (tmp_path / "unsaved").write_text("")
  begin()
  assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"two words", b"x" * 900, b"../../etc"])
def test_a_damaged_name_of_a_tracked_run_is_made_anew(tmp_path, content, monkeypatch, capsys):
  class Wandb:
    @staticmethod
    def init(**options):
      names.append(options["id"])

  names = []
  monkeypatch.setitem(sys.modules, "wandb", Wandb)
  (tmp_path / "wandb_id").write_bytes(content)
  for _ in range(2):
    tracking.WeightsAndBiases(tmp_path, "project", {})
  assert names[0] == names[1] and len(names[0]) == 32
  assert capsys.readouterr().err.count("wandb_id is damaged") == 1


def test_inference_reads_what_is_whole(run):
  put(run, None, MANIFESTS[2])
  assert native.resolve(run)[1].name == "4"
  (run / "checkpoints" / "notes").mkdir()
  for name in ("²", "007"):
    (run / "checkpoints" / name).mkdir()
    with refused(f"checkpoints/{name}"):
      native.resolve(run)
    with refused(name):
      native.resolve(run / "checkpoints" / name)
    assert native.resolve(run / "checkpoints" / "4")[1].name == "4"
    (run / "checkpoints" / name).rmdir()
  assert native.resolve(run)[1].name == "4"
