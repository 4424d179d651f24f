"""The command `understand`: answers a question about images."""

import argparse
import re
import sys

from jflow.cli import flags
from jflow.cli.arguments import SEED, Parser, number, whole
from jflow.errors import UserError
from jflow.outputs import write_json

_EPILOG = """
examples:
  python -m jflow understand --checkpoint=world --image=circle.png --question="What color is the circle?"
  python -m jflow understand --checkpoint=JanusFlow-1.3B --image=a.jpg --image=b.jpg --question="What changed?"
"""

_PICTURE = re.compile(r"\b(image|picture|photo|photograph|figure|drawing|chart)s?\b|图", re.IGNORECASE)


def parser() -> argparse.ArgumentParser:
  """The flags of `understand`."""
  p = Parser(
    prog="python -m jflow understand",
    description="Answers a question about pictures; the answer goes to stdout as it is made.",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  flags.add_model(p)
  flags.add_template(p)
  flags.add_adapter(p)
  p.add_argument(
    "--image", action="append", default=[], metavar="FILE", help="PNG, JPEG, WebP or GIF; repeat for several"
  )
  p.add_argument("--question", required=True, metavar="TEXT", help='"<image>" marks say where the pictures stand')
  p.add_argument("--system", default="", metavar="TEXT", help="system prompt (default: none)")
  p.add_argument(
    "--temperature",
    type=number(most=1e6),
    default=0.0,
    help="0 takes the most likely token (default)",
  )
  p.add_argument("--top_p", type=number(), default=1.0, help="mass of the nucleus to sample from (default %(default)s)")
  p.add_argument("--max_tokens", type=whole(), default=512, help="longest answer (default %(default)s)")
  p.add_argument("--seed", type=whole(most=SEED), default=0, help="of the sampling (default %(default)s)")
  flags.add_json(p, "question and answer")
  return p


def main(argv: list[str]) -> int:
  """Writes the answer to stdout."""
  args = parser().parse_args(argv)

  from jflow import checks
  from jflow.data.sequences import MARKS
  from jflow.inference.pipeline import prepare_image

  if not args.question.strip():
    raise UserError("--question is empty: ask something")
  for mark in MARKS:
    if (count := args.question.count(mark)) not in (0, len(args.image)):
      raise UserError(
        f"--question has {count} {mark} marks and there are {len(args.image)} pictures: give one --image=FILE per mark"
      )
  checks.answer(args.max_tokens, args.temperature, args.top_p, args.seed)
  for image in args.image:  # before the weights are read, which takes long
    prepare_image(image, 16)
  flags.check_json(args)
  if not args.image and _PICTURE.search(args.question):
    print("jflow: the question speaks of a picture and none is given; show one with --image=FILE", file=sys.stderr)
  model = flags.open_model(args)

  def say(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()

  answer = model.understand(
    args.question,
    args.image,
    args.max_tokens,
    temperature=args.temperature,
    top_p=args.top_p,
    seed=args.seed,
    system=args.system,
    stream=say,
  )
  say("\n")
  if args.json:
    body = {
      "checkpoint": str(args.checkpoint),
      "images": args.image,
      "question": args.question,
      "answer": answer,
    }
    write_json(args.json, body)
  return 0
