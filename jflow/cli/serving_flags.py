"""The flags shared by `serve` and `demo`, and the engine that they describe."""

import argparse
from typing import TYPE_CHECKING

from jflow.cli import flags as model_flags
from jflow.cli.arguments import number, whole
from jflow.errors import UserError, need_extra

if TYPE_CHECKING:
  from jflow.serving.engine import Engine

_CONTEXT = 4096  # tokens; each slot of the full model holds 0.8 GB of keys and values for it, in bfloat16


def add(p: argparse.ArgumentParser, port: int, several: bool = False) -> None:
  """Adds the flags of the checkpoint, the address and the engine; `several`: --adapter=NAME=DIR, repeatable."""
  model_flags.add_model(p)
  model_flags.add_template(p)
  if not several:
    model_flags.add_adapter(p)
  else:
    p.add_argument(
      "--adapter",
      action="append",
      default=[],
      type=_named,
      metavar="NAME=DIR",
      help="an adapter of the checkpoint, served beside it as the model NAME; repeatable. Each takes the memory of the "
      "matrices that it changes, and that of --slots conversations",
    )
  p.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s: this machine only)")
  p.add_argument(
    "--allowed_host",
    action="append",
    default=[],
    metavar="NAME",
    help="a name or address that clients may call this server by, besides those that --host stands for (needed behind a "
    "reverse proxy); repeatable, * allows any, and then any web page can use the server",
  )
  p.add_argument(
    "--port",
    type=whole(most=65535),
    default=port,
    help="0 takes a free one (default %(default)s)",
  )
  p.add_argument(
    "--slots", type=whole(most=100_000), default=8, help="conversations answered side by side (default %(default)s)"
  )
  p.add_argument(
    "--context",
    type=whole(),
    help=f"tokens of one conversation, its answer included (default: {_CONTEXT}, or the model's where that is less)",
  )
  p.add_argument(
    "--batch",
    type=whole(most=100_000),
    default=8,
    help="pictures generated at once, a power of two (default %(default)s)",
  )
  p.add_argument(
    "--queue", type=whole(), default=64, help="requests open at once, the next one gets 429 (default %(default)s)"
  )
  p.add_argument("--timeout", type=number(), default=300, help="seconds that a request may take (default %(default)s)")


def _named(text: str) -> tuple[str, str]:
  name, _, folder = text.partition("=")
  if not (name and folder and name.isprintable() and name == name.strip()):
    raise argparse.ArgumentTypeError(f"{text!r} must be NAME=DIR, for example birds=adapters/birds")
  return name, folder


def adapters_of(args: argparse.Namespace, model: str) -> dict[str, str]:
  """Name -> folder of the adapters to serve beside a model of this name.

  Raises:
    UserError: a name is taken.
  """
  out: dict[str, str] = {}
  for name, folder in args.adapter:
    if name in out or name == model:
      raise UserError(f"--adapter={name}={folder}: the name {name!r} is taken{' by --name' if name == model else ''}")
    out[name] = folder
  return out


def check(args: argparse.Namespace, extra: str = "serve") -> None:
  """Checks the flags as far as possible without the model; raises UserError.

  Args:
    args: of the command.
    extra: of pyproject.toml, that has the packages which any server needs.
  """
  need_extra(extra, "starlette", "uvicorn", "h11", "pydantic", "prometheus_client")
  from jflow.serving import hosts

  for name, least in (("slots", 1), ("batch", 1), ("queue", 1), ("context", 2)):
    if (value := getattr(args, name)) is not None and value < least:
      raise UserError(f"--{name}={value} must be at least {least}")
  for name in args.allowed_host:
    hosts.check_name(name)
  if args.batch.bit_count() != 1:  # the engine fills a batch up to a power of two, see `Engine._generate`
    raise UserError(f"--batch={args.batch} must be a power of two, for example 4 or 8")
  if not 0 < args.timeout < 1e6:
    raise UserError(f"--timeout={args.timeout:g} must be a number of seconds above 0")


def engine(args: argparse.Namespace, adapters: dict[str, str] | None = None) -> "Engine":
  """Loads the model and returns its engine, not yet started.

  Args:
    args: of the command.
    adapters: name -> folder of those to serve beside it; None: the model alone, with --adapter merged.

  Raises:
    UserError: the checkpoint cannot be used, or --context exceeds the model's.
  """
  from jflow.serving import logs
  from jflow.serving.engine import Engine
  from jflow.serving.metrics import Metrics

  logs.to_stderr()
  if adapters is None:
    pipeline, beside = model_flags.open_model(args), {}
  else:
    pipeline, beside = model_flags.open_models(args, adapters)
  most = pipeline.model.config.language_model.max_length
  if args.context is not None and args.context > most:
    raise UserError(f"--context={args.context} must be at most the model's {most}")
  return Engine(
    pipeline,
    Metrics(),
    slots=args.slots,
    context=args.context or min(most, _CONTEXT),
    batch=args.batch,
    queue=args.queue,
    timeout=args.timeout,
    adapters=beside,
  )
