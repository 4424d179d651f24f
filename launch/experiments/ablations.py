"""The paper's table 6 on the built-in world: trains A to F at equal budgets, scores them, and writes the table.

  python launch/experiments/ablations.py runs/ablations --seeds=0,1     # lone large objects, 80 minutes of one core
  python launch/experiments/ablations.py runs/ablations --size=world --seeds=0,1 --jobs=2   # all kinds, hours
  python launch/experiments/ablations.py runs/ablations --letters=FA    # some of them; the others stay as they are
  python launch/experiments/ablations.py runs/ablations --report        # of what is there, trained to the end or not

FOLDER gets stage0 and stage1 (trained once, unless --start names a stage 1), a workdir for each letter under seedN/,
its scores under seedN/scores/, and results.json, table.md, losses.png, pictures.png. After a stop, the same command
resumes. D and E take their share of F's steps (configs/ablation.py). Several seeds differ in the parts that start
fresh, the order of records, times and noise, and tell how much two trainings of one letter differ. With --slice the
letters train in turns, F at most that many steps and the others the same share of theirs, so that all progress equally;
the losses are those of an uninterrupted run. With --jobs=2 two letters train at once, each on half of the cores, which
is faster than one after the other; their output goes to FOLDER/seedN-LETTER.log. Other arguments (--config.FIELD=VALUE)
go to the training of every letter.
"""

import argparse
import contextlib
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "launch" / "experiments")]

import ablation_report

from configs import ablation, stage0, stage1
from jflow.errors import UserError
from jflow.evaluation import report
from jflow.interop import checkpoints, remote
from jflow.interop.steps import sealed_steps

OWN = {"train.seed": "--seeds", "train.steps": "--steps", "train.init_from": "--start"}  # fields that each trial gets
BENCHMARKS = {"quick": "lone"}  # of a size, where it is not "shapes"
NOT_ASKED = {"D": "questions", "E": "pictures"}  # the half that each of the two is trained for; only this is scored


