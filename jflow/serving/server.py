"""The server: runs an ASGI application until a signal, then finishes accepted requests and refuses new ones."""

import functools
import ipaddress
import logging
import math
import os
import signal
import socket
import sys
import types

import uvicorn

from jflow.errors import Stopped, UserError
from jflow.serving import logs
from jflow.serving.connections import Connection, Limits
from jflow.serving.engine import Engine

log = logging.getLogger("jflow.serving")


def bind(host: str, port: int) -> socket.socket:
  """A socket bound to the address, but not yet listening, so that a taken one fails before the model is loaded.

  Raises:
    UserError: the address is taken or not this machine's.
  """
  if not 0 <= port < 65536:
    raise UserError(f"--port={port} must be from 0 (any free one) to 65535")
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  listener = socket.socket(family, socket.SOCK_STREAM)
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((host, port))
  except OSError as error:
    listener.close()
    raise UserError(f"--host={host} --port={port} cannot be taken: {error.strerror or error}") from None
  return listener


def is_local(listener: socket.socket) -> bool:
  """Whether only this machine can connect."""
  return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def address(listener: socket.socket) -> str:
  """http://HOST:PORT of a bound socket."""
  host, port = listener.getsockname()[:2]
  return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
  """uvicorn's server; the first SIGTERM or SIGINT finishes accepted requests, the second ends at once."""

  def __init__(self, app: object, engine: Engine, grace: float, limits: Limits | None = None, ready: str = ""):
    limits = limits or Limits.here()
    config = uvicorn.Config(
      app,
      http=functools.partial(Connection, limits=limits),
      ws="none",
      loop="asyncio",
      log_config=None,
      access_log=False,
      server_header=False,
      timeout_graceful_shutdown=math.ceil(grace),
      timeout_keep_alive=limits.idle,
      backlog=limits.backlog,
    )
    super().__init__(config)
    self._unsaid = ready  # the line, until it is printed
    self._engine, self._ticks = engine, max(1, round(10 * limits.look))

  async def on_tick(self, counter: int) -> bool:
    """Ends slow connections, and the server when the model has failed, so that a supervisor can restart it."""
    if counter % self._ticks == 0:
      for connection in list(self.server_state.connections):
        try:
          connection.look()
        except Exception:  # must not affect other connections
          log.exception("a connection failed")
          connection.end()
    if counter % 10 == 0:
      logs.tell()
    if self._unsaid and self._engine.state == "ready":
      print(self._unsaid, flush=True)
      self._unsaid = ""
    return await super().on_tick(counter) or self._engine.state == "failed"

  def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
    """Like uvicorn's, but leaves the exit code to the command."""
    self.force_exit = self.should_exit
    self.should_exit = True
    if self.force_exit:
      logging.getLogger("uvicorn.error").disabled = True  # cut requests are not errors of the server
    self._engine.drain()


def run(app: object, engine: Engine, listener: socket.socket, grace: float, ready: str = "") -> None:
  """Serves until a signal, after which connections have `grace` seconds to end.

  `ready` is printed once the engine has compiled its programs; requests before that wait for them.

  A second signal ends the process with code 1, since the model's thread may be in a program that cannot be stopped.

  Raises:
    Stopped: the model failed.
  """
  server = Server(app, engine, grace, ready=ready)
  # uvicorn restores these handlers when it ends, so that a late signal kills nothing.
  for signum in (signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, server.handle_exit)
  engine.start()
  server.run(sockets=[listener])
  if server.force_exit:
    print("jflow: stopped at the second signal; requests that ran were cut", file=sys.stderr, flush=True)
    os._exit(1)
  if engine.state == "failed":
    raise Stopped("the model failed; its errors stand above")
  engine.stop()
