"""The questions about speed as a user asks them, on a CPU with a tiny model: each answer at once, and never twice."""

import json
import os
import subprocess
import sys

import tiny

SCRIPT = tiny.ROOT / "launch" / "experiments" / "speed.py"


def ask(folder, *flags: str) -> tuple[int, list[dict]]:
  """The exit code, and the lines of the results."""
  command = [sys.executable, str(SCRIPT), str(folder), "--size=tiny", "--questions=products,attention", *flags]
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tiny.ROOT)}
  done = subprocess.run(command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True)
  assert "Traceback" not in done.stderr, done.stderr
  lines = (folder / "results.jsonl").read_text().splitlines()
  return done.returncode, [json.loads(line) for line in lines if line.endswith("}")]


def test_answers_are_kept_and_open_questions_asked_again(tmp_path):
  """The first run is too short for any answer, and a crash has cut a line."""
  code, rows = ask(tmp_path, "--cap=0.2")
  assert code == 1 and [row["failed"].startswith("stopped after 0 s") for row in rows] == [True, True]
  with (tmp_path / "results.jsonl").open("a") as file:
    file.write('{"question": "products", "report": \n')
  code, rows = ask(tmp_path, "--seconds=600", "--cap=300")
  assert code == 0 and [row["question"] for row in rows[2:]] == ["products", "attention"]
  products, attention = (row["report"] for row in rows[2:])
  assert products["bfloat16_mlp"]["flops_per_second"] > 0
  assert attention["xla"]["leaks"] is False and attention["packed"] == {"skipped": "does not run on cpu"}
  assert ask(tmp_path) == (0, rows)
