"""A visitor of the page who speaks HTTP: what the page's script asks for, and what it should never get."""

import contextlib
import http.server
import json
import pathlib
import re
import secrets
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, Self

import httpx

SECRET = "canary-7f3a"  # stands in files that nobody may get
PLAIN = (
  "slider",
  "number",
  "dropdown",
  "checkbox",
  "textbox",
  "state",
)  # components whose values are no files
_PATH = re.compile(r'"(?:path|url)":\s*"([^"]+)"')


class Visitor:
  """One visitor with his cookie and one open page.

  Attributes:
    http: the client.
    session: name of the open page.
    events: what the page can do, by name.
  """

  def __init__(self, base: str):
    self.http = httpx.Client(base_url=base, timeout=60)
    self.session = secrets.token_hex(6)
    config = self.http.get("/config").json()
    self._kinds = {x["id"]: (x["type"], x["props"].get("value")) for x in config["components"]}
    self.events = {x["api_name"]: x for x in config["dependencies"] if x["backend_fn"]}

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.http.close()

  def values(self, event: str, **others: Any) -> list[Any]:
    """The values that the page sends when nothing was changed but a text; `others` by the position _0, _1, ..."""
    texts = {"multimodaltextbox": {"text": "Why?", "files": []}, "textbox": "a red ring", "chatbot": []}
    values = [texts.get(kind, value) for kind, value in map(self._kinds.get, self.events[event]["inputs"])]
    for position, value in others.items():
      values[int(position[1:])] = value
    return values

  def kinds(self, event: str) -> list[str]:
    """The kinds of the components whose values an event takes."""
    return [self._kinds[i][0] for i in self.events[event]["inputs"]]

  def upload(self, data: bytes, name: str = "a.png") -> str:
    """The path by which the page knows an upload from now on."""
    return self.http.post("/gradio_api/upload", files=[("files", (name, data))]).raise_for_status().json()[0]

  def join(self, event: str | int, values: Any, session: str | None = None, **more: Any) -> httpx.Response:
    """Asks for an event."""
    index = self.events[event]["id"] if isinstance(event, str) else event
    body = {"data": values, "fn_index": index, "session_hash": session or self.session} | more
    return self.http.post(
      "/gradio_api/queue/join", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )

  @contextlib.contextmanager
  def listening(self, session: str | None = None) -> Iterator[Iterator[dict[str, Any]]]:
    """The messages of a session as they come."""
    query = {"session_hash": session or self.session}
    with self.http.stream("GET", "/gradio_api/queue/data", params=query) as response:
      response.raise_for_status()
      yield _messages(response)

  def ask(self, event: str, values: Any) -> list[dict[str, Any]]:
    """Asks for an event and reads all messages about it; [] where it was refused at once."""
    if self.join(event, values).status_code != 200:
      return []
    with self.listening() as messages:
      return list(messages)


def _messages(response: httpx.Response) -> Iterator[dict[str, Any]]:
  for line in response.iter_lines():
    if line.startswith("data:"):
      message = json.loads(line[5:])
      if message["msg"] == "close_stream":
        return
      yield message


@contextlib.contextmanager
def elsewhere() -> Iterator[tuple[str, list[str]]]:
  """Another server: (the address of a secret there, the requests that it got)."""
  asked: list[str] = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
      asked.append(self.path)
      self.send_response(200)
      self.end_headers()
      self.wfile.write(SECRET.encode())

    def log_message(self, *_: object) -> None:
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield f"http://127.0.0.1:{server.server_port}/x.png", asked
  finally:
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def secrets_of(base: str, folder: pathlib.Path) -> Iterator[list[str]]:
  """Files that a visitor may not get: of the machine, of the page's folder, and of a visitor who is here."""
  with tempfile.TemporaryDirectory() as elsewhere, Visitor(base) as owner:
    name = secrets.token_hex(4)
    outside, inside, link, linked = (
      pathlib.Path(elsewhere) / "x.txt",
      *(folder / f"{name}{x}" for x in ("", ".txt", "z")),
    )
    for file in (outside, inside):
      file.write_text(SECRET)
    link.symlink_to(outside)
    linked.symlink_to(outside.parent)
    theirs = owner.upload(SECRET.encode(), "theirs.txt")
    assert SECRET in owner.http.get(f"/gradio_api/file={theirs}").text  # which its owner gets
    yield [str(x) for x in (outside, inside, link, linked / "x.txt", theirs)]
    for file in (inside, link, linked):
      file.unlink()


def warnings(messages: list[dict[str, Any]]) -> list[str]:
  """The texts that the visitor was told."""
  return [x["log"] for x in messages if x["msg"] == "log" and x["level"] == "warning"]


def files(messages: list[dict[str, Any]]) -> list[str]:
  """Addresses of the files that messages name."""
  found = dict.fromkeys(_PATH.findall(json.dumps(messages)))
  return [x if x.startswith(("http", "/gradio_api")) else f"/gradio_api/file={x}" for x in found]


def hostile(path: str, url: str) -> Iterator[Any]:
  """The forms in which a value can name a file or an address, so that Gradio opens it."""
  data = {"_type": "gradio.FileData"}
  file = {"path": path, "meta": data}
  fetched = {"path": url, "url": url, "meta": data}
  yield from (
    file,
    {"path": path},
    path,
    [path],
    [[path, None]],
    [file],
    {"value": file},
    f"file://{path}",
    [[file]],
  )
  yield from (
    fetched,
    {"url": url, "path": None, "meta": data},
    url,
    {"path": f"file://{path}", "meta": data},
  )
  yield from (
    {"name": path, "is_file": True},
    {"name": path, "data": None, "is_file": True, "orig_name": "x"},
  )
  yield from (
    file | {"is_stream": True},
    file | {"url": f"/gradio_api/file={path}"},
    {"image": file},
    [{"image": file}],
  )
  for inner in (file, {"path": path}, path, fetched, {"file": file}, [file]):
    yield {"text": "Why?", "files": [inner]}
  yield {"text": "Why?", "files": file}
  for content in (
    file,
    {"path": path},
    [{"type": "file", "file": file}],
    [path],
    {"component": "image", "value": file},
    {"type": "component", "component": "file", "value": file, "constructor_args": {}, "props": {}},
  ):
    yield [{"role": "user", "content": content, "metadata": None, "options": None}]
  yield [{"role": "user", "content": "x", "metadata": {"title": file}, "options": [{"value": "x", "icon": file}]}]
  yield {"__type__": "update", "value": file}
