"""The command `serve`: serves a model over HTTP."""

import argparse
import pathlib

from jflow.cli import serving_flags as flags
from jflow.cli.arguments import Parser, path, whole
from jflow.errors import UserError

_EPILOG = """
examples:
  python -m jflow serve --checkpoint=world
  python -m jflow serve --checkpoint=JanusFlow-1.3B --vae=sdxl-vae --host=0.0.0.0 --token_file=token.txt --slots=16
  python -m jflow serve --checkpoint=runs/janusflow --adapter=birds=adapters/birds --adapter=ink=adapters/ink

  curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" \\
    -d '{"messages": [{"role": "user", "content": "What is a ring?"}], "stream": true}'
  curl localhost:8000/v1/images/generations -H "Content-Type: application/json" \\
    -d '{"prompt": "a picture of a red ring", "n": 2, "seed": 0}'

SIGTERM or Ctrl-C: new requests are refused, those that were accepted are finished, exit code 0. A second signal cuts
them, exit code 1.
"""


def parser() -> argparse.ArgumentParser:
  """The flags of `serve`."""
  p = Parser(
    prog="python -m jflow serve",
    description="Serves a model over HTTP in the OpenAI shape: /v1/chat/completions, /v1/images/generations, /v1/models, "
    "/health, /metrics.",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  flags.add(p, port=8000, several=True)
  p.add_argument("--name", metavar="TEXT", help="of the model, as clients see it (default: the checkpoint's folder)")
  p.add_argument("--max_body", type=whole(), default=20, metavar="MB", help="largest request (default %(default)s)")
  secret = p.add_mutually_exclusive_group()
  secret.add_argument("--token", metavar="TEXT", help="what clients must bear (others here can read it in `ps`)")
  secret.add_argument("--token_file", type=path, metavar="FILE", help="a file that holds the token")
  return p


def main(argv: list[str]) -> int:
  """Serves until a signal."""
  args = parser().parse_args(argv)
  flags.check(args)
  if args.max_body < 1:
    raise UserError(f"--max_body={args.max_body} must be at least 1")
  token = read_token(args.token, args.token_file)

  from jflow.serving import server
  from jflow.serving.api import Api
  from jflow.serving.hosts import Guarded, Hosts

  name = args.name or pathlib.Path(args.checkpoint).resolve().name
  adapters = flags.adapters_of(args, name)
  listener = server.bind(args.host, args.port)
  engine = flags.engine(args, adapters)
  api = Api(engine, name=name, token=token, max_body=args.max_body * 2**20)
  names = ", ".join(map(repr, (name, *adapters)))
  where = server.address(listener)
  print(f"starting at {where}; requests wait until all is compiled ...", flush=True)
  if token is None and not server.is_local(listener):
    print(
      f"warning: --host={args.host} lets others connect, and without --token_file anyone may use the model",
      flush=True,
    )
  app = Guarded(api.app, Hosts(listener, args.host, args.allowed_host))
  server.run(app, engine, listener, args.timeout + 5, ready=f"serving {names} at {where}; Ctrl-C ends it")
  print("stopped; every request that was accepted has its answer")
  return 0


def read_token(token: str | None, file: pathlib.Path | None) -> str | None:
  """The token of the flags; None if there is none.

  Raises:
    UserError: the file cannot be read, or the token is not one word of printable ASCII.
  """
  if file is not None:
    try:
      token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f"--token_file={file} cannot be read as text: {error}") from None
  if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
    raise UserError("the token must be one word of printable ASCII characters")
  return token
