"""A server among clients that are slow, greedy, broken or gone: they are cut or refused, others go on."""

import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import logging
import socket
import threading
import time

import httpx
import numpy as np
import pytest
import serving
import tiny
from PIL import Image
from tools import fuzz_server

from jflow.errors import UserError
from jflow.generation.flow.settings import Settings
from jflow.inference.pipeline import prepare_image
from jflow.serving.connections import Limits
from jflow.serving.jobs import Pictures
from jflow.serving.logs import OncePerSecond

CHAT, PAINT = "/v1/chat/completions", "/v1/images/generations"
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
LIMITS = Limits(connections=12, backlog=8, head=1.0, rest=2.0, idle=1, window=1.0)
STRICT = LIMITS._replace(head=0.5, rest=0.5, window=0.5, linger=0.3, look=0.1)
MAX_BODY = 2**20


@pytest.fixture(scope="module")
def model():
  return tiny.pipeline()


@pytest.fixture(scope="module")
def served(model):
  with serving.serving(model, limits=LIMITS, max_body=MAX_BODY, queue=4) as (base, engine):
    with serving.client(base) as client:
      yield client, engine


@pytest.fixture(scope="module")
def strict(model):
  """A server that waits for nobody; what it is asked by others than the slow goes out in one piece."""
  with serving.serving(model, limits=STRICT) as (base, _), serving.client(base) as client:
    yield client


def ask(text="Why?", **more):
  return {"messages": [{"role": "user", "content": text}], "max_tokens": 2} | more


BODY = json.dumps(ask()).encode()
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)


def connect(client) -> socket.socket:
  return socket.create_connection((client.base_url.host, client.base_url.port), timeout=30)


def to_the_end(connection) -> bytes:
  out = b""
  with contextlib.suppress(ConnectionError):
    while data := connection.recv(65536):
      out += data
  return out


def works(client):
  """The server answers. A pause of this process, such as a garbage collection, makes its client one of the slow."""
  for left in (2, 1, 0):
    try:
      response = client.post(CHAT, json=ask(), headers={"Connection": "close"})
      break
    except httpx.TransportError:
      if not left:
        raise
  assert response.status_code == 200, response.text


# --- HTTP -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "sent, status",
  [
    (GET + b"\r\n\r\n"[:2], 200),
    (GET + b"X: " + b"a" * 2**16 + b"\r\n\r\n", 400),
    (GET + b"".join(b"X%d: a\r\n" % i for i in range(20_000)) + b"\r\n", 400),
    (b"GET /health HTTP/1.1\r\n\r\n", 400),
    (GET + b"Host: localhost\r\n\r\n", 400),
    (b"GET /health HTTP/1.0\r\n\r\n", 200),
    (b"GET /metrics HTTP/1.0\r\n\r\n", 421),
    (b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
    (b"GET /health HTTP/1.1\r\nHost: \r\n\r\n", 421),
    (b"\x16\x03\x01\x02\x00\x01" * 20 + b"\r\n\r\n", 400),
    (b"GET //[x HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    (b"GET /%2e%2e/%ff%00 HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    (b"OPTIONS " + HEAD[5:] + b"\r\n", 405),
    (b"A" * 9999 + b" /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    (HEAD + LENGTH + b"Origin: http://evil.example\r\n\r\n" + BODY, 403),
    (HEAD + LENGTH + b"Origin: null\r\n\r\n" + BODY, 403),
    (HEAD + LENGTH + b"Origin: http://localhost:1\r\n\r\n" + BODY, 200),
    (HEAD + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY), 400),
    (HEAD + LENGTH + b"Content-Length: 7\r\n\r\n" + BODY, 400),
    (HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 400),
    (HEAD + CHUNKED + b"zz\r\n", 400),
    (HEAD + CHUNKED + b"1\r\n \r\n" * 20_000, 400),
    (HEAD + CHUNKED + b"".join(b"1\r\n%c\r\n" % x for x in BODY) + b"0\r\n\r\n", 200),
    (HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY + 1), 413),
    (GET + b"Authorization: Bearer \xff\xfe\r\n\r\n", 200),
  ],
)
def test_what_is_no_good_http_is_refused_in_json_with_all_headers(served, sent, status):
  client, _ = served
  with connect(client) as connection:
    with contextlib.suppress(ConnectionError):
      connection.sendall(sent)
    response = http.client.HTTPResponse(connection)
    response.begin()
    body = response.read()
  assert response.status == status, body
  assert response.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
  assert response.headers["X-Frame-Options"] == "DENY" and response.headers["X-Content-Type-Options"] == "nosniff"
  if status != 200:
    error = json.loads(body)["error"]
    assert error["message"] and "\n" not in error["message"]
  works(client)


