"""Fuzzes `serve` over raw sockets: python tests/tools/fuzz_server.py --seed=0 --tries=3000

A try is one connection of a client whom nobody should trust: requests whose fields, pictures, heads or bytes
are spoiled, several at once, cut off, or of somebody who leaves. Several such clients run at a time. Asked is
that every answer is HTTP in the shape of the interface, that no error is the server's own, that each try is
answered in time, and another visitor's looks at /health too, that the log holds no traceback, and that in the
end nothing is held and a question and a picture are answered as they were in the beginning.
Prints one line of JSON, {"tried", "escaped", "hung", "lost"}, and on stderr what broke, whole.
"""

import argparse
import base64
import collections
import contextlib
import io
import itertools
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

import h11
import httpx
from PIL import Image
from tools import fuzz_pictures
from tools.fuzzing import spoil_bytes

SECONDS = 60  # of one answer, far beyond what one takes
CLIENTS = 6  # at a time
MOMENT = 0.2  # seconds in which an answer is read before its client says that no more comes
PROBE, SLOW = 0.5, 5.0  # seconds between two looks at /health, and after which one is slow
REFUSALS = (503, 504)  # of a server that works, but is full
CHAT, PAINT = "/v1/chat/completions", "/v1/images/generations"
QUESTION = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 4}
PICTURE = {"prompt": "a ring", "seed": 3, "steps": 2}
# The command, which writes the stacks of its threads to its log at SIGUSR1.
COMMAND = (
  "import faulthandler, runpy, signal; faulthandler.register(signal.SIGUSR1); "
  "runpy.run_module('jflow', run_name='__main__', alter_sys=True)"
)

ODD: tuple[Any, ...] = (
  None,
  True,
  False,
  0,
  1,
  -1,
  2,
  3,
  2**31,
  2**32,
  2**63,
  -(2**63),
  10**30,
  10**300,
  0.0,
  -0.0,
  0.5,
  2.5,
  1e-300,
  1e308,
  float("nan"),
  float("inf"),
  "",
  " ",
  "x",
  "1",
  "\0",
  "\ud800",
  "\u202e",
  "a" * 3000,
  "\n" * 900,
  "tiny",
  "gpt-5",
  "euler",
  "heun",
  "midpoint",
  "auto",
  "url",
  "16x16",
  "b64_json",
  "text",
  "<image_placeholder>",
  "</s>",
  "../../etc/passwd",
  "http://127.0.0.1:9/x",
  "file:///etc/passwd",
  "data:image/png;base64,AAAA",
  [],
  {},
  [[]],
  [{}],
  [None],
  [0] * 500,
)
NAMES = (
  "messages",
  "role",
  "content",
  "type",
  "image_url",
  "url",
  "text",
  "detail",
  "name",
  "tool_calls",
  "refusal",
  "model",
  "max_tokens",
  "max_completion_tokens",
  "temperature",
  "top_p",
  "seed",
  "stop",
  "stream",
  "stream_options",
  "include_usage",
  "n",
  "tools",
  "response_format",
  "logit_bias",
  "metadata",
  "user",
  "prompt",
  "size",
  "steps",
  "guidance",
  "solver",
  "shift",
  "quality",
  "background",
  "other",
  "",
)
PATHS = (
  "/v1/models",
  "/v1/models/",
  "/v1/models/tiny",
  "/v1/models/%00",
  "/metrics",
  "/health",
  "/",
  "/x",
  "/v1/../etc/passwd",
  "//x",
  "/%2e%2e/",
  CHAT + "/",
  CHAT + "?x=%ff",
  "http://evil.example/health",
  "*",
)
HEADS = (
  b"Origin: null",
  b"Origin: http://localhost",
  b"Origin: http://evil.example",
  b"Origin: \xff",
  b"X: " + b"a" * 40_000,
  b"Expect: 100-continue",
  b"Expect: x",
  b"Upgrade: websocket\r\nConnection: upgrade",
  b"Content-Length: 3",
  b"TE: trailers",
  b"Transfer-Encoding: gzip",
  b"Host: localhost",
  b"Authorization: Bearer \xff",
  b"Content-Encoding: gzip",
  b"X : y",
  b"\0: x",
  b" folded",
  b"Cookie: a=b",
  b"Range: bytes=0-1",
  b"Content-Type: text/plain",
  b"Connection: keep-alive, x",
  b"X" * 300,
)


