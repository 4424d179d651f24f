"""The server: the stream is the answer, seeds hold in any company, limits hold, who leaves frees a place."""

import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import io
import json
import signal
import socket
import threading
import time

import httpx
import numpy as np
import pytest
import serving
import tiny
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from jflow.__main__ import main
from jflow.data.tokenizer import Tokenizer
from jflow.generation.flow import sampler
from jflow.generation.flow.settings import Settings
from jflow.inference.decoding import Text
from jflow.serving import schemas
from jflow.serving.engine import Engine
from jflow.serving.jobs import Job, Pictures
from jflow.serving.metrics import Metrics
from jflow.serving.schemas import ApiError

CHAT, PAINT = "/v1/chat/completions", "/v1/images/generations"


@pytest.fixture(scope="module")
def model():
  return tiny.pipeline()


@pytest.fixture(scope="module")
def served(model):
  with serving.serving(model) as (base, engine):
    with serving.client(base) as client:
      yield client, engine


def ask(text="Why?", **more):
  return {"messages": [{"role": "user", "content": text}], "max_tokens": 12} | more


def events(response) -> list:
  lines = [line for line in response.iter_lines() if line]
  assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
  return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


# --- answers ----------------------------------------------------------------------------------------------


def test_the_stream_joins_to_the_answer_and_counts_the_same_tokens(served):
  client, _ = served
  whole = client.post(CHAT, json=ask(max_tokens=60)).json()
  with client.stream(
    "POST", CHAT, json=ask(max_tokens=60, stream=True, stream_options={"include_usage": True})
  ) as response:
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response)
  assert len({chunk["id"] for chunk in chunks}) == 1
  *parts, usage = chunks
  assert parts[0]["choices"][0]["delta"]["role"] == "assistant" and usage["choices"] == []
  assert "".join(x["choices"][0]["delta"].get("content", "") for x in parts) == said_of(whole) != ""
  assert len(parts) > 3, "the answer came in one piece"
  assert [x["choices"][0]["finish_reason"] for x in parts[1:]] == [None] * (len(parts) - 2) + ["length"]
  assert usage["usage"] == whole["usage"] and whole["choices"][0]["finish_reason"] == "length"
  assert whole["usage"]["completion_tokens"] == 60


def said_of(body: dict) -> str:
  return body["choices"][0]["message"]["content"]