class Runner:
  """Runner of jflow commands as subprocesses, up to `jobs` at a time, each on its share of the cores and with a log.

  The commands of a queue run one after the other; of the idle queues, the one with the fewest commands so far is next.
  """

  def __init__(self, queues: Mapping[str, Iterator[list[str]]], logs: pathlib.Path, jobs: int = 1):
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    self._shares = [cores[i::jobs] or cores for i in range(jobs)]
    self._queues, self._started = dict(queues), dict.fromkeys(queues, 0)
    self._logs, self._jobs = logs, jobs
    self._running: dict[int, tuple[str, subprocess.Popen]] = {}  # place -> queue and its process
    self._code = 0

  def run(self) -> int:
    """Returns 0 when all queues are empty, or the exit code of the first command that failed.

    After a failure, the others receive SIGTERM, so that they save and end, as all do after a SIGTERM or Ctrl-C.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: self._stop(128 + signal.SIGTERM))
    try:
      while self._queues and not self._code or self._running:
        try:
          self._start()
          time.sleep(0.2)
          self._reap()
        except KeyboardInterrupt:  # the children receive it from the terminal too, and save
          self._code = self._code or 130
    finally:
      signal.signal(signal.SIGTERM, before)
    return self._code

  def _start(self) -> None:
    """Starts commands in the free places."""
    for place in sorted(set(range(self._jobs)) - set(self._running)):
      command = None
      while command is None and not self._code:
        idle = self._queues.keys() - {queue for queue, _ in self._running.values()}
        if not idle:
          return
        queue = min(idle, key=lambda queue: (self._started[queue], list(self._queues).index(queue)))
        command = next(self._queues[queue], None)
        if command is None:
          del self._queues[queue]
      if command is not None:
        self._started[queue] += 1
        self._running[place] = (queue, self._launch(place, self._logs / f"{queue}.log", command))

  def _launch(self, place: int, log: pathlib.Path, command: list[str]) -> subprocess.Popen:
    several = self._jobs > 1
    print(f"$ python -m jflow {shlex.join(command)}{f' >> {log}' if several else ''}", file=sys.stderr, flush=True)
    with log.open("a", encoding="utf-8") if several else contextlib.nullcontext() as output:
      child = subprocess.Popen([sys.executable, "-m", "jflow", *command], cwd=ROOT, stdout=output, stderr=output)
    if several and self._shares[place]:
      with contextlib.suppress(ProcessLookupError):  # it has ended already
        os.sched_setaffinity(child.pid, self._shares[place])
    return child

  def _reap(self) -> None:
    """Collects commands that have ended; if one has failed, ends all others."""
    for place, (queue, child) in list(self._running.items()):
      if child.poll() is None:
        continue
      del self._running[place]
      if child.returncode and not self._code:
        if self._jobs > 1:
          log = (self._logs / f"{queue}.log").read_text(encoding="utf-8")
          print("\n".join(log.splitlines()[-1:]), file=sys.stderr)
        self._stop(child.returncode)

  def _stop(self, code: int) -> None:
    self._code = self._code or code
    for _, child in self._running.values():
      child.terminate()


def run(queues: Mapping[str, Iterator[list[str]]], logs: pathlib.Path, jobs: int = 1) -> None:
  """Runs the commands of all queues, see `Runner`; exits with the code of the first that fails."""
  if code := Runner(queues, logs, jobs).run():
    sys.exit(code)


def steps_done(workdir: pathlib.Path) -> int:
  """The newest step with a complete checkpoint; 0 if there is none."""
  return next(iter(sealed_steps(workdir / "checkpoints")), 0)


def stages(args: argparse.Namespace) -> Iterator[list[str]]:
  """Yields the commands that train the stages before the ablations, where they are missing."""
  before = ""
  for stage, module in enumerate((stage0, stage1)):
    workdir = args.folder / f"stage{stage}"
    steps = module.get_config(args.size).train.steps if stage or not args.pretrain else args.pretrain
    if steps_done(workdir) < steps:
      fields = [f"--config.train.init_from={before}", f"--config.train.steps={steps}"]
      yield ["train", f"--config=configs/stage{stage}.py:{args.size}", f"--workdir={workdir}", *fields]
    before = str(workdir)


class Trial(NamedTuple):
  """One training of a letter."""

  letter: str
  seed: int

  def workdir(self, folder: pathlib.Path) -> pathlib.Path:
    return folder / f"seed{self.seed}" / self.letter

  @property
  def name(self) -> str:
    return f"seed{self.seed}-{self.letter}"


def turns(args: argparse.Namespace, trial: Trial, end: int, count: int) -> Iterator[list[str]]:
  """Yields the commands that train a letter to its end in `count` turns, from its current step."""
  workdir, start = trial.workdir(args.folder), args.start or args.folder / "stage1"
  for turn in range(1, count + 1):
    until = end * turn // count
    if steps_done(workdir) < until:
      config = f"--config=configs/ablation.py:{trial.letter}-{args.size}-{args.steps}"
      fields = [f"--config.train.init_from={start}", f"--config.train.seed={trial.seed}", *args.fields]
      yield ["train", config, f"--workdir={workdir}", *fields, f"--config.train.steps={until}"]


def options_of(args: argparse.Namespace) -> dict[str, float]:
  """The options of the scoring that differ from the recipe."""
  options = {name: getattr(args, name) for name in ("limit", "guidance", "pictures")}
  return {name: value for name, value in options.items() if value is not None}


def scores(args: argparse.Namespace, trial: Trial) -> pathlib.Path:
  """The folder of the report on the newest checkpoint of a trial."""
  workdir = trial.workdir(args.folder)
  options = (f"{name}{value:g}" for name, value in options_of(args).items())
  return workdir.parent / "scores" / "-".join([trial.letter, str(steps_done(workdir)), *options])


def scoring(args: argparse.Namespace, trial: Trial) -> Iterator[list[str]]:
  """Yields the command that scores the newest checkpoint of a trial, if its report is missing."""
  output, options, workdir = scores(args, trial), options_of(args), trial.workdir(args.folder)
  if trial.letter in NOT_ASKED:
    options["only"] = NOT_ASKED[trial.letter]
  if NOT_ASKED.get(trial.letter) == "questions":
    options = {name: value for name, value in options.items() if name not in ("guidance", "pictures")}
  flags = [f"--{name}={value:g}" if name == "guidance" else f"--{name}={value}" for name, value in options.items()]
  if ablation_report.fingerprint_of(output) != report.fingerprint(checkpoints.locate(workdir), "ema"):
    checkpoint, size = f"--checkpoint={workdir}", f"--batch_size={args.batch_size}"
    benchmark = f"--benchmark={BENCHMARKS.get(args.size, 'shapes')}"
    yield ["evaluate", benchmark, checkpoint, f"--output={output}", size, *flags]


def tunables() -> str:
  """The GLIBC_TUNABLES of xla_flags.sh for a CPU, or those set by the user."""
  script = 'source "$0" && jflow_xla_flags cpu && printf %s "$GLIBC_TUNABLES"'
  command = ["bash", "-c", script, str(ROOT / "launch" / "xla_flags.sh")]
  return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", nargs="?", type=pathlib.Path, default=pathlib.Path("runs/ablations"), metavar="FOLDER")
  parser.add_argument(
    "--size", choices=("quick", "world", "shapes", "tiny"), default="quick", help="default %(default)s"
  )
  parser.add_argument("--steps", type=int, help="of F (default: configs/ablation.py's)")
  parser.add_argument("--pretrain", type=int, metavar="STEPS", help="of stage 0 (default: configs/stage0.py's)")
  parser.add_argument("--letters", default=ablation.LETTERS, help="which, and in which order (default %(default)s)")
  parser.add_argument(
    "--seeds", default="0", metavar="N,M", help="a training of each letter per seed (default %(default)s)"
  )
  parser.add_argument("--slice", type=int, metavar="STEPS", help="train in turn, so many steps of F at a time")
  parser.add_argument(
    "--jobs", type=int, default=1, help="commands at a time, each on its share of the cores (default %(default)s)"
  )
  parser.add_argument("--start", metavar="DIR", help="the stage 1 to start from, in place of one made here")
  parser.add_argument("--limit", type=int, help="score the first N prompts and questions of each split only")
  parser.add_argument("--pictures", type=int, help="per prompt (default: the recipe's 4)")
  parser.add_argument("--guidance", type=float, help="w of eq. 5 (default: the recipe's 2)")
  parser.add_argument("--batch_size", type=int, default=16, help="of the scoring (default %(default)s)")
  parser.add_argument("--report", action="store_true", help="train nothing: score and report what is there")
  args, args.fields = parser.parse_known_args()
  for field in args.fields:
    if not field.startswith("--config.") or "=" not in field:
      parser.error(f"unknown argument {field}; fields of the training are --config.FIELD=VALUE")
    if flag := OWN.get(field.removeprefix("--config.").split("=")[0]):
      parser.error(f"{field}: give {flag} in its place")
  if unknown := set(args.letters) - set(ablation.LETTERS):
    parser.error(f"--letters={args.letters}: {', '.join(sorted(unknown))} is none of {ablation.LETTERS}")
  if not all(seed.isascii() and seed.isdigit() for seed in args.seeds.split(",")):
    parser.error(f"--seeds={args.seeds} must be whole numbers with commas between them, as in 0,1")
  for name in ("steps", "pretrain", "slice", "jobs", "limit", "pictures"):
    if getattr(args, name) is not None and getattr(args, name) < 1:
      parser.error(f"--{name}={getattr(args, name)} must be at least 1")
  if args.steps is not None and args.steps < 5:
    parser.error(f"--steps={args.steps} must be at least 5: a fifth of them has a mixture of its own")
  if args.start and not remote.is_remote(args.start):
    try:
      args.start = str(pathlib.Path(args.start).resolve())
      checkpoints.locate(args.start)
    except UserError as error:
      parser.error(f"--start: {error}")
  os.environ["GLIBC_TUNABLES"] = tunables()
  args.folder = args.folder.resolve()
  args.folder.mkdir(parents=True, exist_ok=True)
  args.steps = args.steps or ablation.BUDGETS[args.size]
  ends = {letter: ablation.get_config(f"{letter}-{args.size}-{args.steps}").train.steps for letter in ablation.LETTERS}
  seeds = dict.fromkeys(map(int, args.seeds.split(",")))
  trials = [Trial(letter, seed) for seed in seeds for letter in ends]
  if not args.report:
    if not args.start:
      run({"stages": stages(args)}, args.folder)
    count = -(-ends["F"] // (args.slice or ends["F"]))
    wanted = [Trial(letter, seed) for seed in seeds for letter in args.letters]
    run({t.name: turns(args, t, ends[t.letter], count) for t in wanted}, args.folder, args.jobs)
  least = lambda t: 1 if args.report else ends[t.letter]
  scored = [t for t in trials if steps_done(t.workdir(args.folder)) >= least(t)]
  run({t.name: scoring(args, t) for t in scored}, args.folder, args.jobs)
  reports = {letter: {t.seed: scores(args, t) for t in scored if t.letter == letter} for letter in ends}
  ablation_report.write(
    args.folder, reports, ends, "python " + shlex.join(["launch/experiments/ablations.py", *sys.argv[1:]])
  )
  return 0


if __name__ == "__main__":
  sys.exit(main())