class Try(NamedTuple):
  """The course of one connection."""

  pieces: list[bytes]  # that are sent one after the other
  methods: list[str]  # of the requests that they hold, as far as these are sound
  ends: str  # "answered": reads all; "cut": says that no more comes, and reads; "leaves": reads nothing


class Broken(Exception):
  """An answer that nobody may get."""


# --- requests ---------------------------------------------------------------------------------------------


def make_try(rng: random.Random) -> Try:
  """A random connection."""
  count = rng.choice((1,) * 8 + (2, 5))
  made = [_request(rng, last=i == count - 1) for i in range(count)]
  data, methods = b"".join(request for _, request, _ in made), [method for method, _, _ in made]
  whole = all(sound for _, _, sound in made)
  if rng.random() < 0.1 and "HEAD" not in methods:  # whose answers have no body
    data, whole, methods = spoil_bytes(rng, data), False, []
  if rng.random() < 0.06:
    data, whole = data[: rng.randrange(len(data) + 1)], False
  cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice((0, 0, 0, 1, 3))))
  pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]
  leaves = rng.random() < 0.08
  return Try(pieces, methods, "leaves" if leaves else "answered" if whole else "cut")


def _request(rng: random.Random, last: bool) -> tuple[str, bytes, bool]:
  """(method, bytes, whether they end where their head says); the last of a connection asks to close it."""
  path = rng.choice((CHAT,) * 5 + (PAINT,) * 4 + (rng.choice(PATHS),))
  method = rng.choice(("POST",) * 12 + ("GET", "PUT", "HEAD", "OPTIONS")) if path in (CHAT, PAINT) else "GET"
  body = _body(rng, path) if method in ("POST", "PUT") or rng.random() < 0.1 else b""
  host = rng.choice((b"localhost",) * 15 + (b"evil.example", b"", b"[::1]", b"127.0.0.1:99"))
  head, sound = [b"Host: " + host, b"Content-Type: application/json"], True
  if last:
    head.append(b"Connection: close")
  if rng.random() < 0.15:
    head.append(rng.choice(HEADS))
    sound = False
  if rng.random() < 0.7:
    off = rng.choice((0,) * 15 + (5, -3))
    head.append(b"Content-Length: %d" % max(0, len(body) + off))
    sound = sound and not off
  else:
    head.append(b"Transfer-Encoding: chunked")
    step = rng.choice((3, 100, 5000))
    chunks = [body[i : i + step] for i in range(0, len(body), step)]
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
  rng.shuffle(head)
  version = rng.choice((b"1.1",) * 12 + (b"1.0", b"0.9", b"2.0"))
  line = b"%s %s HTTP/%s\r\n" % (method.encode(), path.encode(), version)
  return method, line + b"\r\n".join(head) + b"\r\n\r\n" + body, sound and version == b"1.1"


def _body(rng: random.Random, path: str) -> bytes:
  """A question or a wish for a picture, mostly spoiled."""
  body: dict[str, Any] = json.loads(json.dumps(QUESTION if path == CHAT else PICTURE))
  if path == CHAT and rng.random() < 0.3:
    parts = [_picture(rng) for _ in range(rng.choice((1, 1, 2, 9)))]
    body["messages"][0]["content"] = [*parts, {"type": "text", "text": "What?"}]
  if path == CHAT and rng.random() < 0.3:
    body["stream"] = True
  if path == PAINT:
    body["steps"] = rng.choice((1, 2))  # each number of pictures and guidance is compiled once
  for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
    body[rng.choice(NAMES)] = _tree(rng)
  if path == CHAT and isinstance(body["messages"], list) and rng.random() < 0.2:
    role = rng.choice(("user", "assistant", "system", "developer", "tool", 1))
    body["messages"].append({"role": role, "content": _tree(rng)})
  data = json.dumps(body).encode()
  return spoil_bytes(rng, data) if rng.random() < 0.15 else data


