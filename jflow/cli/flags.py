"""The flags shared by commands with a model, and loading of the model that they name."""

import argparse
import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

from jflow.cli.arguments import listed, number, path, whole
from jflow.errors import UserError
from jflow.outputs import make_directory

if TYPE_CHECKING:
  from jflow.inference.pipeline import Pipeline


def add_model(p: argparse.ArgumentParser, required: bool = True) -> None:
  """Adds --checkpoint, --vae, --dtype and --weights."""
  p.add_argument(
    "--checkpoint",
    required=required,
    metavar="DIR",
    help="published directory, jflow workdir or step, gs://..., ORG/NAME@REVISION of the Hugging Face hub",
  )
  p.add_argument("--vae", metavar="DIR", help="SDXL-VAE, for a checkpoint that holds none")
  p.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype (default: float32 on a CPU)")
  p.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a jflow training run")


def add_adapter(p: argparse.ArgumentParser) -> None:
  """Adds --adapter, one folder."""
  p.add_argument(
    "--adapter",
    metavar="DIR",
    help="adapter of this checkpoint to merge into it, from `convert --adapter` or in PEFT's format; also ORG/NAME",
  )


def add_template(p: argparse.ArgumentParser) -> None:
  """Adds --template."""
  from jflow.data.templates import TEMPLATES

  p.add_argument(
    "--template",
    choices=TEMPLATES,
    help="speakers of a conversation in place of the checkpoint's: none, words (User:), or Janus-Pro's special tokens",
  )


def open_model(args: argparse.Namespace) -> "Pipeline":
  """The pipeline that the flags above name, with a cache of compiled programs; raises UserError."""
  import jflow
  from jflow import compilation

  compilation.use_cache()
  return jflow.load(
    args.checkpoint,
    vae=args.vae,
    dtype=args.dtype,
    weights=args.weights,
    template=args.template,
    adapter=args.adapter,
  )


def open_models(args: argparse.Namespace, adapters: dict[str, str]) -> "tuple[Pipeline, dict[str, Pipeline]]":
  """As `open_model`, without --adapter; also name -> the pipeline with each adapter, from name -> folder."""
  from jflow import compilation
  from jflow.inference.loading import load_with_adapters

  compilation.use_cache()
  return load_with_adapters(
    args.checkpoint, adapters, vae=args.vae, dtype=args.dtype, weights=args.weights, template=args.template
  )


def add_settings(p: argparse.ArgumentParser, default: str = "default") -> None:
  """Adds the sampling settings of every family; defaults are left to the family, see `settings_of`."""
  for flag, families in _settings().items():
    field = next(iter(families.values()))
    told = ", ".join(f"{_words(field.default)} for {name}" for name, field in families.items())
    p.add_argument(f"--{flag}", help=f"{field.metadata['help']} ({default} {told})", **_reading(field))


def add_sweeps(p: argparse.ArgumentParser) -> None:
  """Adds --sweep_NAME, a list of values, for every sampling setting of one value."""
  for flag, families in _settings().items():
    field = next(iter(families.values()))
    if not isinstance(field.default, tuple):
      kind = _reading(field).get("type", str)
      p.add_argument(f"--sweep_{flag}", type=listed(kind), metavar="X,X,...", help=f"values of --{flag} to compare")


def sweeps_of(args: argparse.Namespace) -> dict[str, list[Any]]:
  """The values of the flags of `add_sweeps` that are given, by the name of their setting."""
  return {name: values for name in _settings() if (values := getattr(args, f"sweep_{name}", None))}


def _settings() -> dict[str, dict[str, dataclasses.Field]]:
  """Name of a sampling setting -> family -> its field."""
  from jflow.generation.base import FAMILIES

  fields: dict[str, dict[str, dataclasses.Field]] = {}
  for name, family in FAMILIES.all().items():
    for field in dataclasses.fields(family.settings):
      fields.setdefault(field.name, {})[name] = field
  return fields


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
  """The sampling settings given on the command line, by name."""
  return {name: value for name in sorted(_settings()) if (value := getattr(args, name)) is not None}


def _words(default: Any) -> str:
  return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _reading(field: dataclasses.Field) -> dict[str, Any]:
  """The argparse options of a setting, from the type of its default."""
  if "choices" in field.metadata:
    return {"choices": field.metadata["choices"]}
  if isinstance(field.default, tuple):
    return {"type": number(), "nargs": len(field.default), "metavar": field.metadata["metavar"]}
  kind = whole if isinstance(field.default, int) else number
  return {"type": kind(most=field.metadata["most"])}


def add_json(p: argparse.ArgumentParser, what: str) -> None:
  """Adds --json."""
  p.add_argument("--json", type=path, metavar="FILE", help=f"write {what} as JSON")


def check_json(args: argparse.Namespace) -> None:
  """`check_file` of --json."""
  check_file(args.json, "--json")


def check_file(file: pathlib.Path | None, flag: str) -> None:
  """Creates the folder of a file before the work starts; raises UserError if it cannot, or if the file is a folder."""
  if file and file.is_dir():
    raise UserError(f"{flag}={file} is a directory: name a file")
  if file and not file.exists():  # /dev/stdout exists, in a folder that is not writable
    make_directory(file.parent, flag)
