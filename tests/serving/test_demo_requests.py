"""The page's endpoints against clients that are no browser: nothing but a visitor's own files, work and errors."""

import asyncio
import contextlib
import functools
import http.client
import importlib.util
import io
import json
import math
import pathlib
import re
import threading
import time
import urllib.parse
import zipfile

import httpx
import numpy as np
import pytest
import serving
import tiny
import visiting
from PIL import Image
from tools import fuzz_page
from visiting import SECRET, Visitor

from jflow.data import images
from jflow.serving.fields import ApiError

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="needs Gradio")
MAX_UPLOAD = 1  # MB
NAN, INFINITE, HUGE = math.nan, math.inf, 10**30
WRONG = ("x", [], {}, True, {"path": "/etc/passwd"})  # where a number is wanted


@pytest.fixture(scope="module")
def model():
  return tiny.pipeline()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def served(model, folder):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("GRADIO_TEMP_DIR", str(folder))
    patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    from jflow.serving import demo

    with serving.serving(model, lambda engine: demo.app(engine, "tiny", MAX_UPLOAD, folder)) as served:
      yield served


@pytest.fixture
def visitor(served):
  with Visitor(served[0]) as visitor:
    yield visitor


@pytest.fixture
def other(served):
  with Visitor(served[0]) as visitor:
    yield visitor


@pytest.fixture(scope="module")
def secrets(served, folder):
  with visiting.secrets_of(served[0], folder) as paths:
    yield paths


@pytest.fixture(scope="module")
def elsewhere():
  with visiting.elsewhere() as there:
    yield there


@functools.cache
def png(side=8):
  out = io.BytesIO()
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)).save(out, "PNG")
  return out.getvalue()


def text_of(visitor, messages):
  """All that a visitor gets by what he was told, files too."""
  return json.dumps(messages) + "".join(visitor.http.get(x).text for x in visiting.files(messages) if "127.0" not in x)


# --- what a client names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["answer", "paint"])
def test_no_value_of_an_event_names_a_file_or_an_address(visitor, secrets, elsewhere, event):
  url, asked = elsewhere
  usual = visitor.values(event)
  few = {f"_{i}": value for i, value in enumerate(usual) if value in (4, 30, 256)}  # pictures, steps, tokens
  for path in secrets:
    for position, kind in enumerate(visitor.kinds(event)):
      forms = list(visiting.hostile(path, url))
      if kind in visiting.PLAIN:
        forms = forms[:8] if position == 0 and path == secrets[0] else forms[:1]
      elif path != secrets[0]:
        forms = [x for x in forms if isinstance(x, dict) and "files" in x][:2]
      for form in forms:
        values = visitor.values(event, **dict.fromkeys(few, 1) | {f"_{position}": form})
        messages = visitor.ask(event, values)
        assert SECRET not in text_of(visitor, messages), (position, form)
  assert asked == []


def test_nobody_gets_a_file_by_its_path_in_any_spelling(visitor, served, secrets, elsewhere):
  url, asked = elsewhere
  host = urllib.parse.urlsplit(served[0])
  connection = http.client.HTTPConnection(host.hostname, host.port, timeout=30)  # sends a target as it is
  cookie = "; ".join(f"{k}={v}" for k, v in visitor.http.cookies.items())
  up = "../" * 12
  for path in secrets:
    quoted, twice = (
      urllib.parse.quote(path, safe=""),
      urllib.parse.quote(urllib.parse.quote(path, safe=""), safe=""),
    )
    folder, name = path.rsplit("/", 1)
    spelled = [
      path,
      quoted,
      twice,
      f"/{path}",
      f"file://{path}",
      f"{folder}/./{name}",
      f"{folder}/x/../{name}",
      up + path[1:],
      f"{path}%00",
      f"{path}%00.png",
      f"{path}/",
      path.upper(),
      f"{path}?x=1",
      f"{path};x",
    ]
    starts = (
      "/gradio_api/file=",
      "/gradio_api/file/",
      "/file=",
      "/static/",
      "/assets/",
      "/gradio_api/proxy=",
    )
    few = ("/config?deep_link=", "/gradio_api/stream/a/b/0/", "/svelte/", "/gradio_api/")
    targets = [f"{start}{x}" for x in (spelled if path == secrets[0] else spelled[:2]) for start in starts]
    for target in (*targets, *(f"{start}{path}" for start in few)):
      connection.request("GET", target.replace(" ", "%20"), headers={"Cookie": cookie})
      response = connection.getresponse()
      body = response.read().decode("utf-8", "replace")
      assert SECRET not in body and response.status < 500, target
  for target in ("/gradio_api/file=", "/gradio_api/proxy=", "/proxy=", "/gradio_api/file/"):
    assert visitor.http.get(f"{target}{url}").status_code == 404
  assert asked == []