@pytest.mark.parametrize("text", ["a red circle", " héllo 世界 🙂 end", "  two\n\nlines  ", "🙂🙂"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_pieces_of_text_never_cut_a_character(text, chunk):
  tokenizer = Tokenizer.load(str(tiny.TOKENIZER))
  ids, stream = tokenizer.encode(text), Text(tokenizer)
  pieces = [stream.add(ids[i : i + chunk], last=i + chunk >= len(ids)) for i in range(0, len(ids), chunk)]
  assert "".join(pieces) == text.strip() and not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_not_lost():
  tokenizer = Tokenizer.load(str(tiny.TOKENIZER))
  stream = Text(tokenizer)
  assert stream.add(tokenizer.encode("世")[:1], last=False) == ""
  assert stream.add([], last=True) == "\ufffd"


def test_a_seed_gives_one_answer_whatever_shares_the_batch(served):
  client, _ = served
  body = ask(temperature=1.0, seed=5)
  alone = serving.said(client.post(CHAT, json=body))
  others = [ask(f"What is {i}? " * (i + 1), temperature=1.0, seed=i, max_tokens=5 + 7 * i) for i in range(6)]
  with concurrent.futures.ThreadPoolExecutor(12) as pool:
    jobs = [pool.submit(client.post, CHAT, json=x) for x in (body, *others, body)]
    answers = [serving.said(job.result()) for job in jobs]
  assert answers[0] == answers[-1] == alone
  assert len(set(answers)) == len(others) + 1


def test_without_a_seed_sampled_answers_differ_and_tell_theirs(served):
  client, _ = served
  first, second = (client.post(CHAT, json=ask(temperature=1.0)).json() for _ in range(2))
  assert said_of(first) != said_of(second)
  assert serving.said(client.post(CHAT, json=ask(temperature=1.0, seed=first["seed"]))) == said_of(first)


def test_pictures_stand_where_the_conversation_shows_them(served, model):
  client, _ = served
  pictures = [np.random.default_rng(i).integers(0, 256, (20, 12, 3), np.uint8) for i in range(2)]

  def part(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return {
      "type": "image_url",
      "image_url": {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()},
    }

  text = lambda x: {"type": "text", "text": x}
  messages = [
    {"role": "user", "content": [part(pictures[0]), text("What?")]},
    {"role": "assistant", "content": [text("A ring.")]},
    {"role": "user", "content": [text("And"), part(pictures[1]), text("this one?")]},
  ]
  turns = [
    {"role": "user", "content": "<image>\nWhat?"},
    {"role": "assistant", "content": "A ring."},
    {"role": "user", "content": "And\n<image>\nthis one?"},
  ]
  assert serving.said(client.post(CHAT, json={"messages": messages, "max_tokens": 9})) == model.understand(
    turns, pictures, 9
  )


@pytest.mark.parametrize("mark", ["<image>", "<image_placeholder>"])
def test_image_marks_in_a_text_are_refused_as_by_the_command(served, mark):
  client, _ = served
  refused = client.post(CHAT, json=ask(f"{mark} what?"))
  assert refused.status_code == 400 and mark in refused.json()["error"]["message"]


def test_a_body_on_its_way_takes_no_place_of_the_queue(model):
  with serving.serving(model, slots=1, queue=1) as (base, _), serving.client(base) as client:
    body = json.dumps(ask(max_tokens=1)).encode()
    address = client.base_url.host, client.base_url.port
    with socket.create_connection(address) as slow:
      head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
      head += f"Content-Length: {len(body)}\r\n\r\n"
      slow.sendall(head.encode() + body[:10])
      for _ in range(3):
        assert serving.said(client.post(CHAT, json=ask(max_tokens=1)))
      slow.sendall(body[10:])
      assert slow.recv(100).startswith(b"HTTP/1.1 200")


def test_a_picture_is_that_of_its_prompt_and_seed_in_any_batch(served, model):
  client, engine = served
  bodies = [{"prompt": "a ring " * (1 + i), "n": 1 + i % 3, "seed": 10 * i, "steps": 4} for i in range(5)]
  with concurrent.futures.ThreadPoolExecutor(5) as pool:
    answers = list(pool.map(lambda body: client.post(PAINT, json=body).json()["data"], bodies))
  for body, data in zip(bodies, answers):
    assert [x["seed"] for x in data] == [body["seed"] + j for j in range(body["n"])]
    want = model.generate([body["prompt"]], 4, seed=body["seed"], num_images=body["n"], batch_size=1)
    for x, image in zip(data, want, strict=True):
      got = Image.open(io.BytesIO(base64.b64decode(x["b64_json"])))
      assert np.abs(np.asarray(got).astype(int) - np.asarray(image)).max() <= 1
      told = json.loads(got.text["jflow"])
      assert got.text["Description"] == told["prompt"] == body["prompt"]
      assert (told["seed"], told["steps"], told["solver"]) == (x["seed"], 4, "euler")
  sums = metrics(client)
  assert sums["jflow_painting_batch_sum"] > sums["jflow_painting_batch_count"], "no two pictures shared a batch"


# --- limits -----------------------------------------------------------------------------------------------


class Gate:
  """Lets the model make as many steps as it is told to, then all."""

  def __init__(self, monkeypatch, engine, steps: int = 0):
    self._steps, self._open = threading.Semaphore(steps), False
    real = serving.decoder(engine).step

    def step(n):
      assert self._open or self._steps.acquire(timeout=30)
      return real(n)

    monkeypatch.setattr(serving.decoder(engine), "step", step)

  def open(self):
    self._open = True
    self._steps.release()


def metrics(client) -> dict[str, float]:
  """Every sample of /metrics, by its name and labels."""
  families = text_string_to_metric_families(client.get("/metrics").text)
  return {
    s.name + "".join(f"/{v}" for k, v in sorted(s.labels.items()) if k != "le"): s.value
    for f in families
    for s in f.samples
  }


def test_a_full_queue_says_when_to_come_again(model, monkeypatch):
  with serving.serving(model, slots=1, queue=2) as (base, engine), serving.client(base) as client:
    gate = Gate(monkeypatch, engine)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      first = [pool.submit(client.post, CHAT, json=ask(max_tokens=2)) for _ in range(2)]
      serving.until(lambda: len(serving.requests(engine)) == 2)
      for body, path in ((ask(), CHAT), ({"prompt": "a ring"}, PAINT)):
        refused = client.post(path, json=body)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
      gate.open()
      assert all(serving.said(job.result()) for job in first)
    assert serving.said(client.post(CHAT, json=ask()))


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_slot(model, monkeypatch, stream):
  with serving.serving(model, slots=1) as (base, engine), serving.client(base) as client:
    gate = Gate(monkeypatch, engine, steps=1)
    if stream:
      with client.stream("POST", CHAT, json=ask(max_tokens=100, stream=True)) as response:
        next(response.iter_lines())
    else:
      with pytest.raises(httpx.ReadTimeout):
        client.post(CHAT, json=ask(max_tokens=100), timeout=1.0)
    serving.until(lambda: all(job.gone for job in serving.requests(engine)))
    gate.open()
    serving.until(lambda: not serving.requests(engine))
    assert not engine._answering and metrics(client)["jflow_tokens_total/written"] < 100
    assert serving.said(client.post(CHAT, json=ask()))


def test_a_request_that_takes_too_long_is_ended(model, monkeypatch):
  with serving.serving(model, slots=1, timeout=1.0) as (base, engine), serving.client(base) as client:
    gate = Gate(monkeypatch, engine)
    late = client.post(CHAT, json=ask())
    assert late.status_code == 504 and "longer than 1 s" in late.json()["error"]["message"]
    gate.open()
    serving.until(lambda: not serving.requests(engine))


def test_a_failure_of_the_model_costs_what_it_worked_on_alone(model, monkeypatch):
  with serving.serving(model) as (base, engine), serving.client(base) as client:
    monkeypatch.setattr(serving.decoder(engine), "step", lambda n: 1 // 0)
    failed = client.post(CHAT, json=ask())
    assert failed.status_code == 500 and "\n" not in failed.json()["error"]["message"]
    assert serving.said(client.post(CHAT, json=ask())) and engine.state == "ready"
    monkeypatch.setattr(model, "generate", lambda *_, **__: 1 // 0)
    assert client.post(PAINT, json={"prompt": "a ring"}).status_code == 500
    monkeypatch.undo()
    assert client.post(PAINT, json={"prompt": "a ring", "steps": 4}).status_code == 200


def test_a_model_that_keeps_failing_ends_the_server(model, monkeypatch):
  with serving.serving(model) as (base, engine), serving.client(base) as client:
    monkeypatch.setattr(serving.decoder(engine), "step", lambda n: 1 // 0)
    monkeypatch.setattr("jflow.serving.engine.Decoder", lambda *_: 1 // 0)
    assert metrics(client)["jflow_ready"] == 1
    assert client.post(CHAT, json=ask()).status_code == 503
    serving.until(lambda: engine.state == "failed")
    for get in (lambda: client.post(CHAT, json=ask()), lambda: client.get("/health")):
      with contextlib.suppress(httpx.TransportError):  # the server may be gone already
        assert get().status_code == 503


def test_a_body_without_a_length_is_cut_at_the_limit(model):
  with serving.serving(model, max_body=1000) as (base, _), serving.client(base) as client:
    body = json.dumps(ask("why " * 1000)).encode()
    parts = lambda: iter([body[:500], body[500:]])
    refused = client.post(CHAT, content=parts(), headers={"Content-Type": "application/json"})
    assert refused.status_code == 413 and "1,000 bytes" in refused.json()["error"]["message"]


def test_the_token_opens_all_but_health(model):
  with serving.serving(model, token="secret") as (base, _), serving.client(base) as client:
    for path in ("/metrics", "/v1/models"):
      assert client.get(path).status_code == 401
      assert client.get(path, headers={"Authorization": "Bearer Secret"}).status_code == 401
      assert client.get(path, headers={"Authorization": "bearer secret"}).status_code == 200
    assert client.post(CHAT, json=ask()).headers["www-authenticate"] == "Bearer"
    assert client.get("/health").json() == {"status": "ready"}


def test_ready_means_that_pictures_of_any_number_are_compiled(model, monkeypatch):
  monkeypatch.setattr(sampler.solve, "_kept", collections.OrderedDict())  # without those of other tests
  with serving.serving(model, batch=4):
    compiled = lambda rows: model.prepare_images(["a ring"], model.settings(), rows=rows, compile=False)
    assert all(compiled(rows) for rows in (1, 2, 4)) and not compiled(8)


def test_both_kinds_of_work_get_half_of_the_time(model):
  """A batch of pictures that costs 20 chunks of text is followed by 20 chunks."""
  engine = Engine(model, Metrics(), slots=1, context=64, batch=1, queue=9, timeout=9.0)

  async def fill():
    engine._chats.append(Job("a question", 9.0))
    engine._images.add(Job(Pictures("a ring", 1, 0, Settings(4, 1.0)), 9.0))

  asyncio.run(fill())
  spent = collections.Counter()
  for _ in range(400):
    kind = engine._whose_turn()
    engine._spent[kind] += {"chat": 1.0, "painting": 20.0}[kind]
    spent[kind] += {"chat": 1.0, "painting": 20.0}[kind]
    assert abs(spent["chat"] - spent["painting"]) <= 20.0
  assert min(spent.values()) > 100


def test_metrics_count_what_was_done(model):
  with serving.serving(model) as (base, _), serving.client(base) as client:
    client.post(CHAT, json=ask())
    client.post(CHAT, json=ask(temperature=-1))
    client.post(PAINT, json={"prompt": "a ring", "n": 2, "steps": 4})
    seen = metrics(client)
  assert seen["jflow_requests_total//v1/chat/completions/200"] == 1
  assert seen["jflow_requests_total//v1/chat/completions/400"] == 1
  assert seen["jflow_tokens_total/written"] == 12 and seen["jflow_tokens_total/read"] > 1
  assert seen["jflow_pictures_total"] == 2 + 1  # one was painted to compile
  assert seen["jflow_running/chat"] == seen["jflow_waiting/painting"] == 0


def test_models_tell_what_is_served(served):
  client, _ = served
  (model,) = client.get("/v1/models").json()["data"]
  assert model["id"] == serving.NAME and model["image_size"] == "16x16" and model["can_paint"]
  assert serving.said(client.post(CHAT, json=ask(model=serving.NAME)))


def test_a_model_that_cannot_paint_is_what_is_wrong(served, monkeypatch):
  client, engine = served
  monkeypatch.setattr(engine.pipeline, "can_generate", False)
  refused = client.post(PAINT, json={"prompt": "a ring"})
  assert refused.status_code == 400 and refused.json()["error"]["param"] == "model"


# --- requests ---------------------------------------------------------------------------------------------


def test_fields_that_ask_for_nothing_special_are_welcome():
  body = ask(n=1, stop=None, presence_penalty=0, frequency_penalty=0.0, logprobs=False, user="me", tools=[])
  assert schemas.parse_chat(body | {"max_completion_tokens": 7, "max_tokens": None}, "m").max_tokens == 7
  serving.images({"prompt": "a", "quality": "auto", "size": "auto", "response_format": "b64_json"})


@pytest.mark.parametrize("field, value", [("stop", [""]), ("tools", [{}]), ("logprobs", True), ("n", 3)])
def test_fields_that_ask_for_what_is_missing_are_refused(field, value):
  with pytest.raises(ApiError) as caught:
    schemas.parse_chat(ask(**{field: value}), "m")
  assert caught.value.field == field


def test_an_error_is_one_line_whatever_a_client_wrote():
  for text in ("a\nb\r\nc", "\ud800", "x" * 10_000):
    with pytest.raises(ApiError) as caught:
      schemas.parse_chat(ask(**{text: 1}), "m")
    line = json.dumps(caught.value.body())
    assert "\n" not in caught.value.message and len(line) < 400


# --- the command ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "flags, line",
  [
    (["--port=70000"], "--port=70000 must be at most 65535"),
    (["--slots=0"], "--slots=0 must be at least 1"),
    (["--context=1"], "--context=1 must be at least 2"),
    (["--batch=5"], "--batch=5 must be a power of two"),
    (["--timeout=0"], "--timeout=0 must be"),
    (["--max_body=0"], "--max_body=0 must be"),
    (["--token_file=nowhere"], "--token_file=nowhere cannot be read"),
    (["--token="], "the token must be one word"),
    (["--host=192.0.2.1"], "--host=192.0.2.1 --port=8000 cannot be taken"),
    ([], "checkpoint nowhere is not a directory"),
  ],
)
def test_mistakes_get_one_line_before_anything_is_loaded(capsys, flags, line):
  try:
    code = main(["serve", "--checkpoint=nowhere", *(flags or ["--port=0"])])
  except SystemExit as end:  # what the flags alone tell
    code = end.code
  error = capsys.readouterr().err
  assert (
    code == 2 and error.replace("jflow: error: ", "jflow: ").startswith("jflow: " + line) and error.count("\n") == 1
  )


def test_a_port_that_is_taken(capsys, served):
  client, _ = served
  assert main(["serve", "--checkpoint=nowhere", f"--port={client.base_url.port}"]) == 2
  assert "cannot be taken: Address already in use" in capsys.readouterr().err


def test_sigterm_finishes_what_runs_and_ends_with_code_0(tmp_path):
  """A process of its own: an answer that has begun is whole, and nobody can connect any more."""
  from tools import load_test

  checkpoint = load_test.random_checkpoint(tmp_path / "tiny")
  server, base = load_test.start(checkpoint, "--slots=1")
  with httpx.Client(base_url=base, timeout=60) as client:
    with client.stream("POST", CHAT, json=ask(max_tokens=100, stream=True)) as response:
      lines = response.iter_lines()
      first = next(lines)
      server.send_signal(signal.SIGTERM)
      rest = [first, *(line for line in lines if line)]
  assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] in (
    "stop",
    "length",
  )
  assert server.wait(30) == 0
  assert "stopped; every request that was accepted has its answer" in server.stdout.read()
  with pytest.raises(httpx.ConnectError):
    httpx.get(base + "/health")


def test_a_second_signal_cuts_what_runs_and_ends_with_code_1(tmp_path):
  """While the model paints: the process does not wait for a program that would run on for minutes."""
  from tools import load_test

  server, base = load_test.start(load_test.random_checkpoint(tmp_path / "tiny"))
  body = {"prompt": "x", "n": 10, "steps": 200}
  with httpx.Client(base_url=base, timeout=60) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
    pool.submit(lambda: client.post("/v1/images/generations", json=body))
    while 'jflow_running{kind="painting"} 1.0' not in httpx.get(base + "/metrics").text:
      time.sleep(0.02)
    server.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 1
