"""Ten minutes on one GPU: the questions about speed in the order of their worth, each in a process of its own.

  python launch/experiments/speed.py runs/speed                     # 470 seconds at most; the same command goes on
  python launch/experiments/speed.py runs/speed --seconds=3600      # all of it
  python launch/experiments/speed.py /tmp/speed --copy=$OUT         # on a lent machine: what is to come back, at once
  python launch/experiments/speed.py runs/speed --size=tiny --questions products,read-1   # anywhere
  python launch/experiments/speed.py runs/speed --list              # the questions, their caps and commands

Each answer is one line of FOLDER/results.jsonl, written as soon as it is there and printed, and a question with an
answer is not asked again; one that failed or ran past its cap is asked again by the next run. The first is begun at
once, others where the time left holds their cap. All share FOLDER/cache, the cache of compiled programs, so keep it, at
the same place: a second start takes seconds. Beside jax with its CUDA plugin and jflow's other requirements
(ml-collections, grain, array-record) the tests need pytest, --versus torch and diffusers.
"""

import argparse
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from typing import Any, NamedTuple

from jflow import outputs

SECONDS = 470.0  # of a command with ten minutes, with time left to fetch the results
TESTS = ("pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/models/test_attention.py")
_WORKER = "tests/parity/torch_worker.py"
_TOLD = 20  # last lines of the log of a question that failed


class Question(NamedTuple):
  """A question, as a measurement with a cap in seconds."""

  name: str
  cap: float
  command: tuple[str, ...]  # words behind `python -m jflow bench`, or `TESTS`
  decides: str


def questions(size: str) -> list[Question]:
  """The questions for models of a size, first the one that decides most."""
  stage2, stage3 = f"stage2:{size}", f"stage3:{size}"
  codes = f"janus/stage3:{'1b' if size in ('384', '256') else size}"

  def step(rows: int, *fields: str) -> tuple[str, ...]:
    fields = tuple(f"config.compute.{field}" for field in fields)
    return ("train", f"--config={stage2}", f"--rows={rows}", "--steps=8", "--no-parts", "--fields", *fields)

  everything = ("remat=none", "unroll=24") if size in ("384", "256") else ("remat=none",)
  attention = lambda *kernels: ("attention", f"--config={stage2}", "--kernels", "xla", *kernels)
  paint = ("generate", f"--config={stage3}", "--batch_size=16", "--repeats=2")
  read = ("understand", f"--config={stage3}", "--batch_size=16", "--repeats=2")
  codes_of = lambda rows: ("generate", f"--config={codes}", f"--batch_size={rows}", "--repeats=2")
  ask = Question
  # A kernel that faults may take the process with it: each has its own.
  return [
    ask("attention-cudnn", 60, attention("cudnn:8"), "whether the table of segments is right, and its share"),
    ask("step-8-none-cudnn", 280, step(8, *everything, "attention=cudnn"), "the headline"),
    ask("tests-attention", 90, TESTS, "`kernels.AUTO` and `AUTO_BEHIND_PREFIX`, whose kernels must pass them"),
    ask("products", 60, ("products", f"--config={stage2}"), "the rate that the model of a step is scaled by; fp8"),
    ask("attention-packed", 60, attention("packed"), "our own kernel"),
    ask("step-8-none-cudnn-fp8", 280, step(8, *everything, "attention=cudnn", "matmul=fp8"), "products in 8 bits"),
    ask("paint-16", 120, paint, "pictures a second"),
    ask("paint-16-fused", 120, (*paint, "--attention=fused"), "the causal kernel beside the prompt"),
    ask("read-1", 90, ("understand", f"--config={stage3}", "--new_tokens=256", "--repeats=2"), "tokens a second"),
    ask("read-16", 120, read, "the same, 16 rows"),
    ask("step-8-none-packed", 280, step(8, *everything, "attention=packed"), "our own kernel inside the step"),
    ask("step-8-auto", 280, step(8, "remat=auto"), "what a user gets"),
    ask("step-8-full-cudnn", 120, step(8, "remat=full", "attention=cudnn"), "what recompute and the loop cost"),
    ask("step-4-none-cudnn", 280, step(4, *everything, "attention=cudnn"), "half the rows"),
    ask("step-4-save-cudnn", 150, step(4, "remat=save:query,key,value,attended,gate,up", "attention=cudnn"), "80 GB"),
    ask(
      "parts",
      240,
      ("train", f"--config={stage2}", "--rows=4", "--steps=8", "--fields")
      + ("config.compute.remat=full", "config.compute.attention=cudnn"),
      "each part alone",
    ),
    ask("attention-triton", 60, attention("triton"), "jax's kernel"),
    ask("attention-cudnn-128", 60, attention("cudnn:128"), "the largest table"),
    ask("codes-1", 90, codes_of(1), "codes: share of the memory"),
    ask("codes-16", 120, codes_of(16), "the same, 16 pictures"),
    ask("codes-64", 150, codes_of(64), "the same, 64 pictures"),
    ask("paint-16-torch", 300, (*paint, f"--versus={_WORKER}"), "ratios"),
    ask("read-16-torch", 300, (*read, f"--versus={_WORKER}"), "ratios"),
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


def _words(question: Question, *flags: str) -> tuple[str, ...]:
  """The words of a question's command behind `python -m`; `flags` are for a measurement."""
  if question.command == TESTS:
    return TESTS
  return ("jflow", "bench", question.command[0], *flags, *question.command[1:])


def ask(question: Question, folder: pathlib.Path, cap: float) -> dict[str, Any]:
  """Runs a question for at most `cap` seconds; returns its line."""
  report = folder / f"{question.name}.json"
  report.unlink(missing_ok=True)
  words = _words(question, f"--json={report}")
  environment = {
    "JAX_COMPILATION_CACHE_DIR": str((folder / "cache").absolute()),
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
    # PyTorch needs its own share of the memory.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false" if f"--versus={_WORKER}" in words else "true",
  }
  started, log = time.monotonic(), folder / f"{question.name}.log"
  with log.open("w", encoding="utf-8") as file:  # `timeout` also ends a child whose parent was killed
    limited = ["timeout", "--signal=KILL", f"{cap:.1f}", sys.executable, "-m", *words]
    child = subprocess.Popen(limited, stdout=file, stderr=file, env=environment | os.environ, start_new_session=True)
    try:
      code = child.wait()
    finally:
      if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)  # and whatever it started
        child.wait()
  why = f"stopped after {cap:.0f} s" if time.monotonic() - started >= cap else f"exit code {code}"
  row: dict[str, Any] = {"question": question.name, "seconds": round(time.monotonic() - started, 1)}
  last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_TOLD:] or [""]
  if words == TESTS and code == 0:
    if not re.search(r"\d passed", last[-1]):  # skipped, say without a GPU
      return row | {"failed": f"no test ran: {last[-1][:300]}", "log": last}
    return row | {"report": {"workload": "tests", "said": last[-1]}}
  if report.exists():
    return row | {"report": json.loads(report.read_text(encoding="utf-8"))}
  return row | {"failed": f"{why}: {last[-1][:300]}", "log": last}