def test_addresses_of_gradio_that_the_page_does_not_need_do_not_exist(visitor):
  import gradio as gr

  needed = {
    "/",
    "/config",
    "/theme.css",
    "/manifest.json",
    "/favicon.ico",
    "/static/x",
    "/assets/x",
    "/gradio_api/app_id",
    "/gradio_api/upload",
    "/gradio_api/file=x",
    "/gradio_api/heartbeat/x",
    "/gradio_api/queue/join",
    "/gradio_api/queue/data",
    "/gradio_api/run/predict",
    "/gradio_api/cancel",
    "/gradio_api/reset",
  }
  with gr.Blocks() as blocks:
    gr.Textbox()
  described = [x for route in gr.routes.App.create_app(blocks).routes for x in _paths(route)]
  names = {re.sub(r"\{[^}]*\}", "x", path) for path in described} - needed
  assert len(names) > 30 and "/gradio_api/component_server" in names
  for name in sorted(names):
    for method in ("GET", "POST"):
      assert visitor.http.request(method, name).status_code in (404, 405), (method, name)


def _paths(route):
  """The paths of a route, or of those that it includes."""
  inner = getattr(getattr(route, "original_router", None), "routes", None)
  return [route.path] if hasattr(route, "path") and not inner else [x for y in inner or () for x in _paths(y)]


# --- other visitors ----------------------------------------------------------------------------------------


def test_what_a_visitor_made_is_his_alone(visitor, other, served):
  painted = visitor.ask("paint", visitor.values("paint", _1=2, _2=1))
  mine = visiting.files(painted)
  upload = visitor.upload(png())
  assert len(mine) >= 3 and all(visitor.http.get(x).status_code == 200 for x in mine)
  archive = next(x for x in mine if x.endswith(".zip"))
  assert len(zipfile.ZipFile(io.BytesIO(visitor.http.get(archive).content)).namelist()) == 2
  with httpx.Client(base_url=served[0]) as nobody:
    for address in (*mine, f"/gradio_api/file={upload}"):
      assert [x.get(address).status_code for x in (other.http, nobody)] == [404, 404], address
  asked = other.ask("answer", other.values("answer", _0={"text": "Why?", "files": [{"path": upload}]}))
  assert "that you uploaded here" in visiting.warnings(asked)[0]
  kept = visitor.ask("answer", visitor.values("answer", _0={"text": "Why?", "files": [{"path": upload}]}, _3=1))
  assert not visiting.warnings(kept) and upload in json.dumps(kept)


def test_a_session_is_its_visitors_alone(visitor, other, served):
  assert visitor.ask("answer", visitor.values("answer", _3=1))
  forget = next(x for x in visitor.events.values() if x["queue"] is False and len(x["outputs"]) == 2)
  with httpx.Client(base_url=served[0]) as nobody:
    for client in (other.http, nobody):
      body = {"session_hash": visitor.session, "fn_index": visitor.events["answer"]["id"], "event_id": "x"}
      event = {"session_hash": visitor.session, "fn_index": forget["id"], "data": []}
      answers = [
        client.get("/gradio_api/queue/data", params={"session_hash": visitor.session}),
        client.post("/gradio_api/cancel", json=body),
        client.post("/gradio_api/run/predict", json=event),
        client.post("/gradio_api/queue/join", json=event | {"fn_index": body["fn_index"], "data": [None] * 4}),
      ]
      assert [x.status_code for x in answers] == [404] * 4
  assert visitor.http.post("/gradio_api/run/predict", json=event).status_code == 200


