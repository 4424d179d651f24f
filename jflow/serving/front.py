"""The front of the page: a filter of the requests that reach Gradio, and of their contents.

Gradio opens, copies and serves any file named by a value of a request, at many addresses. So it receives no value from
a client: they are extracted here and passed to the page's own functions, which check them. Uploads and files are
handled here too, and addresses that the page does not need do not exist.
"""

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jflow.serving.body import Bodies, parse_json
from jflow.serving.schemas import ApiError
from jflow.serving.visitors import Session, Visitors

# The content security policy: the browser refuses to fetch from other origins.
POLICY = (
  "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
  "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; connect-src 'self' data: blob:; "
  "object-src 'none'; base-uri 'self'; frame-ancestors 'none'"
)
MAX_BODY = 2**20  # bytes of a request other than an upload
_UPLOADS = 16  # files of one upload
_UPLOADING = 4  # uploads of the largest size read at the same time
_PIECE = 2**18  # bytes
_BEAT = 15  # seconds between two heartbeats to an open page
_HEADERS = {  # what Gradio sees of a request
  b"host",
  b"accept",
  b"if-none-match",
  b"if-modified-since",
  b"range",
  b"x-forwarded-host",
  b"x-forwarded-proto",
}
_COOKIE = re.compile(r"[A-Za-z0-9_-]{20,64}")
_ASSET = re.compile(r"(?!.*\.\.)[A-Za-z0-9_-][A-Za-z0-9_./-]*")
_PICTURES = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF8", "image/gif"))


class Asked(NamedTuple):
  """A visitor's event: the session, and the values of the components in the order of the event's inputs."""

  session: Session
  values: list[Any]


