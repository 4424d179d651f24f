"""The questions about speed as a user asks them, on a CPU with a tiny model: each answer at once, and never twice."""

import json
import os
import re
import subprocess
import sys
import tarfile

import pytest
import tiny

SCRIPT = tiny.ROOT / "launch" / "experiments" / "speed.py"
sys.path.insert(0, str(SCRIPT.parent))
import speed

ASKED = ("attention-cudnn", "tests-attention", "products")


def ask(folder, *flags: str) -> tuple[int, list[dict]]:
  """The exit code, and the lines of the results."""
  command = [sys.executable, str(SCRIPT), str(folder), "--size=tiny", f"--questions={','.join(ASKED)}", *flags]
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tiny.ROOT)}
  done = subprocess.run(command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True)
  assert "Traceback" not in done.stderr, done.stderr
  lines = (folder / "results.jsonl").read_text().splitlines()
  return done.returncode, [json.loads(line) for line in lines if line.endswith("}")]


def test_answers_are_kept_and_open_questions_asked_again(tmp_path):
  """The first run is too short for any answer, and a crash has cut a line."""
  code, rows = ask(tmp_path, "--cap=0.2")
  assert code == 1 and [row["failed"].startswith("stopped after 0 s") for row in rows] == [True] * 3
  with (tmp_path / "results.jsonl").open("a") as file:
    file.write('{"question": "products", "report": \n')
  code, rows = ask(tmp_path, "--seconds=900", "--cap=300")
  assert code == 1 and [row["question"] for row in rows[3:]] == list(ASKED)
  attention, products = (row["report"] for row in (rows[3], rows[5]))
  assert products["bfloat16_mlp"]["flops_per_second"] > 0
  assert attention["xla"]["leaks"] is None and attention["cudnn:8"] == {"skipped": "does not run on cpu"}
  assert rows[4]["failed"].startswith("no test ran: ")  # without a GPU all are skipped, which answers nothing
  copied = tmp_path / "copied"
  (tmp_path / "results.md").unlink()
  assert ask(tmp_path, "--questions=products", f"--copy={copied}") == (0, rows)
  assert (copied / "results.jsonl").read_text() == (tmp_path / "results.jsonl").read_text()
  with tarfile.open(copied / "logs.tar.gz") as tar:
    assert set(tar.getnames()) == {f"{name}.log" for name in ASKED}


def test_the_first_question_gets_what_time_there_is(tmp_path):
  code, rows = ask(tmp_path, "--questions=products", "--seconds=0.2")
  assert code == 1 and rows[0]["failed"].startswith("stopped after 0 s")
  assert len(ask(tmp_path, "--seconds=0.3")[1]) == 2  # one more, and none behind it


@pytest.mark.parametrize("flags", [("--cap=0",), ("--seconds=-1",), ("--questions=product",)])
def test_what_cannot_be_asked_is_refused(tmp_path, capsys, flags):
  with pytest.raises(SystemExit):
    speed.main([str(tmp_path), *flags])
  assert flags[0].split("=")[0] in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_commands_of_its_help_are_right(tmp_path):
  command = re.search(r"speed.py (runs/speed --size=.*?)  #", speed.__doc__)[1].strip().split()
  assert speed.main([str(tmp_path), *command[1:], "--list"]) == 0


def test_a_question_is_begun_where_its_cap_is_left(tmp_path, monkeypatch, capsys):
  """Then it is answered or at its cap, and shorter ones behind it use what a longer one cannot."""
  clock, asked = [0.0], []

  def answer(question, folder, cap):
    asked.append(question.name)
    clock[0] += question.cap - 20
    return {"question": question.name, "seconds": 1.0, "report": {"workload": "products"}}

  monkeypatch.setattr(speed, "ask", answer)
  monkeypatch.setattr(speed.time, "monotonic", lambda: clock[0])
  assert speed.main([str(tmp_path)]) == 1
  first = ["attention-cudnn", "step-8-none-cudnn", "tests-attention", "products"]
  assert asked == [*first, "attention-packed"]
  assert [json.loads(line)["question"] for line in capsys.readouterr().out.splitlines()] == asked


def test_the_table_holds_steps_and_loops():
  """A loop of codes has seconds of its own, one that reads has tokens a second; what a CPU lacks is left open."""
  seconds = {"min": 0.01, "median": 0.02, "max": 0.03}
  reports = {
    "step": dict(workload="train", seconds_per_step=seconds, tokens_per_second=800.0, mfu=None, peak_bytes=2**31)
    | dict(rows=4, pictures_per_step=23, learned_tokens_per_step=990, loss=1.5),
    "codes-16": dict(workload="generate", pictures=16, seconds_per_step=seconds, images_per_second=1.5, mfu=None),
    "read-2": dict(workload="understand", answers=2, tokens_per_second=40.0, bandwidth_share=0.5),
    "products": dict(workload="products"),
  }
  rows = [{"question": name, "report": {"compile_seconds": 3.0} | report} for name, report in reports.items()]
  cells = [line.split("|")[1:-1] for line in speed.table(rows).splitlines()]
  found = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells if row and row[0].strip() in reports}
  assert found == {
    "step": ["4", "23", "990", "1.5000", "0.020", "800", "", "2.0", "3"],
    "codes-16": ["1.50", "", "20.00", "", ""],
    "read-2": ["", "40", "50.00", "", "50%"],
  }


def test_every_question_is_a_command_of_bench():
  """For models of the paper's size and for small ones; fp8 and codes are among them."""
  for size in ("384", "tiny"):
    asked = speed.questions(size)
    assert len({question.name for question in asked}) == len(asked)
    commands = [" ".join(question.command) for question in asked]
    assert sum("matmul=fp8" in command for command in commands) == 1
    assert sum("--config=janus/stage3:" in command for command in commands) == 3
