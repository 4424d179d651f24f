"""The command `demo`: serves a page to chat about pictures and to generate them."""

import argparse
import os
import pathlib
import tempfile

from jflow.cli import serving_flags as flags
from jflow.cli.arguments import Parser, whole
from jflow.errors import UserError, need_extra

_EPILOG = """
examples:
  python -m jflow demo --checkpoint=world
  python -m jflow demo --checkpoint=JanusFlow-1.3B --vae=sdxl-vae --port=7861

The page needs no network. On a distant machine, `ssh -L 7860:localhost:7860 HOST` brings it here.
"""


def parser() -> argparse.ArgumentParser:
  """The flags of `demo`."""
  p = Parser(
    prog="python -m jflow demo",
    description="Serves a page to chat about pictures and to generate them, with one loaded model. Needs the extra `demo`.",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  flags.add(p, port=7860)
  p.add_argument(
    "--max_upload", type=whole(), default=20, metavar="MB", help="largest picture to upload (default %(default)s)"
  )
  return p


def main(argv: list[str]) -> int:
  """Serves the page until a signal."""
  args = parser().parse_args(argv)
  flags.check(args, extra="demo")
  if args.max_upload < 1:
    raise UserError(f"--max_upload={args.max_upload} must be at least 1")
  need_extra("demo", "gradio", "fastapi")
  with tempfile.TemporaryDirectory(prefix="jflow-demo-") as uploads:
    os.environ["GRADIO_TEMP_DIR"] = uploads  # private, and gone at the end
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"  # it computes over all of them after each
    from jflow.serving import demo, server
    from jflow.serving.hosts import Guarded, Hosts

    listener = server.bind(args.host, args.port)
    engine = flags.engine(args)
    app = demo.app(engine, pathlib.Path(args.checkpoint).resolve().name, args.max_upload, pathlib.Path(uploads))
    where = server.address(listener)
    print(f"starting the page at {where}; what is asked waits until all is compiled ...", flush=True)
    if not server.is_local(listener):
      print(f"warning: --host={args.host} lets others use the page, which asks for no password", flush=True)
    app = Guarded(app, Hosts(listener, args.host, args.allowed_host))
    server.run(app, engine, listener, grace=5, ready=f"the page is at {where}; Ctrl-C ends it")
  return 0