class Front:
  """The page's application in front of Gradio's."""

  def __init__(
    self,
    inner: Starlette,
    visitors: Visitors,
    events: Mapping[int, tuple[int, bool]],
    seconds: float,
    closing: Callable[[], bool],
  ):
    """Makes the application.

    Args:
      inner: Gradio's.
      events: number of the event -> (number of its values, whether it is queued).
      seconds: for a request to arrive.
      closing: whether the server is shutting down.
    """
    self._inner, self._visitors, self._events, self._closing = inner, visitors, events, closing
    self._cookie = f"jflow_{secrets.token_hex(4)}"  # two servers on one host share a browser's cookies
    self._bodies = Bodies(MAX_BODY, seconds)
    largest = min(_UPLOADS * visitors.max_upload, visitors.max_bytes) + MAX_BODY
    self._uploads = Bodies(largest, seconds, kept=_UPLOADING)
    read, api = ["GET"], "/gradio_api"
    self._app = Starlette(
      routes=[
        Route("/", self.whole, methods=read),
        *(
          Route(path, self.whole, methods=read) for path in ("/config", "/theme.css", "/manifest.json", "/favicon.ico")
        ),
        Route(f"{api}/app_id", self.whole, methods=read),
        Route("/assets/{path:path}", self.asset, methods=read),
        Route("/static/{path:path}", self.asset, methods=read),
        Route(f"{api}/upload", self.upload, methods=["POST"]),
        Route(f"{api}/file={{path:path}}", self.file, methods=read),
        Route(f"{api}/heartbeat/{{name}}", self.heartbeat, methods=read),
        Route(f"{api}/queue/join", self.join, methods=["POST"]),
        Route(f"{api}/run/predict", self.run, methods=["POST"]),
        Route(f"{api}/queue/data", self.data, methods=read),
        Route(f"{api}/cancel", self.cancel, methods=["POST"]),
        Route(f"{api}/reset", self.reset, methods=["POST"]),
      ],
      exception_handlers={
        ApiError: lambda request, error: _refusal(error.status, error.message),
        HTTPException: lambda request, error: _refusal(error.status_code, "there is nothing here"),
        ClientDisconnect: lambda request, error: Response(status_code=499),
      },
      lifespan=lambda app: inner.router.lifespan_context(inner),
    )
    self._app.router.redirect_slashes = False

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] not in ("http", "lifespan"):
      return

    async def confined(message: Message) -> None:
      if message["type"] == "http.response.start":
        headers = [
          (b"content-security-policy", POLICY.encode()),
          (b"x-content-type-options", b"nosniff"),
          (b"referrer-policy", b"same-origin"),
        ]
        if scope["path"] in ("/", "/config") and self._owner(Request(scope)) is None:
          cookie = f"{self._cookie}={secrets.token_urlsafe(18)}; Path=/; HttpOnly; SameSite=Lax"
          headers.append((b"set-cookie", cookie.encode()))
        message["headers"] = [*message.get("headers", ()), *headers]
      await send(message)

    await self._app(scope, receive, confined)

  # --- what does not depend on the visitor ----------------------------------------------------------------

  async def whole(self, request: Request) -> ASGIApp:
    """The page and its description."""
    return self._passed(request)

  async def asset(self, request: Request) -> ASGIApp:
    """Gradio's own scripts, styles and fonts."""
    if not _ASSET.fullmatch(request.path_params["path"]):
      raise HTTPException(404)
    return self._passed(request)

  async def reset(self, request: Request) -> Response:
    """Does nothing: the page cancels through `cancel`."""
    return JSONResponse({"success": True})

  # --- files ----------------------------------------------------------------------------------------------

  async def upload(self, request: Request) -> Response:
    """Stores files for this visitor; answers with the paths that name them."""
    async with self._uploads.read(request) as body:
      try:
        form = await MultiPartParser(
          request.headers, _pieces(body), max_files=_UPLOADS, max_fields=_UPLOADS, max_part_size=2**16
        ).parse()
      except (MultiPartException, KeyError) as error:
        raise ApiError(400, f"an upload must be multipart/form-data: {getattr(error, 'message', 'no type')}") from None
    try:
      files = [x for x in form.getlist("files") if not isinstance(x, str)]
      if not files:
        raise ApiError(400, "the upload holds no files")
      if any(x.size > self._visitors.max_upload for x in files):
        raise ApiError(413, f"a file has more than {self._visitors.max_upload:,} bytes, the most that is taken")
      kept = []
      for file in files:
        data = await file.read()
        name = (file.filename or "file")[-100:].encode("utf-8", "replace").decode()
        kept.append(await self._visitors.keep(self._owner(request), name, _kind(data), data))
    finally:
      await form.close()
    return JSONResponse([x.path for x in kept])

  async def file(self, request: Request) -> Response:
    """A file written for this visitor, by its exact path."""
    file = self._visitors.file(request.path_params["path"], self._owner(request))
    if file is None:
      raise HTTPException(404)
    picture = file.kind.startswith("image/")
    return FileResponse(
      file.path,
      media_type=file.kind,
      headers={"Cache-Control": "private"},
      filename=None if picture else file.name,
    )

  # --- sessions -------------------------------------------------------------------------------------------

  async def heartbeat(self, request: Request) -> Response:
    """A stream that stays open as long as the page does."""
    session = self._visitors.session(request.path_params["name"], self._owner(request), new=True)
    return Stream(self._alive(session), session)

  async def _alive(self, session: Session) -> AsyncIterator[str]:
    beats = 0
    async for _ in session.beats():
      if self._closing():
        return
      if beats % _BEAT == 0:
        yield "data: ALIVE\n\n"
      beats += 1

  async def join(self, request: Request) -> ASGIApp:
    """Queues an event of the page."""
    return await self._event(request, queued=True)

  async def run(self, request: Request) -> ASGIApp:
    """Runs an event of the page without the queue."""
    return await self._event(request, queued=False)

  async def data(self, request: Request) -> ASGIApp:
    """The stream of a session's events."""
    name = request.query_params.get("session_hash")
    session = self._visitors.session(name, self._owner(request))
    inner = self._passed(request, query=f"session_hash={name}")

    async def listened(scope: Scope, receive: Receive, send: Send) -> None:
      gone = False

      async def watched() -> Message:
        nonlocal gone
        message = await receive()
        gone = gone or message["type"] == "http.disconnect"
        return message

      try:
        with session.connected(listens=True):
          await inner(scope, watched, send)
      finally:
        if gone:
          session.leave()

    return listened

  async def cancel(self, request: Request) -> ASGIApp:
    """Cancels an event of this session."""
    body = await self._body(request)
    session = self._visitors.session(body.get("session_hash"), self._owner(request))
    index, event = body.get("fn_index"), body.get("event_id")
    if not self._known(index) or event not in session.events:
      raise ApiError(404, "there is no such event")
    return self._passed(request, {"session_hash": body["session_hash"], "fn_index": index, "event_id": event})

  async def _event(self, request: Request, queued: bool) -> ASGIApp:
    """An event, passed to Gradio without its values."""
    body = await self._body(request)
    index, values, trigger = body.get("fn_index"), body.get("data"), body.get("trigger_id")
    if not self._known(index) or self._events[index][1] != queued:
      raise ApiError(404, "there is no such event", "fn_index")
    count = self._events[index][0]
    if not isinstance(values, list) or len(values) != count:
      raise ApiError(400, f"data must be a list of {count} values", "data")
    session = self._visitors.session(body.get("session_hash"), self._owner(request), new=True)
    request.scope["state"] = {**request.scope.get("state", {}), "asked": Asked(session, values)}
    rest = {
      "data": [None] * count,
      "fn_index": index,
      "session_hash": body["session_hash"],
      "trigger_id": trigger if type(trigger) is int and 0 <= trigger < 2**31 else None,
    }
    return self._passed(request, rest, answered=lambda answer: _note(session, answer))

  async def _body(self, request: Request) -> dict[str, Any]:
    """The JSON object of a body; NaN and infinities are kept for the check of their field."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
      raise ApiError(415, "send JSON, with the header Content-Type: application/json")  # no form of another page can
    async with self._bodies.read(request) as body:
      return parse_json(body, constant=float)

  def _known(self, index: object) -> bool:
    return type(index) is int and index in self._events

  def _owner(self, request: Request) -> str | None:
    """The visitor of a request; None for a client without the cookie."""
    cookie = request.cookies.get(self._cookie, "")
    return cookie if _COOKIE.fullmatch(cookie) else None

  def _passed(
    self,
    request: Request,
    body: Mapping[str, Any] | None = None,
    query: str = "",
    answered: Callable[[bytes], None] | None = None,
  ) -> ASGIApp:
    """Gradio's answer to a request reduced to its path, a few headers, and this body and query."""
    content = b"" if body is None else json.dumps(body).encode()
    headers = [(k, v) for k, v in request.scope["headers"] if k in _HEADERS]
    headers.append((b"content-length", str(len(content)).encode()))
    if body is not None:
      headers.append((b"content-type", b"application/json"))
    elif "br" in request.headers.get("accept-encoding", ""):
      headers.append((b"accept-encoding", b"br"))

    async def passed(scope: Scope, receive: Receive, send: Send) -> None:
      came, answer = False, b""

      async def given() -> Message:
        nonlocal came
        if came:
          return await receive()
        came = True
        return {"type": "http.request", "body": content, "more_body": False}

      async def heard(message: Message) -> None:
        nonlocal answer
        if answered and message["type"] == "http.response.body":
          answer += message.get("body", b"")
          if not message.get("more_body"):
            answered(answer)
        await send(message)

      seen = {k: v for k, v in scope.items() if k not in ("path_params", "endpoint", "router", "app")}
      await self._inner(seen | {"headers": headers, "query_string": query.encode()}, given, heard)

    return passed


class Stream(StreamingResponse):
  """Server-sent events that keep a session open."""

  def __init__(self, events: AsyncIterator[str], session: Session):
    super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    self._session = session

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    with self._session.connected(listens=False):
      await super().__call__(scope, receive, send)


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
  """Yields a body in pieces, so that other requests are served in between."""
  for at in range(0, len(body), _PIECE):
    yield body[at : at + _PIECE]
    await asyncio.sleep(0)


def _note(session: Session, answer: bytes) -> None:
  """Stores the identifier that Gradio gave to an event."""
  try:
    session.events.append(json.loads(answer)["event_id"])
  except (ValueError, KeyError, TypeError):
    pass  # it was not queued


def _kind(data: bytes) -> str:
  """The media type of an image by its first bytes; for other files one that browsers do not display."""
  if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
    return "image/webp"
  return next((kind for start, kind in _PICTURES if data.startswith(start)), "application/octet-stream")


def _refusal(status: int, message: str) -> Response:
  """An error in the form that Gradio's script displays."""
  return JSONResponse({"detail": message, "error": message}, status)
