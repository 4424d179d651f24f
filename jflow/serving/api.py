"""The HTTP interface: routes in the OpenAI shape over an engine."""

import asyncio
import base64
import contextlib
import functools
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jflow.errors import CannotGenerate, PromptTooLong, UserError
from jflow.serving import prepare, schemas
from jflow.serving.answers import Answer
from jflow.serving.body import Bodies, parse_json
from jflow.serving.engine import Engine
from jflow.serving.jobs import Job, Picture
from jflow.serving.metrics import Metrics
from jflow.serving.schemas import ApiError

log = logging.getLogger("jflow.serving")

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


class Api:
  """The handlers over one engine.

  Attributes:
    app: the ASGI application.
  """

  def __init__(self, engine: Engine, *, name: str, token: str | None, max_body: int):
    """Args: `name` of the model, `token` required of clients (None: none), `max_body` largest request in bytes."""
    self._engine, self._name, self._token = engine, name, token
    self._bodies = Bodies(max_body, engine.timeout)
    self._preparing = prepare.Preparing(engine.pipelines, engine.context, engine.timeout)
    self._images = schemas.ImageRequests.of(engine.pipelines, name)
    self._began = int(time.time())
    routes = [
      Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
      Route("/v1/images/generations", self._guarded(self.images), methods=["POST"]),
      Route("/v1/models", self._guarded(self.models)),
      Route("/v1/models/{name:path}", self._guarded(self.model)),
      Route("/metrics", self._guarded(self.metrics)),
      Route("/health", self.health),
    ]
    app = Starlette(
      routes=routes,
      exception_handlers={
        ApiError: _on_error,
        UserError: lambda request, error: _on_error(request, _of_user(request, error)),
        HTTPException: lambda request, error: _on_error(request, _of_route(request, error)),
        ClientDisconnect: lambda request, error: Response(status_code=499),
        Exception: lambda request, error: _on_error(request, ApiError(500, "the server failed here")),
      },
    )
    self.app = Observed(app, engine.metrics, {route.path for route in routes})

  async def chat(self, request: Request) -> Response:
    """POST /v1/chat/completions."""
    arrived = time.monotonic()
    parse = lambda body: schemas.parse_chat(parse_json(body), self._name, self._engine.adapters)
    chat, work = await self._prepared(request, self._preparing.chat, parse)
    answer = Answer(chat, chat.model or self._name, len(work.tokens), self._engine.pipeline.tokenizer)
    with contextlib.ExitStack() as held:
      job = held.enter_context(self._engine.submit(work, chat.model))
      first = await _while_connected(request, job.next())
      self._engine.metrics.first_token.observe(time.monotonic() - arrived)
      self._engine.metrics.tokens.labels("read").inc(len(work.tokens))
      if not chat.stream:
        return Json(await _while_connected(request, answer.whole(first, job)))
      return AnswerStream(answer.stream(first, job), held.pop_all())

  async def images(self, request: Request) -> Response:
    """POST /v1/images/generations."""
    parse = lambda body: self._images.parse(parse_json(body))
    wanted, work = await self._prepared(request, self._preparing.pictures, parse)
    with self._engine.submit(work, wanted.model) as job:
      made = await _while_connected(request, _all(job, work.count))
    data = [
      {"b64_json": await self._preparing.run(functools.partial(_base64, x)), "seed": work.seed + x.index} for x in made
    ]
    settings = {field.name: getattr(work.settings, field.name) for field in self._engine.pipeline.family.served}
    return Json({"created": int(time.time()), "model": wanted.model or self._name, **settings, "data": data})

  async def models(self, request: Request) -> Response:
    """GET /v1/models."""
    return Json({"object": "list", "data": [self._model(name) for name in ("", *self._engine.adapters)]})

  async def model(self, request: Request) -> Response:
    """GET /v1/models/NAME; without a name, all."""
    if not (name := request.path_params["name"]):
      return await self.models(request)
    if name != self._name and name not in self._engine.adapters:
      raise schemas.no_model(name, (self._name, *self._engine.adapters))
    return Json(self._model("" if name == self._name else name))

  def _model(self, adapter: str) -> dict[str, Any]:
    """The description of the base, or of the model with an adapter."""
    size = self._engine.pipeline.model.config.image_size
    return {
      "id": adapter or self._name,
      "object": "model",
      "created": self._began,
      "owned_by": "jflow",
      "image_size": f"{size}x{size}",
      "context": self._engine.context,
      "can_paint": self._engine.pipeline.can_generate,
    } | ({"parent": self._name} if adapter else {})

  async def health(self, request: Request) -> Response:
    """GET /health: 200 when requests are answered at once, else 503 and the reason."""
    return Json({"status": self._engine.state}, 200 if self._engine.state == "ready" else 503)

  async def metrics(self, request: Request) -> Response:
    """GET /metrics."""
    return Response(self._engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

  def _guarded(self, handler: Handler) -> Handler:
    """The handler, refusing requests without the token."""

    async def guarded(request: Request) -> Response:
      if self._token is not None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self._token.encode())
        if scheme.lower() != "bearer" or not right:
          headers = {"WWW-Authenticate": "Bearer"}
          raise ApiError(401, "this server needs a token: send Authorization: Bearer TOKEN", headers=headers)
      return await handler(request)

    return guarded

  async def _prepared(
    self,
    request: Request,
    work: Callable[[Callable[[], T]], Coroutine[Any, Any, Any]],
    parse: Callable[[bytes], T],
  ) -> Any:
    """Reads and checks a body, and awaits its work; cancelled when the client disconnects.

    A place in the queue is taken when the body has arrived.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
      raise ApiError(415, "send JSON, with the header Content-Type: application/json")
    self._engine.check_room()
    async with self._bodies.read(request) as body:
      with self._engine.coming():
        return await _while_connected(request, work(lambda: parse(body)))


class Json(Response):
  """A JSON response in ASCII, which can hold any text of a client, lone surrogates included."""

  media_type = "application/json"

  def render(self, content: Any) -> bytes:
    return json.dumps(content).encode()


class AnswerStream(StreamingResponse):
  """Server-sent events; releases its resources when they end or the client disconnects."""

  def __init__(self, events: AsyncIterator[str], held: contextlib.ExitStack):
    super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    self._held = held

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    with self._held:
      await super().__call__(scope, receive, send)


class Observed:
  """Middleware that counts and logs requests."""

  def __init__(self, app: ASGIApp, metrics: Metrics, paths: set[str]):
    self._app, self._metrics, self._paths = app, metrics, paths

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      return await self._app(scope, receive, send)
    started, status = time.monotonic(), 499

    async def watched(message: Message) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
      await send(message)

    try:
      await self._app(scope, receive, watched)
    finally:
      seconds = time.monotonic() - started
      status = scope.get("state", {}).get("refused", status)  # by its connection
      path = scope["path"] if scope["path"] in self._paths else "other"
      self._metrics.requests.labels(path, status).inc()
      self._metrics.seconds.labels(path).observe(seconds)
      level = logging.DEBUG if path in ("/health", "/metrics") else logging.INFO
      kind = {"kind": (path, status)}
      log.log(level, "%s %s %d %.2f s", scope["method"][:16], path, status, seconds, extra=kind)


async def _while_connected(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
  """The result of work; raises ClientDisconnect when the client disconnects first."""

  async def left() -> None:
    while (await request.receive())["type"] != "http.disconnect":
      pass

  tasks = [asyncio.ensure_future(work), asyncio.ensure_future(left())]
  try:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    if not tasks[0].done():
      raise ClientDisconnect()
    return tasks[0].result()
  finally:
    for task in tasks:
      # No client is left to receive it.
      task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
      task.cancel()


async def _all(job: Job, count: int) -> list[Picture]:
  return sorted([await job.next() for _ in range(count)], key=lambda picture: picture.index)


def _base64(picture: Picture) -> str:
  """An image as base64 of a PNG file."""
  return base64.b64encode(picture.png()).decode()


def _on_error(request: Request, error: ApiError) -> Response:
  return Json(error.body(), error.status, error.headers)


def _of_user(request: Request, error: UserError) -> ApiError:
  """The response to an error found only when the whole conversation or prompt is read."""
  if isinstance(error, prepare.UnreadableImage):
    return ApiError(400, f"{error.field}: {error}", error.field, code="invalid_image")
  if isinstance(error, CannotGenerate):
    return ApiError(400, str(error), "model")
  field = "prompt" if request.scope["path"].endswith("generations") else "messages"
  code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
  return ApiError(400, str(error), field, code=code)


def _of_route(request: Request, error: HTTPException) -> ApiError:
  allowed = dict(error.headers or {})
  if error.status_code == 405:
    return ApiError(405, f"{request.scope['path']} needs {allowed.get('Allow', 'another method')}", None, allowed)
  return ApiError(error.status_code, f"there is no {request.scope['path'][:80]!r} here", None, allowed)