def test_one_page_answers_one_question_at_a_time(visitor, served, monkeypatch):
  _, engine = served
  begin, real = threading.Event(), serving.decoder(engine).step

  def step(n):
    assert begin.wait(30)
    return real(n)

  monkeypatch.setattr(serving.decoder(engine), "step", step)
  for _ in range(2):
    assert visitor.join("answer", visitor.values("answer", _3=1)).status_code == 200
  with visitor.listening() as messages:
    told = next(x["log"] for x in messages if x["msg"] == "log")
    begin.set()
    ends = [x["success"] for x in messages if x["msg"] == "process_completed"]
  assert "under way" in told and ends == [True, True]


# --- mistakes, and too much of something -------------------------------------------------------------------

NUMBERS = (NAN, INFINITE, -INFINITE, None, *WRONG)
SETTINGS = [
  ("paint", 0, "prompt", (None, 5, [], {}, True, "", " \n")),
  ("paint", 1, "n", (*NUMBERS, 0, -1, 11, 2.5, HUGE)),
  ("paint", 2, "steps", (*NUMBERS, 0, -1, 2.5, HUGE)),
  ("paint", 3, "guidance", (*NUMBERS, -1, 0.5, HUGE)),
  ("paint", 4, "solver", (NAN, None, 5, [], {}, True, "magic")),
  ("paint", 5, "seed", (*NUMBERS, 2.5, HUGE)),
  ("paint", 6, "dice", (NAN, None, 1, "x", [], {})),
  (
    "answer",
    0,
    "question",
    (
      NAN,
      None,
      5,
      [],
      True,
      {"text": 5},
      {"text": "x", "files": 5},
      {"text": "x", "files": "x"},
      {"text": "x", "files": [5]},
      {"text": "x", "files": [{"path": 5}]},
      {"text": "x", "files": ["x"] * 300},
    ),
  ),
  ("answer", 1, "temperature", (*NUMBERS, -1, 3, HUGE)),
  ("answer", 2, "top_p", (*NUMBERS, -1, 0, 2, HUGE)),
  ("answer", 3, "max_tokens", (*NUMBERS, 0, -1, 2.5, HUGE)),
]


def test_a_slider_reaches_a_models_own_setting(model):
  from jflow.serving import demo

  steps, solver = (next(f for f in model.family.served if f.name == name) for name in ("steps", "solver"))
  slider = demo._control(steps, 500)
  assert (slider.value, slider.minimum, slider.maximum) == (500, 1, 500)
  assert demo._control(steps, 5).maximum == 100 and demo._control(solver, "heun").value == "heun"


@pytest.mark.parametrize(("event", "position", "field", "values"), SETTINGS, ids=[f"{x[0]}-{x[2]}" for x in SETTINGS])
def test_a_wrong_setting_is_its_visitors_mistake(visitor, served, event, position, field, values):
  _, engine = served
  for value in values:
    sent = visitor.values(event, **({"_6": False} if event == "paint" else {}) | {f"_{position}": value})
    messages = visitor.ask(event, sent)
    told = visiting.warnings(messages)
    assert len(told) == 1 and messages[-1]["success"], (value, messages)
    assert field == "question" or field in told[0], (value, told)
  assert engine.metrics.failures._value.get() == 0 and engine.state == "ready"