def _picture(rng: random.Random) -> dict[str, Any]:
  """A part of a question that shows a picture of any sort."""
  data = rng.choice(fuzz_pictures.PICTURES + fuzz_pictures.TIFFS)
  data = spoil_bytes(rng, data) if rng.random() < 0.4 else data
  kind = rng.choice(("image/png", "image/jpeg", "image/webp", "IMAGE/GIF", "", "text/html", "image/png;charset=x"))
  text = base64.b64encode(data).decode()
  text = rng.choice((text, text.rstrip("="), text.replace("A", "%41"), text[:60] + "\n" + text[60:], text[:-7]))
  uri = f"data:{kind};base64,{text}"
  return {"type": "image_url", "image_url": rng.choice(({"url": uri}, {"url": uri, "detail": "low"}, uri))}


def _tree(rng: random.Random, depth: int = 0) -> Any:
  """A random value."""
  if rng.random() < 0.7 or depth > 3:
    return rng.choice(ODD)
  inner = [_tree(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 3)))]
  return inner if rng.random() < 0.5 else {rng.choice(NAMES): x for x in inner}


# --- answers ----------------------------------------------------------------------------------------------


def speak(address: tuple[str, int], what: Try) -> bytes:
  """Sends a try and returns what came back; raises TimeoutError."""
  end, got = time.monotonic() + SECONDS, b""
  with socket.create_connection(address, timeout=SECONDS) as connection:
    with contextlib.suppress(ConnectionError):
      for piece in what.pieces:
        connection.sendall(piece)
      if what.ends == "leaves":
        return b""
      if what.ends == "cut":
        connection.settimeout(MOMENT)
        with contextlib.suppress(TimeoutError):
          got = connection.recv(2**16)
        with contextlib.suppress(OSError):  # the server was faster
          connection.shutdown(socket.SHUT_WR)
    data = b"first"
    with contextlib.suppress(ConnectionError):
      while data:
        connection.settimeout(max(0.001, end - time.monotonic()))
        data = connection.recv(2**16)
        got += data
  return got


def check(what: Try, got: bytes) -> None:
  """Checks all that a connection got; raises Broken."""
  answers = list(_answers(what, got))
  for answer, body, method in answers:
    _check(answer, body, method)
  closes = answers and (b"connection", b"close") in answers[-1][0].headers
  if what.ends == "answered" and len(answers) < len(what.methods) and not closes:
    raise Broken(f"{len(answers)} answers to {len(what.methods)} requests")


def _answers(what: Try, got: bytes) -> Iterator[tuple[h11.Response, bytes, str]]:
  """The answers with their bodies, and the methods of their requests; raises Broken."""
  for method in itertools.chain(what.methods, itertools.repeat("GET")):
    if not got:
      return
    reader = h11.Connection(h11.CLIENT)
    reader.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    reader.send(h11.EndOfMessage())
    reader.receive_data(got)
    answer, body, event = None, b"", None
    try:
      while not isinstance(event, h11.EndOfMessage):
        event = reader.next_event()
        if isinstance(event, h11.Response):
          answer = event
        elif isinstance(event, h11.Data):
          body += event.data
        elif event is h11.NEED_DATA:
          reader.receive_data(b"")
        elif isinstance(event, h11.ConnectionClosed):
          raise Broken("no answer")
    except h11.RemoteProtocolError as error:
      if what.ends == "answered":
        raise Broken(f"no whole HTTP: {error}") from None
      return  # the server may stop where its client has
    yield answer, body, method
    got = reader.trailing_data[0]


