"""Ten minutes on one GPU: the questions about speed in the order of their worth, each in a process of its own.

  python launch/experiments/speed.py runs/speed                     # 470 seconds at most; the same command goes on
  python launch/experiments/speed.py runs/speed --seconds=3600      # all of it
  python launch/experiments/speed.py runs/speed --size=tiny --questions products,attention   # anywhere
  python launch/experiments/speed.py runs/speed --list              # the questions, their caps and commands

Each answer is one line of FOLDER/results.jsonl, written as soon as it is there, and a question with an answer is not
asked again; one that failed or ran past its cap is asked again by the next run. All share FOLDER/cache, the cache of
compiled programs, so keep it: a second start takes seconds. Beside jflow the GPU needs these wheels, and for --versus
the last two: jax-cuda13-plugin, jax-cuda13-pjrt, nvidia's libraries that they ask for (pip download
"jax[cuda13]"), ml-collections, array-record, grain; torch, diffusers.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

from jflow import outputs

SECONDS = 470.0  # of a command with ten minutes, with time left to fetch the results
_WORKER = "tests/parity/torch_worker.py"


class Question(NamedTuple):
  """A question, as a measurement with a cap in seconds."""

  name: str
  cap: float
  command: tuple[str, ...]  # words behind `python -m jflow bench`
  decides: str


def questions(size: str) -> list[Question]:
  """The questions for models of a size, first the one that decides most."""
  stage2, stage3 = f"stage2:{size}", f"stage3:{size}"
  codes = f"janus/stage3:{'1b' if size in ('384', '256') else size}"

  def step(rows: int, *fields: str) -> tuple[str, ...]:
    fields = tuple(f"config.compute.{field}" for field in fields)
    return ("train", f"--config={stage2}", f"--rows={rows}", "--steps=8", "--no-parts", "--fields", *fields)

  everything = ("remat=none", "unroll=24") if size in ("384", "256") else ("remat=none",)
  ask = Question
  return [
    ask("products", 25, ("products", f"--config={stage2}"), "the rate that the model of a step is scaled by; fp8"),
    ask("attention", 75, ("attention", f"--config={stage2}"), "which kernel is right, and its share; `kernels.AUTO`"),
    ask("step-4-full-cudnn", 80, step(4, "remat=full", "attention=cudnn"), "the table of segments inside the step"),
    ask("step-4-none-cudnn", 140, step(4, *everything, "attention=cudnn"), "no recompute, no loop over layers"),
    ask("step-8-none-cudnn", 150, step(8, *everything, "attention=cudnn"), "the headline"),
    ask("step-8-none-cudnn-fp8", 170, step(8, *everything, "attention=cudnn", "matmul=fp8"), "products in 8 bits"),
    ask("step-8-none-packed", 150, step(8, *everything, "attention=packed"), "our own kernel inside the step"),
    ask("step-8-auto", 150, step(8, "remat=auto"), "what a user gets"),
    ask("parts", 120, ("train", f"--config={stage2}", "--rows=4", "--steps=8"), "each part alone"),
    ask("step-4-save-cudnn", 110, step(4, "remat=save:query,key,value,attended,gate,up", "attention=cudnn"), "80 GB"),
    ask("paint-16", 120, ("generate", f"--config={stage3}", "--batch_size=16", "--repeats=2"), "pictures a second"),
    ask(
      "codes-1", 90, ("generate", f"--config={codes}", "--batch_size=1", "--repeats=2"), "codes: share of the memory"
    ),
    ask("codes-16", 120, ("generate", f"--config={codes}", "--batch_size=16", "--repeats=2"), "the same, 16 pictures"),
    ask("codes-64", 150, ("generate", f"--config={codes}", "--batch_size=64", "--repeats=2"), "the same, 64 pictures"),
    ask("read-1", 90, ("understand", f"--config={stage3}", "--new_tokens=256", "--repeats=2"), "tokens a second"),
    ask("read-16", 120, ("understand", f"--config={stage3}", "--batch_size=16", "--repeats=2"), "the same, 16 rows"),
    ask(
      "paint-16-torch",
      300,
      ("generate", f"--config={stage3}", "--batch_size=16", "--repeats=2", f"--versus={_WORKER}"),
      "ratios",
    ),
    ask(
      "read-16-torch",
      300,
      ("understand", f"--config={stage3}", "--batch_size=16", "--repeats=2", f"--versus={_WORKER}"),
      "ratios",
    ),
  ]


def answered(file: pathlib.Path) -> dict[str, dict[str, Any]]:
  """The answers of earlier runs by question; a line cut short by a crash is left out."""
  found = {}
  for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
    try:
      row = json.loads(line)
    except ValueError:
      continue
    if "report" in row:
      found[row["question"]] = row
  return found


def ask(question: Question, folder: pathlib.Path, cap: float) -> dict[str, Any]:
  """Runs a question for at most `cap` seconds; returns its line."""
  report = folder / f"{question.name}.json"
  report.unlink(missing_ok=True)
  command = [sys.executable, "-m", "jflow", "bench", question.command[0], f"--json={report}", *question.command[1:]]
  environment = {
    "JAX_COMPILATION_CACHE_DIR": str((folder / "cache").absolute()),
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "all",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
  }
  started, log = time.monotonic(), folder / f"{question.name}.log"
  with log.open("w", encoding="utf-8") as file:  # `timeout` also ends a child whose parent was killed
    limited = ["timeout", "--signal=KILL", f"{cap:.1f}", *command]
    child = subprocess.Popen(limited, stdout=file, stderr=file, env=environment | os.environ, start_new_session=True)
    try:
      code = child.wait()
    finally:
      if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)  # and whatever it started
        child.wait()
  why = f"stopped after {cap:.0f} s" if time.monotonic() - started >= cap else f"exit code {code}"
  row: dict[str, Any] = {"question": question.name, "seconds": round(time.monotonic() - started, 1)}
  if report.exists():
    return row | {"report": json.loads(report.read_text(encoding="utf-8"))}
  last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or [""]
  return row | {"failed": f"{why}: {last[0][:300]}"}


def main(argv: list[str]) -> int:
  """Asks what has no answer yet, within the time; returns 1 where a question is left open."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--seconds", type=float, default=SECONDS, help="for all questions (default %(default)s)")
  parser.add_argument("--size", default="384", help="of the configs (default %(default)s)")
  parser.add_argument("--questions", default="", help="names, comma-separated (default: all)")
  parser.add_argument("--cap", type=float, help="seconds of each question, in place of its own cap")
  parser.add_argument("--list", action="store_true")
  args = parser.parse_args(argv)
  chosen = questions(args.size)
  if args.questions:
    wanted = args.questions.split(",")
    if unknown := set(wanted) - {question.name for question in chosen}:
      parser.error(f"--questions: {', '.join(sorted(unknown))} must be among {', '.join(q.name for q in chosen)}")
    chosen = [question for question in chosen if question.name in wanted]
  if args.list:
    for question in chosen:
      print(f"{question.name:20} {question.cap:4.0f} s  {question.decides}\n  jflow bench {' '.join(question.command)}")
    return 0
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`, which ends the child
  args.folder.mkdir(parents=True, exist_ok=True)
  file, ends = args.folder / "results.jsonl", time.monotonic() + args.seconds
  there = answered(file)
  for question in chosen:
    left = ends - time.monotonic()
    if question.name in there or left < 5:
      continue
    row = ask(question, args.folder, min(args.cap or question.cap, left))
    with file.open("a", encoding="utf-8") as lines:
      lines.write(json.dumps(row) + "\n")
      lines.flush()
      os.fsync(lines.fileno())
    print(f"{question.name}: {row.get('failed') or 'answered'} ({row['seconds']} s)", file=sys.stderr, flush=True)
  there = answered(file)
  outputs.replace(args.folder / "results.md", table([there[q.name] for q in chosen if q.name in there]))
  return 0 if all(question.name in there for question in chosen) else 1


def table(rows: list[dict[str, Any]]) -> str:
  """The steps, and the loops that paint and read, among the answers as Markdown."""
  lines = [
    "| question | seconds a step | tokens a second | MFU | peak, GiB | compiled, s |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  for row in rows:
    r = row["report"]
    if r.get("workload") != "train":
      continue
    mfu = f"{100 * r['mfu']:.1f} %" if r["mfu"] else ""
    lines.append(
      f"| {row['question']} | {r['seconds_per_step']['median']:.3f} | {r['tokens_per_second']:,.0f} | {mfu} "
      f"| {r['peak_bytes'] / 2**30:.1f} | {r['compile_seconds']:.0f} |"
    )
  lines += [
    "",
    "| question | pictures a second | tokens a second | ms a step of the loop | share of the FLOPs | share of the memory |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  lines += [_loop(row) for row in rows if row["report"].get("workload") in ("generate", "understand")]
  return "\n".join(lines) + "\n"


def _loop(row: dict[str, Any]) -> str:
  """The line of a loop that paints or reads; what its report lacks is left open."""
  report = row["report"]

  def shown(name: str, form: str) -> str:
    return f"{report[name]:{form}}" if report.get(name) else ""

  step = (
    report["seconds_per_step"]["median"] if "pictures" in report else report["answers"] / report["tokens_per_second"]
  )
  return (
    f"| {row['question']} | {shown('images_per_second', ',.2f')} | {shown('tokens_per_second', ',.0f')} "
    f"| {1e3 * step:.2f} | {shown('mfu', '.0%')} | {shown('bandwidth_share', '.0%')} |"
  )


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