def test_what_is_too_large_is_refused(visitor, served):
  post = visitor.http.post
  large, many = ("files", ("a.png", bytes(MAX_UPLOAD * 2**20 + 1))), [("files", ("a.png", b"x"))] * 17
  form = {"Content-Type": "multipart/form-data; boundary=B"}
  answers = [
    post("/gradio_api/upload", files=[large]),
    post("/gradio_api/upload", files=many),
    post("/gradio_api/upload", files=[large] * 16),
    post("/gradio_api/upload", content=b"x"),
    post("/gradio_api/upload", content=b"x", headers=form),
    post("/gradio_api/upload", data={"files": "x"}, files={"y": b""}),
    visitor.join("paint", visitor.values("paint", _0="a" * 2**20)),
    visitor.join("paint", [[]] * 200_000),
    visitor.join("paint", []),
    visitor.join("paint", None),
    visitor.join("paint", visitor.values("paint"), "x" * 65),
    visitor.join("paint", visitor.values("paint"), "../x"),
    visitor.join(10**9, []),
    visitor.join(-1, []),
    visitor.join("paint", visitor.values("paint", _0=json.loads("[" * 90 + "]" * 90))),
  ]
  assert [x.status_code for x in answers] == [
    413,
    400,
    413,
    400,
    400,
    400,
    413,
    400,
    400,
    400,
    400,
    400,
    404,
    404,
    400,
  ]
  for body in (b"", b"x", b"[]", b"[" * 100_000, b"\xff", b'{"fn_index": {}}'):
    assert post("/gradio_api/queue/join", content=body).status_code == 415  # as a form of another page sends it
    as_json = {"Content-Type": "application/json"}
    assert post("/gradio_api/queue/join", content=body, headers=as_json).status_code in (400, 404)


def test_a_prompt_and_pictures_beyond_the_context_are_refused_before_they_are_read(visitor, monkeypatch):
  monkeypatch.setattr(images, "for_understanding", None)  # no picture is decoded
  path = visitor.upload(png())
  many = visitor.ask("answer", visitor.values("answer", _0={"text": "x", "files": [{"path": path}] * 60}))
  long = visitor.ask("answer", visitor.values("answer", _0={"text": "a b " * 2**17, "files": []}))
  painted = visitor.ask("paint", visitor.values("paint", _0="a b " * 2**17))
  assert "at most" in visiting.warnings(many)[0] and "60" in visiting.warnings(many)[0]
  assert all("524,2" in visiting.warnings(x)[0] for x in (long, painted))


def test_others_are_served_while_a_picture_is_decoded(visitor, other, monkeypatch):
  begun, go, real = threading.Event(), threading.Event(), images.for_understanding

  def held(*args):
    begun.set()
    assert go.wait(30)
    return real(*args)

  monkeypatch.setattr(images, "for_understanding", held)
  path = visitor.upload(png())
  assert visitor.join("answer", visitor.values("answer", _0={"text": "x", "files": [{"path": path}]}, _3=1)).is_success
  with visitor.listening() as messages:
    assert begun.wait(30)
    assert other.http.get("/").is_success and other.upload(png())
    assert other.ask("answer", other.values("answer", _3=1))[-1]["success"]
    assert other.ask("paint", other.values("paint", _1=1, _2=1))[-1]["success"]
    go.set()
    assert list(messages)[-1]["success"]


def test_work_ends_when_its_visitor_leaves(visitor, served, monkeypatch):
  _, engine = served
  begin, real = threading.Event(), serving.decoder(engine).step

  def step(n):
    assert begin.wait(30)
    return real(n)

  monkeypatch.setattr(serving.decoder(engine), "step", step)
  assert visitor.join("answer", visitor.values("answer")).is_success
  with visitor.listening() as messages:
    assert any(x["msg"] == "process_generating" for x in messages)
  jobs = list(serving.requests(engine))
  limit = time.monotonic() + 20
  while not all(x.gone for x in jobs) and time.monotonic() < limit:
    time.sleep(0.02)
  left = [x.gone for x in jobs]
  begin.set()
  assert left == [True]


# --- text that is no text ----------------------------------------------------------------------------------


def test_markup_of_visitors_is_shown_as_text(visitor, served):
  markup = '<img src=x onerror="alert(1)">'
  path = visitor.upload(b"x", f"{markup}.png")
  told = visiting.warnings(visitor.ask("answer", visitor.values("answer", _0={"text": "x", "files": [{"path": path}]})))
  assert "&lt;img" in told[0] and "<" not in told[0] + path
  assert "<" not in visiting.warnings(visitor.ask("paint", visitor.values("paint", _4=markup)))[0]
  page = visitor.http.get("/")
  assert page.headers["content-security-policy"].startswith("default-src 'self'")
  assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
  script = visitor.upload(b"<script>alert(1)</script>", "a.html")
  got = visitor.http.get(f"/gradio_api/file={script}")
  assert (
    got.headers["content-type"] == "application/octet-stream" and "attachment" in got.headers["content-disposition"]
  )
  assert got.headers["x-content-type-options"] == "nosniff"