def _check(answer: h11.Response, body: bytes, method: str) -> None:
  """Checks one answer; raises Broken."""
  head, status = dict(answer.headers), answer.status_code
  kind = head.get(b"content-type", b"").decode()
  if status >= 500 and status not in REFUSALS:
    raise Broken(f"the status {status}: {body[:300]!r}")
  if head.get(b"content-security-policy") != b"frame-ancestors 'none'":
    raise Broken("no word about frames")
  try:
    if method == "HEAD" or 300 <= status < 400:
      sound = not body
    elif kind.startswith("text/event-stream"):
      sound = _is_stream(body)
    elif kind.startswith("text/plain"):
      sound = b"jflow_requests_total" in body
    else:
      sound = kind == "application/json" and _is_sound(status, json.loads(body))
  except (ValueError, LookupError, TypeError, OSError) as error:
    raise Broken(f"{error!r} in {body[:300]!r}") from None
  if not sound:
    raise Broken(f"{status} {kind} {body[:300]!r}")


def _is_stream(body: bytes) -> bool:
  """Whether a body is events that end with [DONE] or an error."""
  *events, rest = body.decode().split("\n\n")
  values = [json.loads(event.removeprefix("data: ")) for event in events if event != "data: [DONE]"]
  named = all(event.startswith("data: ") for event in events)
  return named and not rest and (events[-1] == "data: [DONE]" or "error" in values[-1])


def _is_sound(status: int, value: dict[str, Any]) -> bool:
  """Whether a body is an error in one line, an answer in text, or pictures that can be opened."""
  if status >= 400:
    message, code = value["error"]["message"], value["error"]["code"]
    return 0 < len(message) < 1000 and "\n" not in message and isinstance(code, str)
  if "choices" in value:
    return isinstance(value["choices"][0]["message"]["content"], str)
  for each in value["data"] if "steps" in value else ():
    Image.open(io.BytesIO(base64.b64decode(each["b64_json"], validate=True))).load()
  return True


# --- the run ----------------------------------------------------------------------------------------------


class Visitor:
  """Somebody who asks sound things all the while."""

  def __init__(self, base: str, stuck: Callable[[], None]):
    """Args: `stuck` is called when /health is slow to be answered."""
    self._http, self._stuck = httpx.Client(base_url=base, timeout=SECONDS), stuck
    self._want = self._results()

  def look(self) -> None:
    """Asks for /health, over a connection of its own; raises httpx.HTTPError or Broken."""
    slow = threading.Timer(SLOW, self._stuck)
    slow.start()
    try:
      answer = self._http.get("/health", headers={"Connection": "close"})
    finally:
      slow.cancel()
    if answer.status_code != 200:
      raise Broken(f"/health: {answer.status_code} {answer.text}")

  def served(self) -> bool:
    """Whether a question and a picture are answered as in the beginning, and nothing else is held."""
    return self._results() == self._want and self._is_idle()

  def _results(self) -> list[Any]:
    asked, painted = (self._http.post(path, json=body) for path, body in ((CHAT, QUESTION), (PAINT, PICTURE)))
    return [asked.json()["choices"], painted.json()["data"]]

  def _is_idle(self) -> bool:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
      text = self._http.get("/metrics").text
      if not any(map(float, re.findall(r"^jflow_(?:waiting|running)\{.*\} (.*)$", text, re.MULTILINE))):
        return True
      time.sleep(PROBE)
    return False


