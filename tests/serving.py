"""A server over the tiny model, inside the tests' process, so that its programs are compiled once."""

import contextlib
import threading
import time
from collections.abc import Collection, Iterator

import httpx

from jflow.generation.flow import FAMILY
from jflow.inference.decoding import Decoder
from jflow.inference.pipeline import Pipeline
from jflow.serving import schemas, server
from jflow.serving.api import Api
from jflow.serving.engine import Engine
from jflow.serving.hosts import Guarded, Hosts
from jflow.serving.metrics import Metrics

NAME = "tiny"


def images(body: dict) -> schemas.Images:
  """A request for images of the tiny model, parsed."""
  return schemas.ImageRequests(FAMILY, "m", 16).parse(body)


@contextlib.contextmanager
def serving(
  model: Pipeline, app=None, token=None, max_body=2**20, allowed=(), limits=None, **options
) -> Iterator[tuple[str, Engine]]:
  """Yields (address, engine); `app` makes another application from the engine."""
  options = {"slots": 4, "context": 128, "batch": 4, "queue": 64, "timeout": 60.0} | options
  engine = Engine(model, Metrics(), **options)
  listener = server.bind("127.0.0.1", 0)
  base = server.address(listener)
  app = app(engine) if app else Api(engine, name=NAME, token=token, max_body=max_body).app
  app = Guarded(app, Hosts(listener, "127.0.0.1", allowed))
  running = server.Server(app, engine, grace=2, limits=limits)
  engine.start()
  thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
  thread.start()
  try:
    until(lambda: engine.state != "warming up" and running.started or not thread.is_alive(), seconds=300)
    assert thread.is_alive() and engine.state == "ready", "the server ended before it was ready"
    yield base, engine
  finally:
    running.should_exit = True
    thread.join(180)  # a program that is being compiled is waited for
    assert not thread.is_alive(), "the server does not end"
    engine.stop()


def said(response) -> str:
  """The text of an answer of the API."""
  assert response.status_code == 200, response.text
  return response.json()["choices"][0]["message"]["content"]


def decoder(engine: Engine) -> Decoder:
  """The slots where the engine answers with the model itself, without an adapter."""
  return engine._decoders[""]


def requests(engine: Engine) -> Collection:
  """Requests that the engine has taken and not answered yet."""
  return engine._open


def until(condition, seconds=20.0) -> None:
  """Waits for a condition; fails after so many seconds without it."""
  limit = time.monotonic() + seconds
  while not condition():
    if time.monotonic() >= limit:
      raise AssertionError("it never came true")
    time.sleep(0.01)


def client(base: str, **options) -> httpx.Client:
  return httpx.Client(base_url=base, timeout=60, **options)
