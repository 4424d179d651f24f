"""The paper's table 6 on the built-in world: trains A to F at equal budgets, scores them, puts the table together.

  python launch/ablations.py runs/ablations --steps=1050 --slice=350       # the table, curves and pictures of the README
  python launch/ablations.py runs/ablations --steps=1050 --letters=FA      # some of them; the others stay as they are
  python launch/ablations.py runs/ablations --steps=1050 --report          # from what is there, trained to the end or not

FOLDER gets stage0 and stage1 (made once, unless --start names a stage 1), a workdir for each letter, its scores under
scores/, and results.json, table.md, losses.png, pictures.png. Stopped at any moment, the same command goes on. D and
E take their share of F's steps (configs/ablation.py). With --slice the letters train in turn, F at most that many steps
and the others as large a part of theirs, so that all are equally far at any moment; the losses are those of one run from
end to end. Other arguments (--config.FIELD=VALUE) go to the training of every letter.
"""

import argparse
import os
import pathlib
import shlex
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]

import ablation_report  # noqa: E402

from configs import ablation, stage0, stage1  # noqa: E402
from jflow.evaluation import report  # noqa: E402
from jflow.training.checkpoint import sealed_steps  # noqa: E402

NOT_ASKED = {"D": "questions", "E": "pictures"}  # what each of the two has learned; the rest is not scored


def run(*arguments: str) -> None:
  """Runs a jflow command as a user would; ends with its exit code if it fails. A SIGTERM is handed on to it."""
  print("$ python -m jflow " + shlex.join(arguments), file=sys.stderr, flush=True)
  child = subprocess.Popen([sys.executable, "-m", "jflow", *arguments], cwd=ROOT)
  before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
  try:
    code = child.wait()
  except KeyboardInterrupt:  # the terminal tells the child, too: it saves
    code = child.wait() or 130
  signal.signal(signal.SIGTERM, before)
  if code:
    sys.exit(code)


def steps_done(workdir: pathlib.Path) -> int:
  """The newest step with a whole checkpoint; 0 if there is none."""
  return next(iter(sealed_steps(workdir / "checkpoints")), 0)


def train_stages(args: argparse.Namespace) -> str:
  """Trains the stages before the ablations where they are missing; returns the stage 1 to start from."""
  if args.start:
    return args.start
  before = ""
  for stage, module in enumerate((stage0, stage1)):
    workdir = args.folder / f"stage{stage}"
    steps = module.get_config(args.size).train.steps if stage or not args.pretrain else args.pretrain
    if steps_done(workdir) < steps:
      fields = [f"--config.train.init_from={before}", f"--config.train.steps={steps}"]
      run("train", f"--config=configs/stage{stage}.py:{args.size}", f"--workdir={workdir}", *fields)
    before = str(workdir)
  return before


def train(args: argparse.Namespace, letter: str, start: str, until: int) -> None:
  """Trains a letter up to a step, from where it is."""
  workdir = args.folder / letter
  if steps_done(workdir) >= until:
    return
  config = f"--config=configs/ablation.py:{letter}-{args.size}-{args.steps}"
  fields = [f"--config.train.init_from={start}", f"--config.train.steps={until}", *args.fields]
  run("train", config, f"--workdir={workdir}", *fields)


def evaluate(args: argparse.Namespace, letter: str) -> pathlib.Path:
  """Scores the newest checkpoint of a letter; returns the folder of its report."""
  options = {name: getattr(args, name) for name in ("limit", "guidance", "pictures")}
  options = {name: value for name, value in options.items() if value is not None}
  name = "-".join([letter, str(steps_done(args.folder / letter)), *(f"{k}{v:g}" for k, v in options.items())])
  output = args.folder / "scores" / name
  if letter in NOT_ASKED:
    options["only"] = NOT_ASKED[letter]
  flags = [f"--{name}={value:g}" if name == "guidance" else f"--{name}={value}" for name, value in options.items()]
  if ablation_report.fingerprint_of(output) != report.fingerprint(args.folder / letter, "ema"):
    checkpoint, size = f"--checkpoint={args.folder / letter}", f"--batch_size={args.batch_size}"
    run("evaluate", "--benchmark=shapes", checkpoint, f"--output={output}", size, *flags)
  return output


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", nargs="?", type=pathlib.Path, default=pathlib.Path("runs/ablations"), metavar="FOLDER")
  parser.add_argument("--size", choices=("shapes", "tiny"), default="shapes", help="default %(default)s")
  parser.add_argument("--steps", type=int, help="of F (default: configs/ablation.py's)")
  parser.add_argument("--pretrain", type=int, metavar="STEPS", help="of stage 0 (default: configs/stage0.py's)")
  parser.add_argument("--letters", default=ablation.LETTERS, help="which, and in which order (default %(default)s)")
  parser.add_argument("--slice", type=int, metavar="STEPS", help="train in turn, so many steps of F at a time")
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
  if unknown := set(args.letters) - set(ablation.LETTERS):
    parser.error(f"--letters={args.letters}: {', '.join(sorted(unknown))} is none of {ablation.LETTERS}")
  for name in ("steps", "pretrain", "slice", "limit", "pictures"):
    if getattr(args, name) is not None and getattr(args, name) < 1:
      parser.error(f"--{name}={getattr(args, name)} must be at least 1")
  os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # read by glibc 2.35 or newer, see quickstart.sh
  args.folder = args.folder.resolve()
  if args.start and pathlib.Path(args.start).is_dir():
    args.start = str(pathlib.Path(args.start).resolve())
  args.steps = args.steps or ablation.BUDGETS[args.size]
  ends = {
    letter: ablation.get_config(f"{letter}-{args.size}-{args.steps}").train.steps for letter in ablation.LETTERS
  }
  if not args.report:
    start = train_stages(args)
    turns = -(-ends["F"] // (args.slice or ends["F"]))
    for turn in range(1, turns + 1):
      for letter in args.letters:
        train(args, letter, start, ends[letter] * turn // turns)
  done = {letter: steps_done(args.folder / letter) for letter in ends}
  reports = {
    letter: evaluate(args, letter) for letter in ends if done[letter] >= (1 if args.report else ends[letter])
  }
  ablation_report.write(args.folder, reports, ends, "python " + shlex.join(["launch/ablations.py", *sys.argv[1:]]))
  return 0


if __name__ == "__main__":
  sys.exit(main())
