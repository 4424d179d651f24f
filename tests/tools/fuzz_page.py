"""Fuzzes the endpoints of `demo`'s page: python tests/tools/fuzz_page.py --seed=0 --tries=2000

A try is one request of a visitor whom nobody should trust: an event with values that are trees of odd and of file-like
things, an upload, a file, a stream, in any order and for any session, or anything at an address of Gradio. Asked is
that no try is answered with an error of the server or with what stands in a file that is not this visitor's, that none
fetches an address, that each is answered in time, and that another visitor is answered and painted for all the while.
Prints one line of JSON, {"tried", "escaped", "hung", "lost"}, and on stderr what broke and how to see it again.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

import httpx
import visiting
from visiting import Visitor

SECONDS = 30  # of one answer, far beyond what one takes
SOUND = 50  # tries between two looks at another visitor
REFUSALS = (503, 507)  # of a server that works, but is full

ODD: tuple[Any, ...] = (
  None,
  True,
  False,
  0,
  -1,
  2.5,
  2**63,
  10**40,
  float("nan"),
  float("inf"),
  -float("inf"),
  "",
  " ",
  "x",
  "\ud800",
  "a\0b",
  "\u202e",
  "x" * 70_000,
  "<script>alert(1)</script>",
  "![x](/etc/passwd)",
  "a ring",
  "euler",
  "heun",
  "<image_placeholder>",
  "../../etc/passwd",
  "file:///etc/passwd",
  "data:image/png;base64,AAAA",
  "null",
  "[]",
  "{}",
  [],
  {},
  [[]],
  [{}],
  [None],
  [0] * 500,
  {"__type__": "update"},
  {"text": None, "files": None},
  {"text": "Why?", "files": []},
  {"text": "Why?"},
)
KEYS = (
  "path",
  "url",
  "meta",
  "_type",
  "file",
  "files",
  "text",
  "value",
  "role",
  "content",
  "type",
  "__type__",
  "data",
  "",
)
ADDRESSES = (
  "/",
  "/config",
  "/info",
  "/login",
  "/logout",
  "/theme.css",
  "/manifest.json",
  "/favicon.ico",
  "/monitoring",
  "/robots.txt",
  "/static/",
  "/assets/",
  "/svelte/",
  "/pwa_icon",
  "/gradio_api",
  "/gradio_api/info",
  "/gradio_api/api/",
  "/gradio_api/run/",
  "/gradio_api/call/",
  "/gradio_api/call/v2/",
  "/gradio_api/file=",
  "/gradio_api/file/",
  "/gradio_api/proxy=",
  "/file=",
  "/gradio_api/upload",
  "/gradio_api/upload_progress",
  "/gradio_api/component_server",
  "/gradio_api/stream/",
  "/gradio_api/deep_link",
  "/gradio_api/queue/join",
  "/gradio_api/queue/data",
  "/gradio_api/queue/status",
  "/gradio_api/reset",
  "/gradio_api/cancel",
  "/gradio_api/process_recording",
  "/gradio_api/run-history/",
  "/gradio_api/startup-events",
  "/gradio_api/custom_component/",
  "/gradio_api/vibe-code/",
  "/gradio_api/mcp/",
  "/gradio_api/openapi.json",
)


class Fuzzer:
  """Random requests to a page at `base`; `files` are those that nobody may get, `url` what nobody may fetch."""

  def __init__(self, base: str, files: list[str], url: str, rng: random.Random):
    self._rng, self._files, self._url = rng, files, url
    self._visitor, self.other = Visitor(base), Visitor(base)
    self._uploads: list[str] = []
    self._visitor.http.timeout = httpx.Timeout(SECONDS)
    for visitor in (self._visitor, self.other):  # each of whom has a page open
      visitor.http.post("/gradio_api/run/predict", json=self._forget(visitor)).raise_for_status()

  def one(self) -> tuple[str, str]:
    """One try: (what was tried, what was got)."""
    return self._rng.choice(
      (self._event, self._event, self._event, self._upload, self._file, self._anything, self._session)
    )()

  def sound(self) -> bool:
    """Whether another visitor is answered and painted for."""
    asked = self.other.ask("answer", self.other.values("answer", _3=1))
    painted = self.other.ask("paint", self.other.values("paint", _1=1, _2=1))
    self.other.http.post("/gradio_api/run/predict", json=self._forget(self.other))
    return all(x and x[-1].get("success") and not visiting.warnings(x) for x in (asked, painted))

  def _forget(self, visitor: Visitor) -> dict[str, Any]:
    event = next(x for x in visitor.events.values() if x["queue"] is False and len(x["outputs"]) == 2)
    return {"fn_index": event["id"], "data": [], "session_hash": visitor.session}

  def _event(self) -> tuple[str, str]:
    """An event with some of its values spoiled, and all that comes of it."""
    rng, visitor = self._rng, self._visitor
    name = rng.choice(("answer", "paint", "paint", rng.choice(list(visitor.events))))
    values = visitor.values(name, **{"answer": {"_3": 1}, "paint": {"_1": 1, "_2": 1}}.get(name, {}))
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
      if values:
        values[rng.randrange(len(values))] = self._tree()
    body: dict[str, Any] = {
      "data": values,
      "fn_index": visitor.events[name]["id"],
      "session_hash": self._name(),
    }
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
      key = rng.choice(
        (
          "data",
          "fn_index",
          "session_hash",
          "event_id",
          "event_data",
          "trigger_id",
          "batched",
          "simple_format",
        )
      )
      body[key] = self._tree() if rng.random() < 0.7 else rng.randrange(-2, 20)
    address = rng.choice(("/gradio_api/queue/join",) * 4 + ("/gradio_api/run/predict", "/gradio_api/call/answer"))
    tried, got = self._send("POST", address, json.dumps(body).encode())
    if '"event_id"' in got and body["session_hash"] == visitor.session and rng.random() < 0.9:
      got += self._events()
    return tried, got

  def _events(self) -> str:
    """The outcome of the events of this session, with the files that it names."""
    with self._visitor.listening() as messages:
      told = list(messages)
    failed = [x for x in told if x["msg"] == "process_completed" and not x["success"]]
    got = "".join(self._visitor.http.get(x).text for x in visiting.files(told) if x.startswith("/"))
    return json.dumps(told) + got + ("\nfailed" if failed else "")

  def _upload(self) -> tuple[str, str]:
    rng = self._rng
    body = b"".join(
      b'--B\r\nContent-Disposition: form-data; name="%s"; filename="%s"\r\n\r\n%s\r\n'
      % (
        rng.choice((b"files", b"files", b"x")),
        rng.choice((b"a.png", b"../../a.png", b"/etc/x", b"\xff\x00", b"", b"a" * 300)),
        rng.randbytes(rng.choice((0, 10, 1000))),
      )
      for _ in range(rng.choice((0, 1, 1, 2, 20)))
    ) + rng.choice((b"--B--\r\n", b"--B--\r\n", b"", b"--B"))
    if rng.random() < 0.2:
      body = body[: rng.randrange(len(body) + 1)]
    form = rng.choice(("multipart/form-data; boundary=B",) * 4 + ("multipart/form-data", "application/json", ""))
    tried, got = self._send("POST", "/gradio_api/upload", body, form)
    if got.startswith("200\n["):
      self._uploads = (self._uploads + json.loads(got[4:]))[-5:]
    return tried, got

  def _file(self) -> tuple[str, str]:
    return self._send("GET", self._rng.choice(ADDRESSES) + self._path())

  def _anything(self) -> tuple[str, str]:
    rng = self._rng
    address = rng.choice(ADDRESSES) + rng.choice(
      ("", "", "/", "x", "%00", "..", "?deep_link=..%2fx", "?session_hash=x")
    )
    body = rng.choice((b"", b"{}", b"[", b"\xff", json.dumps(self._tree()).encode(), rng.randbytes(20)))
    return self._send(rng.choice(("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS")), address, body)

  def _session(self) -> tuple[str, str]:
    """The stream of another session, a cancellation, or a new conversation."""
    rng = self._rng
    body = {
      "session_hash": self._name(),
      "fn_index": rng.randrange(-1, 12),
      "event_id": rng.choice(("x", self._tree())),
    }
    kind = rng.randrange(3)
    if kind == 0:
      name = rng.choice((self.other.session, "x" * 65, "", "never_seen", "../x"))
      return self._send("GET", f"/gradio_api/queue/data?session_hash={name}")
    if kind == 1:
      return self._send("POST", "/gradio_api/cancel", json.dumps(body).encode())
    return self._send("POST", "/gradio_api/run/predict", json.dumps(self._forget(self._visitor)).encode())

  def _name(self) -> Any:
    return self._rng.choice((self._visitor.session,) * 8 + (self.other.session, self._tree()))

  def _path(self) -> str:
    path = self._rng.choice((*self._files, *self._uploads, "/etc/passwd", self._url))
    return self._rng.choice(
      (path, f"/{path}", f"file://{path}", "../" * 9 + path, path.replace("/", "%2f"), f"{path}%00")
    )

  def _tree(self, depth: int = 0) -> Any:
    """A random value."""
    rng = self._rng
    kind = rng.random()
    if kind < 0.4 or depth > 3:
      return rng.choice(ODD)
    if kind < 0.8:
      return rng.choice(list(visiting.hostile(rng.choice((*self._files, *self._uploads, "/etc/passwd")), self._url)))
    inner = [self._tree(depth + 1) for _ in range(rng.choice((0, 1, 2, 3)))]
    return inner if rng.random() < 0.5 else {rng.choice(KEYS): x for x in inner}

  def _send(self, method: str, address: str, body: bytes = b"", form: str = "application/json") -> tuple[str, str]:
    tried = f"{method} {address} {body[:2000]!r}"
    try:
      with self._visitor.http.stream(method, address, content=body, headers={"Content-Type": form}) as response:
        status, text = response.status_code, ""
        if "event-stream" not in response.headers.get("content-type", ""):
          text = response.read().decode("utf-8", "replace")
    except (httpx.InvalidURL, UnicodeEncodeError):
      return tried, "no request"
    return tried, f"{status}\n{text}"


def broken(got: str) -> bool:
  """Whether an answer is none that a visitor may get."""
  status = got.partition("\n")[0]
  wrong = status.isdecimal() and int(status) >= 500 and int(status) not in REFUSALS
  return wrong or visiting.SECRET in got or "root:x:0" in got or got.endswith("\nfailed")


def fuzz(seed: int, tries: int, base: str, folder: pathlib.Path) -> dict[str, int]:
  """Sends requests to a page whose files are in `folder`; returns the counts."""
  counts = collections.Counter(tried=0, escaped=0, hung=0, lost=0)

  def note(what: str, number: int, words: str) -> None:
    counts[what] += 1
    print(f"seed {seed}, try {number}, {what}: {words}", file=sys.stderr)

  with visiting.elsewhere() as (url, asked), visiting.secrets_of(base, folder) as files:
    fuzzer = Fuzzer(base, files, url, random.Random(seed))
    for number in range(tries):
      counts["tried"] += 1
      tried = ""
      try:
        tried, got = fuzzer.one()
        if broken(got):
          note("escaped", number, f"{tried}\n{got[:2000]}")
      except httpx.TimeoutException:
        note("hung", number, tried)
      except httpx.HTTPError as error:
        note("escaped", number, f"{tried}: {error!r}")
      if asked:
        note("escaped", number, f"{tried} fetched {asked.pop()}")
      if (number + 1) % SOUND == 0 or number == tries - 1:
        try:
          served = fuzzer.sound()
        except httpx.HTTPError as error:
          served = bool(print(repr(error), file=sys.stderr))
        if not served:
          note("lost", number, "the other visitor was not served")
  return dict(counts)


def pages() -> Iterator[tuple[str, pathlib.Path]]:
  """The page over the tiny model: (its address, its folder)."""
  with tempfile.TemporaryDirectory() as folder:
    os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
    import serving
    import tiny

    from jflow.serving import demo

    app = lambda engine: demo.app(engine, "tiny", 1, pathlib.Path(folder))
    with serving.serving(tiny.pipeline(), app) as (base, _):
      yield base, pathlib.Path(folder)


def main() -> int:
  """Runs the command line; exit code 1 where anything broke."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--tries", type=int, default=2000)
  args = parser.parse_args()
  for base, folder in pages():
    counts = fuzz(args.seed, args.tries, base, folder)
  print(json.dumps(counts))
  return int(any(counts[what] for what in ("escaped", "hung", "lost")))


if __name__ == "__main__":
  sys.exit(main())
