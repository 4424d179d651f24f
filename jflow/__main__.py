"""python -m jflow COMMAND: every command of jflow. `python -m jflow COMMAND --help` explains one."""

import errno
import importlib
import io
import os
import signal
import sys

from jflow.errors import Stopped, Terminated, UserError

# Command -> (module with main(argv) -> exit code or None, what it does).
COMMANDS = {
  "prepare": ("jflow.cli.prepare", "import pictures and texts into a training set"),
  "train": ("jflow.cli.train", "train a stage, tune by adapters, learn from rewards"),
  "plot": ("jflow.cli.plot", "compare the losses of runs in a picture"),
  "generate": ("jflow.cli.generate", "generate images from prompts"),
  "understand": ("jflow.cli.understand", "answer a question about images"),
  "evaluate": ("jflow.cli.evaluate", "score a checkpoint on a benchmark, with a report"),
  "convert": ("jflow.cli.convert", "convert weights from and to the published PyTorch layout"),
  "push": ("jflow.cli.push", "publish a model on the Hugging Face hub, with a card"),
  "parity": ("jflow.cli.parity", "compare with golden outputs of the PyTorch implementation"),
  "serve": ("jflow.cli.serve", "answer and generate images over HTTP, in the shape of OpenAI's API"),
  "demo": ("jflow.cli.demo", "a web page to chat about images and to generate them"),
  "compile": ("jflow.cli.compile", "compile the train step for a TPU or GPU mesh without having one"),
  "bench": ("jflow.cli.bench", "measure how fast training, generating, answering or loading runs here"),
}

_START = """
start with the small model of a built-in world that comes with jflow:
  python -m jflow generate --checkpoint=world --prompt="a picture of a red ring" --output=rings
  python -m jflow understand --checkpoint=world --image=rings/0000_00.png --question="What color is the ring?"
  python -m jflow evaluate --benchmark=shapes --checkpoint=world --output=scores --limit=48
  python -m jflow train --config=configs/stage2.py:tiny --workdir=runs/try --config.train.steps=20"""


# A full disk, a used-up quota, a file as large as the limit, a broken disk, a pipe without a reader.
_UNWRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE}


def main(argv: list[str]) -> int:
  """Runs one command; returns its exit code: 2 for a user's mistake, 130 after Ctrl-C, 143 after SIGTERM.

  1 where the run stopped by itself, or where all went well but its output could not be written.
  """
  code = 0
  for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show is printed with escapes
    if isinstance(stream, io.TextIOWrapper):  # None where it was closed from the start
      stream.reconfigure(errors="backslashreplace")
  try:
    code = _run(argv)
    if sys.stdout:
      sys.stdout.flush()
  except OSError as error:
    if error.filename is not None or error.errno not in _UNWRITTEN or not _drop_lost_output():
      raise
    if error.errno != errno.EPIPE:  # `| head` has read enough, which needs no message
      print(f"jflow: cannot write to standard output: {error.strerror}", file=sys.stderr)
    return code or 1
  return code


def _run(argv: list[str]) -> int:
  if not argv or argv[0] in ("-h", "--help"):
    print("usage: python -m jflow COMMAND ...\n\n" + __doc__.splitlines()[0] + "\n")
    for name, (_, what) in COMMANDS.items():
      print(f"  {name:12} {what}")
    print(_START)
    return 0 if argv else 2
  if argv[0] not in COMMANDS:
    print(f"jflow: unknown command {argv[0]!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
    return 2
  try:
    return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]) or 0
  except UserError as error:
    print(f"jflow: {error}", file=sys.stderr)
    return 2
  except Stopped as error:
    print(f"jflow: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt as error:
    print(f"jflow: {str(error) or 'stopped'}", file=sys.stderr)
    return 128 + (error.signum if isinstance(error, Terminated) else signal.SIGINT)


def _drop_lost_output() -> bool:
  """Returns whether standard output is closed; it is then replaced by a null device, so that the exit succeeds."""
  try:
    print(flush=True)  # a line, since unbuffered output keeps nothing that a flush alone could write again
    return False
  except OSError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def run() -> None:
  """The installed command `jflow`: runs the command line and exits with its code."""
  sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
  run()
