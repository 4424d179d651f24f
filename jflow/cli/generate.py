"""The command `generate`: generates images from prompts."""

import argparse
import dataclasses
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from jflow import files
from jflow.cli import flags
from jflow.cli.arguments import SEED, Parser, path, whole
from jflow.errors import UserError
from jflow.outputs import make_directory, write_json, writing

if TYPE_CHECKING:
  from PIL import Image

  from jflow.inference.pipeline import Pipeline

_SHEET = "sheet.png"

_EPILOG = """
examples:
  python -m jflow generate --checkpoint=world --prompt="a picture of a red circle" --output=pictures
  python -m jflow generate --checkpoint=JanusFlow-1.3B --vae=sdxl-vae --prompts=prompts.txt --num_images=4 --output=pictures
"""


def parser() -> argparse.ArgumentParser:
  """The flags of `generate`."""
  p = Parser(
    prog="python -m jflow generate",
    description="Generates pictures from prompts: PNG files and a contact sheet.",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  flags.add_model(p)
  flags.add_template(p)
  flags.add_adapter(p)
  p.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="of the picture; repeat for several")
  p.add_argument("--prompts", type=path, metavar="FILE", help="a text file with one prompt per line")
  p.add_argument("--output", required=True, type=path, metavar="DIR", help="where the PNG files go")
  p.add_argument("--overwrite", action="store_true", help="replace pictures of an earlier run in --output")
  flags.add_settings(p, "default, unless the checkpoint has its own:")
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
  p.add_argument(
    "--batch_size",
    type=whole(most=100_000),
    default=16,
    help="pictures generated at once (default %(default)s)",
  )
  flags.add_json(p, "prompts, seeds and files")
  return p


def read_prompts(prompts: list[str], file: pathlib.Path | None) -> list[str]:
  """The prompts of the flags; raises UserError if there is none or the file cannot be read."""
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
  """Generates images, and writes them and a contact sheet."""
  args = parser().parse_args(argv)
  prompts = read_prompts(args.prompt, args.prompts)

  from jflow import png
  from jflow.generation.base import check_settings, family, settings
  from jflow.inference.pipeline import check_prompts
  from jflow.inference.sheet import contact_sheet
  from jflow.interop import checkpoints

  given = flags.settings_of(args)
  call = dict(seed=args.seed, num_images=args.num_images, batch_size=args.batch_size)
  check_prompts(prompts, **call)
  check_settings(given)
  flags.check_json(args)
  # What the checkpoint does not take is said before a folder is made and its weights are read.
  way = family(checkpoints.read_config(args.checkpoint).generation)
  settings(way, given if args.adapter else {**checkpoints.sampling_of(args.checkpoint), **given})
  names = [f"{i:04d}_{j:02d}.png" for i in range(len(prompts)) for j in range(args.num_images)]
  make_directory(args.output, "--output")
  earlier = [name for name in (*names, _SHEET) if (args.output / name).exists()]
  if earlier and not args.overwrite:
    raise UserError(
      f"--output={args.output} holds {earlier[0]} of an earlier run: give another directory, or --overwrite"
    )
  if args.json and args.json.resolve() in {(args.output / name).resolve() for name in (*names, _SHEET)}:
    raise UserError(f"--json={args.json} must not be a picture of --output={args.output}")
  model = flags.open_model(args)
  chosen = model.settings(**given)
  images = _generate(model, prompts, chosen, call)
  named = pathlib.PurePath(args.checkpoint)
  named = named.name if named.is_absolute() else str(named)  # a picture that is shared names no home folder
  records, told = [], {"checkpoint": named, **dataclasses.asdict(chosen)}
  sheet = args.output / _SHEET
  columns = args.num_images if args.num_images > 1 else min(6, len(images))
  with writing(args.output):
    for i, (name, image) in enumerate(zip(names, images, strict=True)):
      prompt, seed = prompts[i // args.num_images], args.seed + i % args.num_images
      with files.output(args.output / name) as new:
        png.save(image, new, prompt, {"seed": seed, **told})
      records.append({"file": name, "prompt": prompt, "seed": seed})
    with files.output(sheet) as new:
      contact_sheet(images, [r["prompt"] for r in records], columns).save(new, "PNG")
  if args.json:
    made = {"dtype": str(model.model.dtype), "weights": args.weights}
    body = {
      "checkpoint": str(args.checkpoint),
      "settings": dataclasses.asdict(chosen) | call | made,
      "function_evaluations": model.sampler.evaluations(chosen),
      "pictures": records,
    }
    write_json(args.json, body)
  count = f"{len(images)} picture{'s' * (len(images) != 1)}"
  print(f"{count} in {args.output}; all on one page: {sheet}")
  return 0


def _generate(model: "Pipeline", prompts: list[str], chosen: Any, call: dict[str, int]) -> list["Image.Image"]:
  """Generates images with a progress bar that counts sampling steps, since an image may take a minute."""
  from jflow.progress import Progress

  pictures, steps, batch = len(prompts) * call["num_images"], model.sampler.evaluations(chosen), call["batch_size"]
  sizes = iter([min(batch, pictures - at) for at in range(0, pictures, batch)])
  with Progress(pictures * steps, name="generate", unit="pictures") as bar:
    state = {"size": next(sizes), "before": 0}

    def on_step(done: int, total: int) -> None:
      bar.show(state["before"] * steps + done * steps // total * state["size"], state["before"])

    def on_batch(done: int, total: int) -> None:
      state.update(size=next(sizes, 0), before=done)
      bar.show(done * steps, done)

    told = on_step if sys.stderr.isatty() else None
    return model.generate(prompts, **call, **dataclasses.asdict(chosen), progress=on_batch, on_step=told)