def fuzz(
  seed: int, tries: int, base: str, log: Callable[[], str], stuck: Callable[[], None] = lambda: None
) -> dict[str, int]:
  """Sends requests to a server that logs to `log`; returns the counts."""
  counts, lock = collections.Counter(tried=0, escaped=0, hung=0, lost=0), threading.Lock()
  numbers = iter(range(tries))
  url, over = httpx.URL(base), threading.Event()
  address = (url.host, url.port)

  def note(what: str, words: str) -> None:
    with lock:
      counts[what] += 1
      print(f"seed {seed}, {what}: {words}", file=sys.stderr, flush=True)

  def client() -> None:
    while True:
      with lock:
        if (number := next(numbers, None)) is None:
          return
        counts["tried"] += 1
      what, got = make_try(random.Random(f"{seed} {number}")), b""
      try:
        got = speak(address, what)
        check(what, got)
      except TimeoutError:
        note("hung", f"try {number}, {what}")
      except (OSError, Broken) as error:
        note("escaped", f"try {number}, {error!r}, {what}\n{got[:2000]!r}")

  def probe() -> None:
    while not over.wait(PROBE):
      try:
        visitor.look()
      except httpx.TimeoutException:
        note("hung", "the look at /health")
      except (httpx.HTTPError, Broken) as error:
        note("escaped", f"the look at /health: {error!r}")

  visitor = Visitor(base, stuck)
  threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
  prober = threading.Thread(target=probe)
  for thread in (*threads, prober):
    thread.start()
  for thread in threads:
    thread.join()
  over.set()
  prober.join()
  try:
    served = visitor.served()
  except (httpx.HTTPError, LookupError) as error:
    served = bool(print(repr(error), file=sys.stderr))
  if not served:
    note("lost", "a question or a picture is not answered as it was, or something is still held")
  tracebacks = re.findall(r"^Traceback.*?(?=^\d{4}-|\Z)", log(), re.MULTILINE | re.DOTALL)
  for number, traceback in enumerate(tracebacks):
    note("escaped", f"a traceback in the log: {traceback[-1000:] if number < 5 else ''}")
  return dict(counts)


@contextlib.contextmanager
def command() -> Iterator[tuple[str, Callable[[], str], Callable[[], None]]]:
  """The command over the tiny model: (its address, its log, what writes the stacks of its threads there)."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  import tiny

  from jflow.data.tokenizer import Tokenizer
  from jflow.interop.native import save_params

  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    config = {"model": tiny.CONFIG.to_dict(), "data": {"template": "plain"}}
    save_params(folder / "tiny", tiny.params(), config, Tokenizer.load(str(tiny.TOKENIZER)))
    args = [f"--checkpoint={folder / 'tiny'}", "--port=0", "--slots=4", "--batch=4", f"--timeout={SECONDS}"]
    said, log = folder / "said", folder / "log"
    with said.open("w") as out, log.open("w") as err:
      server = subprocess.Popen([sys.executable, "-c", COMMAND, "serve", *args], stdout=out, stderr=err, cwd=ROOT)
    try:
      while not (found := re.search(r"http://\S+:\d+", said.read_text())) or "ready" not in log.read_text():
        if server.poll() is not None:
          raise SystemExit(f"the server did not start:\n{log.read_text()}")
        time.sleep(0.1)
      yield found[0], log.read_text, lambda: server.send_signal(signal.SIGUSR1)
    finally:
      server.terminate()
      try:
        server.wait(SECONDS)
      except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
      print(log.read_text()[-5000:] if server.returncode else "", file=sys.stderr, end="")


def main() -> int:
  """Runs the command line; exit code 1 where anything broke."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--tries", type=int, default=3000)
  args = parser.parse_args()
  with command() as (base, log, stuck):
    counts = fuzz(args.seed, args.tries, base, log, stuck)
    if stacks := re.findall(r"(?:Current thread|Thread 0x).*\n(?:  File.*\n)+", log()):
      print("/health was slow, and the threads of the server stood at", *stacks, sep="\n", file=sys.stderr)
  print(json.dumps(counts))
  return int(any(counts[what] for what in ("escaped", "hung", "lost")))


if __name__ == "__main__":
  sys.exit(main())
