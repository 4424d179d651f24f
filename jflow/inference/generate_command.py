"""The command `generate`."""

import argparse
import pathlib
import sys

from jflow.errors import UserError
from jflow.inference.files import make_directory, write_json

_EPILOG = """
examples:
  python -m jflow generate --checkpoint=runs/stage3 --prompt="a picture of a red circle" --output=pictures
  python -m jflow generate --checkpoint=JanusFlow-1.3B --vae=sdxl-vae --prompts=prompts.txt --num_images=4 --output=pictures
"""


def parser() -> argparse.ArgumentParser:
  """The flags of `generate`."""
  p = argparse.ArgumentParser(
    prog="python -m jflow generate",
    description="Paints pictures from prompts: PNG files and a contact sheet.",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  p.add_argument(
    "--checkpoint", required=True, metavar="DIR", help="official directory, or a jflow workdir or step"
  )
  p.add_argument("--vae", metavar="DIR", help="SDXL-VAE, for an official checkpoint that holds none")
  p.add_argument(
    "--prompt", action="append", default=[], metavar="TEXT", help="what to paint; repeat for several"
  )
  p.add_argument("--prompts", type=pathlib.Path, metavar="FILE", help="a text file with one prompt per line")
  p.add_argument("--output", required=True, type=pathlib.Path, metavar="DIR", help="where the PNG files go")
  p.add_argument("--steps", type=int, default=30, help="solver steps (default %(default)s, as in the paper)")
  p.add_argument(
    "--guidance",
    type=float,
    default=2.0,
    help="w of eq. 5: 1 is none, 2 the paper's for FID (default %(default)s)",
  )
  p.add_argument(
    "--seed",
    type=int,
    default=0,
    help="picture j of a prompt starts from noise seed + j (default %(default)s)",
  )
  p.add_argument("--num_images", type=int, default=1, help="pictures per prompt (default %(default)s)")
  p.add_argument("--solver", default="euler", help="euler, heun or midpoint (default %(default)s)")
  p.add_argument("--shift", type=float, default=1.0, help="of the time grid; 1 is even (default %(default)s)")
  p.add_argument(
    "--interval",
    type=float,
    nargs=2,
    default=(0.0, 1.0),
    metavar=("FROM", "TO"),
    help="guidance acts at these times only",
  )
  p.add_argument(
    "--precision", default="exact", help="exact (f32 state and time), or release (bf16, as published)"
  )
  p.add_argument("--batch_size", type=int, default=16, help="pictures painted at once (default %(default)s)")
  p.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype (default: float32 on a CPU)")
  p.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a jflow training run")
  p.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write what was painted as JSON")
  return p


def read_prompts(prompts: list[str], file: pathlib.Path | None) -> list[str]:
  """The prompts of the flags; raises UserError when there is none or the file cannot be read."""
  prompts = list(prompts)
  if file is not None:
    try:
      prompts += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f"--prompts={file} cannot be read as UTF-8 text: {error}") from error
  if not prompts:
    raise UserError("give --prompt=TEXT, or --prompts=FILE with one prompt per line")
  return prompts


def main(argv: list[str]) -> int:
  """Paints and writes."""
  args = parser().parse_args(argv)
  prompts = read_prompts(args.prompt, args.prompts)
  make_directory(args.output, "--output")
  if args.json:
    make_directory(args.json.parent, "--json")

  from tqdm import tqdm

  import jflow
  from jflow import flow
  from jflow.inference.sheet import contact_sheet

  model = jflow.load(args.checkpoint, vae=args.vae, dtype=args.dtype, weights=args.weights)
  total = len(prompts) * max(args.num_images, 0)
  with tqdm(total=total, unit="picture", disable=not sys.stderr.isatty()) as bar:
    images = model.generate(
      prompts, args.steps, args.guidance, args.seed, num_images=args.num_images, solver=args.solver, shift=args.shift,
      interval=tuple(args.interval), precision=args.precision, batch_size=args.batch_size,
      progress=lambda done, _: bar.update(done - bar.n),
    )  # fmt: skip
  records = []
  for i, image in enumerate(images):
    prompt, j = prompts[i // args.num_images], i % args.num_images
    name = f"{i // args.num_images:04d}_{j:02d}.png"
    image.save(args.output / name)
    records.append({"file": name, "prompt": prompt, "seed": args.seed + j})
  sheet = args.output / "sheet.png"
  columns = args.num_images if args.num_images > 1 else min(6, len(images))
  contact_sheet(images, [r["prompt"] for r in records], columns).save(sheet)
  evaluations = flow.SOLVERS[args.solver][1] * args.steps
  if args.json:
    settings = {k: getattr(args, k) for k in ("steps", "guidance", "seed", "solver", "shift", "precision")}
    body = {
      "checkpoint": str(args.checkpoint),
      "settings": settings,
      "function_evaluations": evaluations,
      "pictures": records,
    }
    write_json(args.json, body)
  print(
    f"{len(images)} pictures in {args.output} ({evaluations} evaluations of the velocity each); all on one page: {sheet}"
  )
  return 0
