"""A store on loopback that fails on order: a server of files, and its fsspec file system "loop".

with loopback.serving() as server:
  server.files["bucket/a.tar"] = b"..."
  server.fail("503", "cut")  # the next two requests
  open_file(f"{server.address}/bucket/a.tar")
"""

import contextlib
import hashlib
import http.client
import http.server
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator

import fsspec

_PATIENCE = 0.4  # seconds without a byte after which the client gives a request up


class Server(http.server.ThreadingHTTPServer):
  """The server. Faults: a status, "drop" (no answer), "cut" (half of the body), "hang", "flip" (a bit of the body), "whole"
  (in place of a range)."""

  daemon_threads = True
  request_queue_size = 64

  def __init__(self) -> None:
    super().__init__(("127.0.0.1", 0), _Handler)
    self.files: dict[str, bytes] = {}
    self.faults: list[str] = []
    self.always: dict[str, str] = {}  # part of a path -> its fault
    self.tags_of_parts = False  # as S3 tags a file that came in parts: not by its MD5
    self.ranges = True  # whether it says that it gives them
    self.asked: list[tuple[str, str]] = []  # method, path
    self.address = f"loop://{self.server_address[1]}"

  def fail(self, *faults: str) -> None:
    self.faults += faults

  def put(self, folder, prefix: str) -> str:
    """Holds the files of a folder; returns their address."""
    for path in sorted(folder.rglob("*")):
      if path.is_file():
        self.files[f"{prefix}/{path.relative_to(folder)}"] = path.read_bytes()
    return f"{self.address}/{prefix}"

  def fault(self, path: str) -> str:
    found = next((fault for part, fault in self.always.items() if part in path), "")
    return found or (self.faults.pop(0) if self.faults else "")

  def handle_error(self, *_) -> None:
    pass  # a client that went away


class _Handler(http.server.BaseHTTPRequestHandler):
  server: Server

  def log_message(self, *_) -> None:
    pass

  def handle_one_request(self) -> None:
    self.raw_requestline = self.rfile.readline(65537)
    if not self.raw_requestline or not self.parse_request():
      self.close_connection = True
      return
    path = urllib.parse.unquote(self.path).lstrip("/")
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    self.server.asked.append((self.command, path))
    fault = self.server.fault(path)
    self.close_connection = True
    if fault == "hang":
      time.sleep(4 * _PATIENCE)
    if fault in ("drop", "hang"):
      return
    if fault.isdigit():
      return self._answer(int(fault), b"")
    files = self.server.files
    if self.command == "PUT":
      files[path] = body[: len(body) // 2] if fault == "cut" else _flipped(body) if fault == "flip" else body
      return self._answer(201, b"")
    if self.command == "DELETE":
      return self._answer(200 if files.pop(path, None) is not None else 404, b"")
    if self.command == "LIST":
      root = path.rstrip("/") + "/"
      found = [name[len(root) :] for name in files if name.startswith(root)]
      entries = [{"name": root + name, **self._about(files[root + name])} for name in found if "/" not in name]
      folders = sorted({name.split("/")[0] for name in found if "/" in name})
      entries += [{"name": root + name, "size": 0, "type": "directory"} for name in folders]
      return self._answer(200 if found else 404, json.dumps(entries).encode())
    if path not in files:
      return self._answer(404, b"")
    data, about = files[path], json.dumps(self._about(files[path]))
    if (found := self.headers.get("Range")) and fault != "whole":
      first, last = map(int, found.removeprefix("bytes=").split("-"))
      data = data[first : last + 1]
    data = _flipped(data) if fault == "flip" else data
    self._answer(200, b"" if self.command == "HEAD" else data, about, fault == "cut")

  def _about(self, data: bytes) -> dict:
    tag = f"{hashlib.md5(data).hexdigest()}{'-1' if self.server.tags_of_parts else ''}"
    more = {"mimetype": "text/html"} if data.startswith(b"<html>") else {}
    more |= {} if self.server.ranges else {"partial": False}
    return {"size": len(data), "type": "file", "ETag": tag, **more}

  def _answer(self, status: int, body: bytes, about: str = "", cut: bool = False) -> None:
    self.send_response(status)
    self.send_header("Content-Length", str(len(body)))
    self.send_header("About", about)
    self.end_headers()
    self.wfile.write(body[: len(body) // 2] if cut else body)


def _flipped(data: bytes) -> bytes:
  middle = len(data) // 2
  return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


class LoopError(Exception):
  """A reply that is none, with its status."""

  def __init__(self, status: int):
    super().__init__(f"status {status}")
    self.status = status


class Loop(fsspec.AbstractFileSystem):
  """fsspec's view of a server."""

  protocol = "loop"

  def _ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[bytes, str]:
    port, _, name = self._strip_protocol(path).partition("/")
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=_PATIENCE)
    with contextlib.closing(connection):
      connection.request(method, "/" + urllib.parse.quote(name), body, headers)
      reply = connection.getresponse()
      if reply.status == 404:
        raise FileNotFoundError(path)
      if reply.status >= 300:
        raise LoopError(reply.status)
      return reply.read(), reply.headers["About"]

  def info(self, path, **_):
    try:
      return {"name": path, **json.loads(self._ask("HEAD", path)[1])}
    except FileNotFoundError:
      self.ls(path)
      return {"name": path, "size": 0, "type": "directory"}

  def ls(self, path, detail=True, **_):
    port = self._strip_protocol(path).partition("/")[0]
    return [{**one, "name": f"{port}/{one['name']}"} for one in json.loads(self._ask("LIST", path)[0])]

  def cat_file(self, path, start=None, end=None, **_):
    span = {} if start is None else {"Range": f"bytes={start}-{end - 1}"}
    return self._ask("GET", path, **span)[0]

  def put_file(self, lpath, rpath, **_):
    with open(lpath, "rb") as file:
      self._ask("PUT", rpath, file.read())

  def rm(self, path, recursive=False, **_):
    for name in self.find(path) or [path]:
      self._ask("DELETE", name)


fsspec.register_implementation("loop", Loop, clobber=True)


@contextlib.contextmanager
def serving() -> Iterator[Server]:
  """A server for a time."""
  with Server() as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