@pytest.mark.parametrize(
  "sent, status",
  [
    (b"", None),
    (GET, 408),
    (b"GET", 408),
    (HEAD + LENGTH + b"\r\n" + BODY[:9], 408),
    (b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n", 404),
  ],
)
def test_what_comes_too_slowly_is_cut(strict, sent, status):
  with connect(strict) as connection:
    connection.sendall(sent)
    said = to_the_end(connection)
    assert int(said.split()[1]) == status if status else said == b""
  works(strict)


def test_a_body_that_its_connection_refuses_is_counted_as_what_it_got(served, strict):
  def counted(client, status):
    name = f'jflow_requests_total{{path="{CHAT}",status="{status}"}} '
    close = {"Connection": "close"}  # an idle connection would be cut by this server
    told = client.get("/metrics", headers=close).text
    return float(told.partition(name)[2].partition("\n")[0] or 0)

  for client, status, sent in (
    (strict, 408, HEAD + LENGTH + b"\r\n" + BODY[:9]),
    (served[0], 400, HEAD + CHUNKED + b"zz\r\n"),
  ):
    before, gone = counted(client, status), counted(client, 499)
    with connect(client) as connection:
      connection.sendall(sent)
      assert int(to_the_end(connection).split()[1]) == status
    serving.until(lambda client=client, status=status, before=before: counted(client, status) == before + 1)
    assert counted(client, 499) == gone


@pytest.mark.parametrize(
  "sent",
  [
    b"HEAD " + HEAD[5:] + CHUNKED + b"zz\r\n",
    b"HEAD " + HEAD[5:] + b"X: " + b"a" * 33_000 + b"\r\n\r\n",
    HEAD + b"Expect: 100-continue\r\n" + CHUNKED + b"zz\r\n",
  ],
  ids=["no chunk, no body back", "a long head, no body back", "no chunk where none was asked for yet"],
)
def test_what_is_refused_by_its_connection_is_no_fault_of_the_server(served, caplog, sent):
  client, _ = served
  with connect(client) as connection, caplog.at_level(logging.ERROR):
    connection.sendall(sent)
    head, _, body = to_the_end(connection).partition(b"\r\n\r\n")
    works(client)
  assert head.startswith(b"HTTP/1.1 400 ") and not caplog.records
  if len(sent) < 2**15:  # else it may not have come in one piece
    assert bool(body) == sent.startswith(b"POST")


def test_a_fault_at_one_connection_is_not_the_servers(strict, monkeypatch, caplog):
  monkeypatch.setattr("jflow.serving.connections.Connection._unread", lambda *_: 1 // 0)
  with connect(strict) as connection:
    assert to_the_end(connection) == b""
  monkeypatch.undo()
  assert "ZeroDivisionError" in caplog.text
  works(strict)


def test_a_slow_drip_is_no_pace(strict):
  with connect(strict) as connection:
    connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
    with contextlib.suppress(ConnectionError):
      for _ in range(100):
        time.sleep(0.1)
        connection.sendall(b" ")
    assert to_the_end(connection)[:12] in (b"HTTP/1.1 408", b"")


def test_a_client_that_does_not_read_is_cut(strict):
  with socket.socket() as connection:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((strict.base_url.host, strict.base_url.port))
    connection.settimeout(0.2)
    with pytest.raises(ConnectionError):
      for _ in range(200):
        with contextlib.suppress(TimeoutError):
          connection.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
        time.sleep(0.05)


def test_slow_bodies_and_idle_connections_lock_nobody_out(served):
  client, _ = served
  held = [connect(client) for _ in range(3 * LIMITS.connections)]
  try:
    for i, connection in enumerate(held):
      with contextlib.suppress(ConnectionError):
        connection.sendall([b"", GET, HEAD + b"Content-Length: 99\r\n\r\n{"][i % 3])
    for _ in range(3):
      works(client)
  finally:
    for connection in held:
      connection.close()


def test_pipelined_requests_are_answered_in_their_order(served):
  client, _ = served
  with connect(client) as connection:
    connection.sendall((GET + b"\r\n") * 50 + HEAD + LENGTH + b"Connection: close\r\n\r\n" + BODY)
    said = to_the_end(connection)
    assert said.count(b"HTTP/1.1 200") == 51 and b"chat.completion" in said[-400:]


def test_a_client_that_pipelines_and_leaves_is_noticed(served, monkeypatch):
  client, engine = served
  opened = threading.Event()
  real = serving.decoder(engine).step
  monkeypatch.setattr(serving.decoder(engine), "step", lambda n: (opened.wait(20), real(n))[1])
  with connect(client) as connection:
    connection.sendall(HEAD + LENGTH + b"\r\n" + BODY + GET + b"\r\n")
    serving.until(lambda: serving.requests(engine))
  try:
    serving.until(lambda: all(job.gone for job in serving.requests(engine)))
  finally:
    opened.set()


# --- bodies -----------------------------------------------------------------------------------------------


def deep(levels):
  return b"[" * levels + b"]" * levels


@pytest.mark.parametrize(
  "value",
  [
    deep(65),
    deep(980),
    deep(989),
    deep(100_000),
    b'{"a":' * 990 + b"1" + b"}" * 990,
    b"9" * 5000,
    b"-" + b"9" * 4301,
    b"1e999",
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b'"\\ud800"',
    b'["\\udfff"]',
    b'{"\\ud83d": 1}',
    b'"\xff"',
    b'"\xed\xa0\x80"',
    b'{"a": 1, "a": 1}',
    b'{"b": [{"a": 1, "\\u0061": 2}]}',
    b'"\x00"',
    b"[" + b"[]," * 2**18 + b"1]",
  ],
  ids=lambda value: value[:12].decode("latin-1") + str(len(value)),
)
@pytest.mark.parametrize("path", [CHAT, PAINT])
@pytest.mark.parametrize(
  "field", ["tools", "response_format", "messages", "metadata", "user", "prompt", "seed", "other"]
)
def test_json_that_breaks_what_reads_it_is_refused_in_every_field(served, path, field, value):
  client, _ = served
  rest = json.dumps({**ask(), "prompt": "a"}).encode()[1:]
  body = b'{"%s": %s, %s' % (field.encode(), value, rest)
  refused = client.post(path, content=body, headers={"Content-Type": "application/json"})
  assert refused.status_code == 400 and "\n" not in refused.json()["error"]["message"]
  assert len(refused.text) < 600


def picture(mode="RGB", size=(20, 12), kind="PNG", **options) -> str:
  file = io.BytesIO()
  Image.new(mode, size).save(file, kind, **options)
  return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def show(*urls):
  return [{"type": "image_url", "image_url": {"url": url}} for url in urls] + [{"type": "text", "text": "What?"}]


@pytest.mark.parametrize(
  "content",
  [
    show(*[picture()] * 1000),
    show("data:image/png;base64," + "A" * 900_000),
    show("data:image/png;base64," + "A" * 900_001),
    "why " * 200_000,
    "a" * 1_000_000,
    "\N{SLIGHTLY SMILING FACE}" * 80_000,
    "\n" * 500_000 + "a",
    [{"type": "text", "text": "a"}] * 20_000,
  ],
  ids=["1000 pictures", "a long picture", "no base64", "words", "a word", "signs", "lines", "parts"],
)
def test_what_cannot_fit_is_refused_before_it_costs_anything(served, monkeypatch, content):
  client, _ = served
  decoded = []
  monkeypatch.setattr(
    "jflow.serving.prepare.prepare_image", lambda *x: decoded.append(prepare_image(*x)) or decoded[-1]
  )
  refused = client.post(CHAT, json=ask(content))
  assert refused.status_code == 400 and len(refused.json()["error"]["message"]) < 300
  assert not decoded


@pytest.mark.parametrize("body", [{"prompt": "why " * 100_000}, {"prompt": "\n" * 500_000 + "a"}])
def test_a_prompt_to_paint_has_the_same_bounds(served, body):
  client, _ = served
  assert client.post(PAINT, json=body).status_code == 400


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_of_many_frames_the_first_is_read(served, kind):
  client, _ = served
  frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(200)]
  url = picture(size=(8, 8), kind=kind, save_all=True, append_images=frames)
  assert client.post(CHAT, json=ask(show(url))).status_code in ((200,) if kind == "WEBP" else (200, 400))


def test_who_leaves_while_pictures_are_decoded_holds_nobody_up(served, monkeypatch):
  client, engine = served
  begun, opened, decoded = threading.Semaphore(0), threading.Event(), []

  def slow(image, size):
    begun.release()
    assert opened.wait(30)
    decoded.append(image)
    return prepare_image(image, size)

  monkeypatch.setattr("jflow.serving.prepare.prepare_image", slow)
  body = json.dumps(ask(show(picture(), picture()))).encode()
  held = [connect(client) for _ in range(4)]
  for connection in held:
    connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
  for _ in held:
    assert begun.acquire(timeout=30)
  assert client.post(CHAT, json=ask()).status_code == 429  # the queue of 4 is full
  for connection in held[:2]:
    connection.close()
  serving.until(lambda: client.post(CHAT, json=ask()).status_code == 200)  # while four threads decode
  for connection in held[2:]:
    connection.close()
  serving.until(lambda: not engine._coming)
  time.sleep(0.5)  # their work is told a turn of the event loop later
  opened.set()
  time.sleep(0.2)
  assert len(decoded) == len(held), "a second picture was decoded for somebody who had left"


def test_the_slowest_body_makes_room_for_others(model):
  """Bodies share a bound of memory; here sixteen times 1,000 bytes."""
  with serving.serving(model, max_body=1000) as (base, _), serving.client(base) as client:
    held = [connect(client) for _ in range(17)]
    for connection in held:
      connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n" + b" " * 990)
      time.sleep(0.02)
    held[0].settimeout(20)
    assert b" 503 " in held[0].recv(100)
    works(client)
    for connection in held:
      connection.close()


# --- the log ----------------------------------------------------------------------------------------------


def test_the_log_has_one_line_of_a_kind_per_second_and_tells_of_the_rest(monkeypatch):
  now, out = [0.0], io.StringIO()
  monkeypatch.setattr("jflow.serving.logs.time.monotonic", lambda: now[0])
  handler, log = OncePerSecond(out), logging.Logger("test")
  log.addHandler(handler)

  def say(status):
    log.info("answered %d", status, extra={"kind": status})

  for _ in range(1000):
    say(200), say(400)
  assert len(out.getvalue().splitlines()) == 2
  now[0] += 1.0
  handler.tell()
  lines = out.getvalue().splitlines()
  assert len(lines) == 4 and all("999" in line for line in lines[2:])
  say(200)
  handler.tell()
  assert len(out.getvalue().splitlines()) == 5


def test_the_number_of_connections_leaves_files_for_the_process(monkeypatch):
  for files in (64, 128, 1024, 2**20):
    monkeypatch.setattr("jflow.serving.connections.resource.getrlimit", lambda _, files=files: (files, files))
    limits = Limits.here()
    assert 1 <= limits.connections < files and limits.connections + limits.backlog <= files


# --- the engine -------------------------------------------------------------------------------------------


class Gate:
  """Compiles what `held` accepts only once it is opened; until then it counts as not compiled."""

  def __init__(self, monkeypatch, target, name, held):
    self.opened, real = threading.Event(), getattr(target, name)

    def prepare(*args, compile=True, **more):
      if held(*args, **more) and not self.opened.is_set():
        if not compile:
          return False
        assert self.opened.wait(30)
      return real(*args, compile=compile, **more)

    monkeypatch.setattr(target, name, prepare)


def test_nobody_waits_for_a_program_that_another_request_needs(served, monkeypatch):
  client, engine = served
  gate = Gate(monkeypatch, engine.pipeline, "prepare_images", lambda _, settings, rows: settings.solver == "midpoint")
  drawn = []
  draw = lambda body: drawn.append(client.post(PAINT, json=body))
  thread = threading.Thread(
    target=draw, args=({"prompt": "a ring", "steps": 3, "solver": "midpoint", "n": 2, "seed": 1},)
  )
  thread.start()
  serving.until(lambda: engine._images.aside)
  works(client)
  assert client.post(PAINT, json={"prompt": "a circle", "steps": 3}).status_code == 200
  gate.opened.set()
  thread.join(60)
  (response,) = drawn
  assert [x["seed"] for x in response.json()["data"]] == [1, 2]
  want = engine.pipeline.generate(["a ring"], 3, seed=1, num_images=2, solver="midpoint")
  for x, image in zip(response.json()["data"], want, strict=True):
    got = Image.open(io.BytesIO(base64.b64decode(x["b64_json"])))
    assert np.abs(np.asarray(got).astype(int) - np.asarray(image)).max() <= 1


def test_who_leaves_while_a_program_is_compiled_frees_the_place(served, monkeypatch):
  client, engine = served
  long = "x" * 70
  for target, name, held, path, body in (
    (engine.pipeline, "prepare_images", lambda prompts, _, rows: long in prompts, PAINT, {"prompt": long, "n": 2}),
    (serving.decoder(engine), "prepare", lambda request: len(request.tokens) > 40, CHAT, ask(long)),
  ):
    gate = Gate(monkeypatch, target, name, held)
    with pytest.raises(httpx.ReadTimeout):
      client.post(path, json=body, timeout=0.5)
    serving.until(lambda: not serving.requests(engine))
    assert not gate.opened.is_set()
    works(client)
    gate.opened.set()
    monkeypatch.undo()


@pytest.mark.parametrize(
  "settings, seed, count",
  [
    ({"guidance": float("nan")}, 0, 1),
    ({"guidance": float("inf")}, 0, 1),
    ({"guidance": 0.5}, 0, 1),
    ({"steps": 0}, 0, 1),
    ({"steps": 2.5}, 0, 1),
    ({"shift": float("nan")}, 0, 1),
    ({"shift": 0.0}, 0, 1),
    ({"solver": "dopri"}, 0, 1),
    ({}, 0.5, 1),
    ({}, float("nan"), 1),
    ({}, 0, 0),
    ({}, 0, float("nan")),
  ],
)
def test_a_mistake_in_a_painting_is_never_the_models(served, settings, seed, count):
  _, engine = served
  with pytest.raises(UserError):
    engine.submit(Pictures("a ring", count, seed, Settings(**settings)))
  assert engine.state == "ready" and not serving.requests(engine)


@pytest.mark.parametrize(
  "field, value",
  [
    ("temperature", float("nan")),
    ("temperature", -1.0),
    ("top_p", 0.0),
    ("top_p", float("nan")),
    ("seed", -1),
    ("seed", 2**32),
    ("max_tokens", 0),
    ("max_tokens", 2.5),
  ],
)
def test_a_mistake_in_a_question_is_never_the_models(served, field, value):
  _, engine = served
  with pytest.raises(UserError):
    engine.submit(engine.pipeline.request("Why?")._replace(**{field: value}))
  assert engine.state == "ready" and not serving.requests(engine)


def test_a_mistake_that_the_models_thread_finds_costs_its_request_alone(served, monkeypatch):
  client, engine = served
  failures = lambda: client.get("/metrics").text.split("jflow_failures_total ")[1].split()[0]
  before = failures()
  real = engine.pipeline.generate

  def generate(prompts, *args, **options):
    if any("bad" in prompt for prompt in prompts):
      raise UserError("this prompt is bad")
    return real(prompts, *args, **options)

  def admit(work):
    raise UserError("this question is bad")

  monkeypatch.setattr(engine.pipeline, "generate", generate)
  for _ in range(4):
    refused = client.post(PAINT, json={"prompt": "bad", "steps": 3})
    assert refused.status_code == 400 and refused.json()["error"]["message"] == "this prompt is bad"
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    paint = lambda prompt: client.post(PAINT, json={"prompt": prompt, "steps": 3, "shift": 2}).status_code
    assert list(pool.map(paint, ["good", "bad"])) == [200, 400]
  with monkeypatch.context() as patch:
    patch.setattr(serving.decoder(engine), "admit", admit)
    for _ in range(4):
      assert client.post(CHAT, json=ask()).status_code == 400
  works(client)
  assert engine.state == "ready" and failures() == before


# --- all of it --------------------------------------------------------------------------------------------


def test_a_short_run_of_the_fuzzer(served, caplog):
  client, _ = served
  counts = fuzz_server.fuzz(seed=0, tries=800, base=str(client.base_url), log=lambda: caplog.text)
  assert counts == {"tried": 800, "escaped": 0, "hung": 0, "lost": 0}