def main(argv: list[str]) -> int:
  """Asks what has no answer yet, within the time; returns 1 where a question is left open."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--seconds", type=_seconds, default=SECONDS, help="for all questions (default %(default)s)")
  parser.add_argument("--size", default="384", help="of the configs (default %(default)s)")
  parser.add_argument("--questions", default="", help="names, comma-separated (default: all)")
  parser.add_argument("--cap", type=_seconds, help="seconds of each question, in place of its own cap")
  parser.add_argument("--copy", type=pathlib.Path, help="a folder that gets results, table and logs after each answer")
  parser.add_argument("--list", action="store_true", help="say what would be asked, and stop")
  args = parser.parse_args(argv)
  chosen = questions(args.size)
  if args.questions:
    wanted = args.questions.split(",")
    if unknown := set(wanted) - {question.name for question in chosen}:
      parser.error(f"--questions: {', '.join(sorted(unknown))} must be among {', '.join(q.name for q in chosen)}")
    chosen = [question for question in chosen if question.name in wanted]
  if args.list:
    for question in chosen:
      print(f"{question.name:20} {question.cap:4.0f} s  {question.decides}\n  python -m {' '.join(_words(question))}")
    return 0
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`, which ends the child
  args.folder.mkdir(parents=True, exist_ok=True)
  file, ends = args.folder / "results.jsonl", time.monotonic() + args.seconds
  there, begun = answered(file), False
  _write(args.folder, chosen, there, args.copy)
  for question in chosen:
    left = ends - time.monotonic()
    cap = question.cap if args.cap is None else args.cap
    if question.name in there or begun and left < cap:
      continue
    begun, row = True, ask(question, args.folder, min(cap, left))
    with file.open("a", encoding="utf-8") as lines:
      lines.write(json.dumps(row) + "\n")
      lines.flush()
      os.fsync(lines.fileno())
    print(json.dumps(row), flush=True)
    print(f"{question.name}: {row.get('failed') or 'answered'} ({row['seconds']} s)", file=sys.stderr, flush=True)
    there = answered(file)
    _write(args.folder, chosen, there, args.copy)
  open_ones = [question.name for question in chosen if question.name not in there]
  if open_ones:
    print(f"open: {', '.join(open_ones)}; the same command goes on", file=sys.stderr)
  return 1 if open_ones else 0


def _seconds(text: str) -> float:
  value = float(text)
  if not 0 < value < math.inf:
    raise argparse.ArgumentTypeError(f"{text} must be a positive number")
  return value


def _write(folder: pathlib.Path, chosen: list[Question], there: dict[str, Any], to: pathlib.Path | None) -> None:
  """Writes the table, and copies results, table, and all logs as one file."""
  outputs.replace(folder / "results.md", table([there[q.name] for q in chosen if q.name in there]))
  if to is None:
    return
  to.mkdir(parents=True, exist_ok=True)
  for name in ("results.jsonl", "results.md"):
    if (folder / name).exists():
      shutil.copyfile(folder / name, to / name)
  with tarfile.open(to / "logs.tar.gz", "w:gz") as tar:
    for path in sorted(folder.glob("*.log")):
      tar.add(path, path.name)


def table(rows: list[dict[str, Any]]) -> str:
  """The steps, and the loops that paint and read, among the answers as Markdown.

  Steps of other numbers of rows are other work; those of one number must have one loss, but for rounding.
  """
  lines = [
    "| question | rows | pictures | learned tokens | loss | seconds a step | tokens a second | MFU | peak, GiB | compiled, s |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
  ]
  for row in rows:
    r = row["report"]
    if r.get("workload") != "train":
      continue
    mfu = f"{100 * r['mfu']:.1f} %" if r["mfu"] else ""
    lines.append(
      f"| {row['question']} | {r['rows']} | {r.get('pictures_per_step', '')} | {r.get('learned_tokens_per_step', '')} "
      f"| {r['loss']:.4f} "
      f"| {r['seconds_per_step']['median']:.3f} | {r['tokens_per_second']:,.0f} | {mfu} "
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