# --- what is kept ------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path, monkeypatch):
  from jflow.serving import visitors

  monkeypatch.setattr(visitors, "MAX_FILES", 3)
  monkeypatch.setattr(visitors, "MAX_SESSIONS", 2)
  monkeypatch.setattr(visitors, "MAX_TOTAL", 50)
  return visitors.Visitors(tmp_path, 2**20)


def on_disk(folder):
  return sorted(x.name for x in pathlib.Path(folder).rglob("*") if x.is_file())


def test_files_go_with_their_visitor(kept, tmp_path):
  async def visit():
    here, gone = kept.session("here", "a", new=True), kept.session("gone", "b", new=True)
    for owner in ("a", "b", None):
      await kept.keep(owner, f"{owner}.png", "image/png", b"x")
    shown = await kept.keep("b", "shown.png", "image/png", b"x")
    gone.talk.hold([shown])
    with here.connected(listens=False):
      kept.sweep(linger=1e6)
      assert len(on_disk(tmp_path)) == 4
      kept.sweep(linger=0)
      assert on_disk(tmp_path) == ["a.png"]
    kept.sweep(linger=0)
    assert on_disk(tmp_path) == [] and list(tmp_path.iterdir()) == []

  asyncio.run(visit())


@contextlib.contextmanager
def answered(status: int):
  with pytest.raises(ApiError) as caught:
    yield
  assert caught.value.status == status


def test_files_and_sessions_are_limited(kept, tmp_path, monkeypatch):
  from jflow.serving import visitors

  async def visit():
    here = kept.session("here", "a", new=True)
    for i in range(5):  # the oldest go that nothing shows
      await kept.keep("a", f"{i}.png", "image/png", b"x")
    assert on_disk(tmp_path) == ["2.png", "3.png", "4.png"]
    here.talk.hold([kept.file(str(x), "a") for x in tmp_path.rglob("*.png")])
    with answered(413):
      await kept.keep("a", "5.png", "image/png", b"x")
    with here.connected(listens=False):
      await kept.keep("b", "b.png", "image/png", bytes(40))
      await kept.keep("c", "c.png", "image/png", bytes(40))  # for which those who are gone make room
      assert on_disk(tmp_path) == ["2.png", "3.png", "4.png", "c.png"]
      with answered(507):
        await kept.keep("d", "d.png", "image/png", bytes(60))
      second = kept.session("second", "b", new=True)
      third = kept.session("third", "b", new=True)  # takes the place of the second, which nobody has open
      with answered(404):
        kept.session("second", "b")
      with third.connected(listens=False):
        fourth = kept.session("fourth", "b", new=True)  # and this that of the third, which holds nothing
        fourth.talk.turns.append({"role": "user", "content": "x"})
        with fourth.connected(listens=True), answered(503):
          kept.session("fifth", "b", new=True)
        monkeypatch.setattr(visitors, "IDLE", -1.0)
        with fourth.connected(listens=True):
          with fourth.working("an answer"):  # what works stays, and the other is what has asked for nothing the longest
            kept.session("fifth", "b", new=True)
            with answered(404):
              kept.session("here", "a")
            assert kept.session("fourth", "b") is fourth
          await kept.keep("e", "e.png", "image/png", bytes(45))  # nor do files of those who are idle fill the disk
    assert second is not here

  asyncio.run(visit())


def test_a_short_run_of_the_fuzzer(served, folder):
  counts = fuzz_page.fuzz(seed=0, tries=250, base=served[0], folder=folder)
  assert counts == {"tried": 250, "escaped": 0, "hung": 0, "lost": 0}
