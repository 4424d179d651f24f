"""The command `generate`."""

import argparse
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from jflow import files
from jflow.cli import flags
from jflow.cli.arguments import SEED, Parser, number, whole
from jflow.errors import UserError
from jflow.outputs import make_directory, write_json, writing

if TYPE_CHECKING:
  from PIL import Image

  from jflow.inference.pipeline import Pipeline

SOLVERS = ("euler", "heun", "midpoint")  # the keys of flow.SOLVERS, which would bring jax along
_SHEET = "sheet.png"

_EPILOG = """
examples:
  python -m jflow generate --checkpoint=quickstart/stage3 --prompt="a picture of a red circle" --output=pictures
  python -m jflow generate --checkpoint=JanusFlow-1.3B --vae=sdxl-vae --prompts=prompts.txt --num_images=4 --output=pictures
"""


def parser() -> argparse.ArgumentParser:
  """The flags of `generate`."""
  p = Parser(
    prog="python -m jflow generate",
    description="Paints pictures from prompts: PNG files and a contact sheet.",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  flags.add_model(p)
  p.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="what to paint; repeat for several")
  p.add_argument("--prompts", type=pathlib.Path, metavar="FILE", help="a text file with one prompt per line")
  p.add_argument("--output", required=True, type=pathlib.Path, metavar="DIR", help="where the PNG files go")
  p.add_argument("--overwrite", action="store_true", help="replace pictures of an earlier run in --output")
  p.add_argument(
    "--steps",
    type=whole(most=10_000),
    default=30,
    help="solver steps (default %(default)s, as in the paper)",
  )
  p.add_argument(
    "--guidance",
    type=number(most=1e6),
    default=2.0,
    help="w of eq. 5: 1 is none, 2 the paper's for FID (default %(default)s)",
  )
  p.add_argument(
    "--seed",
    type=whole(most=SEED),
    default=0,
    help="picture j of a prompt starts from noise seed + j (default %(default)s)",
  )
  p.add_argument(
    "--num_images",
    type=whole(most=100_000),
    default=1,
    help="pictures per prompt (default %(default)s)",
  )
  p.add_argument("--solver", choices=SOLVERS, default="euler", help="(default %(default)s)")
  p.add_argument(
    "--shift",
    type=number(most=1e6),
    default=1.0,
    help="of the time grid; 1 is even (default %(default)s)",
  )
  p.add_argument(
    "--interval",
    type=number(),
    nargs=2,
    default=(0.0, 1.0),
    metavar=("FROM", "TO"),
    help="guidance acts at these times only",
  )
  p.add_argument(
    "--precision",
    choices=("exact", "release"),
    default="exact",
    help="exact (f32 state and time), or release (bf16, as published)",
  )
  p.add_argument(
    "--batch_size",
    type=whole(most=100_000),
    default=16,
    help="pictures painted at once (default %(default)s)",
  )
  flags.add_json(p, "what was painted")
  return p


def read_prompts(prompts: list[str], file: pathlib.Path | None) -> list[str]:
  """The prompts of the flags; raises UserError when there is none or the file cannot be read."""
  prompts = list(prompts)
  if file is not None:
    try:
      lines = file.read_text(encoding="utf-8-sig").split("\n")  # a line separator of Unicode parts no prompts
      prompts += [line.strip() for line in lines if line.strip()]
    except OSError as error:
      raise UserError(f"--prompts={file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
      raise UserError(f"--prompts={file} cannot be read as UTF-8 text: {error}") from error
    if not any(map(str.strip, lines)):
      raise UserError(f"--prompts={file} holds no prompt: give one per line")
  if not prompts:
    raise UserError("give --prompt=TEXT, or --prompts=FILE with one prompt per line")
  return prompts


def main(argv: list[str]) -> int:
  """Paints and writes."""
  args = parser().parse_args(argv)
  prompts = read_prompts(args.prompt, args.prompts)

  from jflow.generation.flow import equations as flow
  from jflow.generation.flow import sampler as painting
  from jflow.inference.sheet import contact_sheet

  settings = dict(
    steps=args.steps,
    guidance=args.guidance,
    seed=args.seed,
    num_images=args.num_images,
    solver=args.solver,
    shift=args.shift,
    interval=tuple(args.interval),
    precision=args.precision,
    batch_size=args.batch_size,
  )
  painting.check(prompts, **settings)
  names = [f"{i:04d}_{j:02d}.png" for i in range(len(prompts)) for j in range(args.num_images)]
  make_directory(args.output, "--output")
  earlier = [name for name in (*names, _SHEET) if (args.output / name).exists()]
  if earlier and not args.overwrite:
    raise UserError(
      f"--output={args.output} holds {earlier[0]} of an earlier run: give another directory, or --overwrite"
    )
  flags.check_json(args)
  model = flags.open_model(args)
  images = _paint(model, prompts, settings)
  records = []
  sheet = args.output / _SHEET
  columns = args.num_images if args.num_images > 1 else min(6, len(images))
  with writing(args.output):
    for i, (name, image) in enumerate(zip(names, images, strict=True)):
      with files.output(args.output / name) as new:
        image.save(new, "PNG")
      prompt, j = prompts[i // args.num_images], i % args.num_images
      records.append({"file": name, "prompt": prompt, "seed": args.seed + j})
    with files.output(sheet) as new:
      contact_sheet(images, [r["prompt"] for r in records], columns).save(new, "PNG")
  evaluations = flow.SOLVERS[args.solver][1] * args.steps
  if args.json:
    made = {"dtype": str(model.model.dtype), "weights": args.weights}
    body = {
      "checkpoint": str(args.checkpoint),
      "settings": settings | made,
      "function_evaluations": evaluations,
      "pictures": records,
    }
    write_json(args.json, body)
  print(
    f"{len(images)} pictures in {args.output} ({evaluations} evaluations of the velocity each); all on one page: {sheet}"
  )
  return 0


def _paint(model: "Pipeline", prompts: list[str], settings: dict[str, Any]) -> list["Image.Image"]:
  """Paints under a bar that counts solver steps, since a picture may take a minute."""
  from tqdm import tqdm

  pictures, steps = len(prompts) * settings["num_images"], settings["steps"]
  batch = settings["batch_size"]
  sizes = iter([min(batch, pictures - at) for at in range(0, pictures, batch)])
  with tqdm(total=pictures * steps, unit="step", disable=not sys.stderr.isatty()) as bar:
    state = {"size": next(sizes), "before": 0}

    def on_step(done: int, _: int) -> None:
      bar.update(state["before"] + done * state["size"] - bar.n)

    def on_batch(done: int, total: int) -> None:
      state.update(size=next(sizes, 0), before=done * steps)
      bar.set_postfix_str(f"{done} of {total} pictures")

    return model.generate(prompts, **settings, progress=on_batch, on_step=None if bar.disable else on_step)
