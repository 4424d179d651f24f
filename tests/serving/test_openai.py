"""Requests as clients of the OpenAI shape send them: the official client, and what others put on the wire."""

import asyncio
import base64
import inspect
import io
import itertools
import json
import urllib.parse

import numpy as np
import pytest
import serving
import tiny
from PIL import Image

from jflow.data.tokenizer import Tokenizer
from jflow.inference.decoding import Text
from jflow.serving import data_uri, schemas
from jflow.serving.schemas import ApiError

CHAT, PAINT = "/v1/chat/completions", "/v1/images/generations"
USER = {"role": "user", "content": "Why?"}


@pytest.fixture(scope="module")
def model():
  return tiny.pipeline()


@pytest.fixture(scope="module")
def served(model):
  with serving.serving(model) as (base, engine), serving.client(base) as client:
    yield client, engine


@pytest.fixture(scope="module")
def openai():
  return pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(openai, served):
  with openai.OpenAI(base_url=f"{served[0].base_url}/v1", api_key="anything", max_retries=0, timeout=60) as client:
    yield client


def ask(*messages, **more):
  return {"messages": list(messages) or [USER], "max_tokens": 8} | more


def picture(seed=0, kind="PNG") -> bytes:
  pixels = np.random.default_rng(seed).integers(0, 256, (20, 12, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind)
  return file.getvalue()


URL = "data:image/png;base64," + base64.b64encode(picture()).decode()


def show(url, text="What?", **more):
  part = {"type": "image_url", "image_url": {"url": url} | more}
  return {"role": "user", "content": [part, {"type": "text", "text": text}]}


def optional(method) -> list[str]:
  """The arguments of a method of the client that accept None."""
  hints = inspect.signature(method).parameters.values()
  return [x.name for x in hints if "None" in str(x.annotation) or "Optional" in str(x.annotation)]


# --- the official client ----------------------------------------------------------------------------------


def test_whole_streamed_and_async_answers_are_one(openai, client, model):
  request = dict(ask(max_tokens=20), model=serving.NAME, temperature=1.0, seed=3)
  whole = client.chat.completions.create(**request)
  want = model.understand([USER], max_tokens=20, temperature=1.0, seed=3)
  assert whole.choices[0].message.content == want != "" and whole.choices[0].finish_reason == "length"
  assert whole.object == "chat.completion" and type(whole.created) is int and whole.usage.completion_tokens == 20
  assert whole.choices[0].logprobs is whole.choices[0].message.refusal is whole.choices[0].message.tool_calls is None

  def joined(chunks):
    *parts, last = chunks
    assert {x.object for x in chunks} == {"chat.completion.chunk"} and len({(x.id, x.created) for x in chunks}) == 1
    assert parts[0].choices[0].delta.role == "assistant" and not any(x.usage for x in parts)
    assert last.choices == [] and last.usage == whole.usage
    assert [x.choices[0].finish_reason for x in parts] == [None] * (len(parts) - 1) + ["length"]
    return "".join(x.choices[0].delta.content or "" for x in parts)

  streamed = dict(request, stream=True, stream_options={"include_usage": True})
  assert joined(list(client.chat.completions.create(**streamed))) == want

  async def later():
    async with openai.AsyncOpenAI(base_url=client.base_url, api_key="x", max_retries=0) as ahead:
      answers = await asyncio.gather(*(ahead.chat.completions.create(**request) for _ in range(2)))
      chunks = [chunk async for chunk in await ahead.chat.completions.create(**streamed)]
      painted = await ahead.images.generate(prompt="a ring", extra_body={"steps": 4, "seed": 5})
      return answers, chunks, painted

  answers, chunks, painted = asyncio.run(later())
  assert {x.choices[0].message.content for x in answers} == {want} and joined(chunks) == want
  assert (
    painted.data[0].b64_json
    == client.images.generate(prompt="a ring", extra_body={"steps": 4, "seed": 5}).data[0].b64_json
  )


def test_none_is_left_out_everywhere(client):
  create, generate = client.chat.completions.create, client.images.generate
  own = {"extra_headers", "extra_query", "extra_body", "timeout"}
  nothing = {name: None for name in optional(create) if name not in own}
  assert {"n", "seed", "stop", "audio", "reasoning_effort", "metadata"} <= set(nothing)
  more = dict.fromkeys((*nothing, "anything", "temprature", "response_format", "stream_options", "tools"))
  first = create(**ask() | {"max_tokens": 8, "model": serving.NAME})
  message = {
    "role": "user",
    "content": [{"type": "text", "text": "Why?", "x": None}],
    "name": None,
    "tool_calls": None,
  }
  empty = ask(message) | nothing | {"model": serving.NAME, "max_tokens": 8}
  assert create(**empty, extra_body={k: v for k, v in more.items() if k != "max_tokens"}).choices == first.choices
  nothing = {name: None for name in optional(generate) if name not in own}
  assert {"n", "output_compression", "partial_images", "size", "stream"} <= set(nothing)
  body = {"steps": 4, "seed": 0, "guidance": None, "solver": None, "shift": None, "anything": None}
  (painted,) = generate(prompt="a ring", extra_body=body, **nothing).data
  assert Image.open(io.BytesIO(base64.b64decode(painted.b64_json))).format == "PNG"


def test_an_answer_is_taken_back_as_the_client_dumps_it(client):
  create = lambda *messages: client.chat.completions.create(**ask(*messages), model=serving.NAME, temperature=1.0)
  messages = [USER]
  for _ in range(3):
    messages += [create(*messages).choices[0].message.model_dump(), USER]
  assert messages[1]["tool_calls"] is None
  assert create(*messages).choices[0].message.role == "assistant"


def test_models_are_listed_and_found(openai, client):
  assert [x.id for x in client.models.list()] == [serving.NAME]
  found = client.models.retrieve(serving.NAME)
  assert (found.id, found.object) == (serving.NAME, "model") and type(found.created) is int
  assert client.get("/models/", cast_to=object) == client.get("/models", cast_to=object)
  for wrong in ("gpt-4o", "org/name", f"{serving.NAME}/x"):
    with pytest.raises(openai.NotFoundError) as caught:
      client.models.retrieve(wrong)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_errors_are_those_of_the_client(openai, client, served, model, monkeypatch):
  create = client.chat.completions.create
  for more, kind, code, param in (
    ({"temperature": 9}, openai.BadRequestError, "invalid_value", "temperature"),
    ({"model": "gpt-4o"}, openai.NotFoundError, "model_not_found", "model"),
    (
      {"messages": [USER | {"content": "why " * 500}]},
      openai.BadRequestError,
      "context_length_exceeded",
      "messages",
    ),
  ):
    for stream in (False, True):
      with pytest.raises(kind) as caught:
        create(**dict(ask(), model=serving.NAME, stream=stream) | more)
      assert (caught.value.code, caught.value.param) == (code, param) and caught.value.type
  with serving.serving(model, token="secret") as (base, engine):
    with pytest.raises(openai.AuthenticationError) as caught:
      client.with_options(base_url=f"{base}/v1").models.list()
    assert caught.value.code == "invalid_api_key"
    known = client.with_options(base_url=f"{base}/v1", api_key="secret")
    raw = known.chat.completions.with_raw_response.create(**ask(), model=serving.NAME)
    assert raw.headers["content-type"] == "application/json" and raw.parse().choices
    step = itertools.count()
    real = serving.decoder(engine).step
    monkeypatch.setattr(serving.decoder(engine), "step", lambda n: real(1) if next(step) < 3 else 1 // 0)
    seen = []
    with pytest.raises(openai.APIError) as caught:
      for chunk in known.chat.completions.create(**ask(max_tokens=50), model=serving.NAME, stream=True):
        seen.append(chunk)
    assert seen and caught.value.code == "server_error"


# --- fields -----------------------------------------------------------------------------------------------

ZERO = (0, 0.0, None)
WELCOME = {
  "n": (1,),
  "stop": ([], "x", ["x", "y"]),
  "frequency_penalty": ZERO,
  "presence_penalty": ZERO,
  "logit_bias": ({}, {"5": None}),
  "logprobs": (False,),
  "top_logprobs": (0,),
  "tools": ([],),
  "functions": ([],),
  "tool_choice": ("none", "auto"),
  "function_call": ("none", "auto"),
  "parallel_tool_calls": (True, False),
  "prompt_cache_key": ("a",),
  "prompt_cache_retention": ("24h",),
  "safety_identifier": ("me",),
  "user": ("me",),
  "metadata": ({}, {"a": "b"}),
  "store": (False,),
  "service_tier": ("auto", "default"),
  "response_format": ({"type": "text"}, {"type": "text", "x": None}),
  "modalities": (["text"],),
  "reasoning_effort": ("none",),
  "verbosity": ("medium",),
  "model": ("m",),
  "stream_options": ({}, {"include_usage": False}, {"include_usage": None, "include_obfuscation": False}),
  "max_completion_tokens": (5,),
  "temperature": (0, 2.0),
  "top_p": (1, 0.1),
  "anything": (None,),
}
WELCOME_PAINTING = {
  "n": (1, 10),
  "size": ("auto", "16x16"),
  "quality": ("auto", "standard"),
  "background": ("auto", "opaque"),
  "moderation": ("auto", "low"),
  "output_format": ("png",),
  "output_compression": (100,),
  "partial_images": (0,),
  "response_format": ("b64_json",),
  "user": ("me",),
  "stream": (False,),
  "model": ("m",),
  "style": (None,),
  "x": (None,),
}
REFUSED = {
  "n": (2, 0, True, 1.0, "1"),
  "stop": ("", [""], [None], ["a"] * 5, 5, {}, ["a" * 1001]),
  "frequency_penalty": (0.5, "0", False),
  "presence_penalty": (-1,),
  "logit_bias": ({"5": 1},),
  "logprobs": (True, 0),
  "top_logprobs": (1,),
  "tools": ([{}], {}),
  "functions": ([{}],),
  "tool_choice": ("required", {"type": "function"}),
  "function_call": ({"name": "f"},),
  "parallel_tool_calls": (1,),
  "store": (True,),
  "service_tier": ("flex", "priority"),
  "user": (5,),
  "metadata": ("a",),
  "response_format": ({"type": "json_object"}, {}, "text"),
  "modalities": (["text", "audio"], []),
  "audio": ({},),
  "prediction": ({},),
  "web_search_options": ({},),
  "reasoning_effort": ("high",),
  "verbosity": ("low",),
  "max_tokens": (0, -1, 8.0, "8", True),
  "max_completion_tokens": (0, 1.5),
  "temperature": (-1, 2.1, "1", True, [], 10**30),
  "top_p": (0, 1.1),
  "seed": (1.0, "1", True, 2**64, -(2**63) - 1),
  "stream": (1, "true", 0),
  "stream_options": (5, []),
  "model": (5, ["m"]),
  "temprature": (1, 0, "", False),
  "messages": (None, {}, "Why?"),
}
REFUSED_PAINTING = {
  "n": (0, 11, True, 1.0, "1"),
  "size": ("17x17", "", 16),
  "quality": ("hd",),
  "background": ("transparent",),
  "style": ("vivid",),
  "output_format": ("jpeg",),
  "output_compression": (50, 100.0),
  "partial_images": (1, False),
  "response_format": ("url", 5),
  "stream": (True, 1),
  "prompt": (None, "", " ", 5, ["a"]),
  "seed": (0.0, "0", 2**64),
  "steps": (0, 201, 4.0, True),
  "guidance": (0.5, -1, "2"),
  "solver": ("dopri", 5),
  "shift": (0, 101),
  "negative_prompt": ("a",),
  "store": (True,),
}


def test_fields_that_ask_for_nothing_missing_are_welcome():
  for name, value in ((name, value) for name, values in WELCOME.items() for value in values):
    assert schemas.parse_chat(ask(**{name: value}), "m").turns, (name, value)
  for name, value in ((name, value) for name, values in WELCOME_PAINTING.items() for value in values):
    assert serving.images({"prompt": "a", name: value}).count == (value if name == "n" else 1)


def test_fields_that_ask_for_something_missing_are_refused_by_name():
  painting = lambda name, value: serving.images({"prompt": "a", name: value})
  for parse, refused in (
    (lambda name, value: schemas.parse_chat(ask(**{name: value}), "m"), REFUSED),
    (painting, REFUSED_PAINTING),
  ):
    for name, value in ((name, value) for name, values in refused.items() for value in values):
      with pytest.raises(ApiError) as caught:
        parse(name, value)
        pytest.fail(f"{name}={value!r} was taken")
      error = caught.value.body()["error"]
      assert (caught.value.status, error["param"]) == (400, name), (name, value)
      assert name in error["message"] and len(error["message"]) < 300 and isinstance(error["code"], str)


@pytest.mark.parametrize(
  "message, param",
  [
    ({"role": "tool", "content": "4", "tool_call_id": "a"}, "role"),
    ({"role": "function", "content": "4", "name": "f"}, "role"),
    ({"role": "User", "content": "x"}, "role"),
    ({"content": "x"}, "role"),
    ({"role": "user"}, "content"),
    ({"role": "user", "content": None}, "content"),
    ({"role": "system", "content": None}, "content"),
    ({"role": "user", "content": 5}, "content"),
    ({"role": "user", "content": {"type": "text", "text": "x"}}, "content"),
    ({"role": "user", "content": [None]}, "content[0]"),
    ({"role": "user", "content": [{"text": "x"}]}, "content[0].type"),
    ({"role": "user", "content": [{"type": "text"}]}, "content[0].text"),
    ({"role": "user", "content": [{"type": "text", "text": "x", "txet": "y"}]}, "content[0].txet"),
    ({"role": "user", "content": [{"type": "input_text", "text": "x"}]}, "content[0].type"),
    ({"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}, "content[0].type"),
    ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "content[0].type"),
    ({"role": "user", "content": [{"type": "image_url"}]}, "content[0].image_url"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "content[0].image_url.url"),
    (show("data:,", detail="ultra"), "content[0].image_url.detail"),
    (show("data:,") | {"role": "assistant"}, "content[0]"),
    (show("data:,") | {"role": "system"}, "content[0]"),
    (USER | {"contnet": "x"}, "contnet"),
    (USER | {"name": 5}, "name"),
    ({"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}, "tool_calls"),
    ({"role": "assistant", "content": "", "function_call": {"name": "f"}}, "function_call"),
    ({"role": "assistant", "content": "", "audio": {"id": "a"}}, "audio"),
    ({"role": "assistant", "content": "", "refusal": "No."}, "refusal"),
    ("Why?", ""),
    (None, ""),
  ],
)
def test_a_message_is_refused_by_its_place(message, param):
  with pytest.raises(ApiError) as caught:
    schemas.parse_chat(ask(USER, message), "m")
  assert (caught.value.status, caught.value.field) == (400, f"messages[1].{param}".rstrip("."))


def test_both_limits_of_an_answer_hold():
  limit = lambda **more: schemas.parse_chat({"messages": [USER]} | more, "m").max_tokens
  assert limit(max_tokens=5, max_completion_tokens=9) == limit(max_tokens=9, max_completion_tokens=5) == 5
  assert limit(max_tokens=None, max_completion_tokens=7) == 7 and limit() == 512


@pytest.mark.parametrize(
  "path, body, status, param, code",
  [
    (CHAT, ask(temprature=1), 400, "temprature", "unknown_parameter"),
    (CHAT, ask(tools=[{}]), 400, "tools", "unsupported_value"),
    (CHAT, ask(max_tokens=True), 400, "max_tokens", "invalid_type"),
    (CHAT, {}, 400, "messages", "missing_required_parameter"),
    (CHAT, {"messages": []}, 400, "messages", "invalid_value"),
    (CHAT, ask(USER, {"role": "assistant", "content": "Because"}), 400, "messages", "invalid_value"),
    (CHAT, ask({"role": "system", "content": "x"}), 400, "messages", "invalid_value"),
    (CHAT, ask({"role": "user", "content": "why " * 500}), 400, "messages", "context_length_exceeded"),
    (CHAT, ask({"role": "user", "content": "x" * 100_000}), 400, "messages", "context_length_exceeded"),
    (CHAT, ask(show("https://example.com/a.png")), 400, "messages[0].content[0].image_url.url", "invalid_image_url"),
    (CHAT, ask(show(URL), show(URL[:98])), 400, "messages[1].content[0].image_url", "invalid_image"),
    (CHAT, ask(show("data:image/svg+xml,<svg/>")), 400, "messages[0].content[0].image_url", "invalid_image"),
    (CHAT, ask(show("data:image/png;base64,")), 400, "messages[0].content[0].image_url", "invalid_image"),
    (PAINT, {"prompt": "why " * 500}, 400, "prompt", "context_length_exceeded"),
    (PAINT, {"prompt": "a", "model": "dall-e-3"}, 404, "model", "model_not_found"),
    ("/v1/completions", {}, 404, None, "unknown_url"),
    ("/v1/responses", {"input": "Why?"}, 404, None, "unknown_url"),
    ("/v1/models", {}, 405, None, "method_not_allowed"),
  ],
)
def test_an_error_has_a_code_that_is_a_text(served, path, body, status, param, code):
  response = served[0].post(path, json=body)
  error = response.json()["error"]
  assert (response.status_code, error["param"], error["code"]) == (status, param, code)
  assert error["message"] and "\n" not in error["message"] and isinstance(error["type"], str)


def test_errors_before_the_body_is_read_have_codes_too(served):
  client, _ = served
  for headers, content, status, code in (
    ({"Content-Type": "text/plain"}, b"{}", 415, "unsupported_content_type"),
    ({"Content-Type": "application/json"}, b"{" + b" " * 2**20, 413, "request_too_large"),
    ({"Content-Type": "application/json"}, b"{", 400, "invalid_value"),
    ({"Content-Type": "application/json"}, b"[]", 400, "invalid_value"),
  ):
    response = client.post(CHAT, content=content, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
  for status in (403, 408, 421, 429, 431, 500, 503, 504):
    assert isinstance(ApiError(status, "x").body()["error"]["code"], str)


# --- histories --------------------------------------------------------------------------------------------

ANSWER = {"role": "assistant", "content": "A ring."}


@pytest.mark.parametrize(
  "messages, same",
  [
    ([USER, ANSWER | {"content": ""}, USER], [USER, ANSWER | {"content": []}, USER]),
    ([USER, ANSWER | {"content": None}, USER], [USER, {"role": "assistant"}, USER]),
    ([USER, ANSWER | {"content": "\n"}, USER], [USER, ANSWER | {"content": ""}, USER]),
    ([USER, USER], [USER | {"content": [{"type": "text", "text": "Why?"}, "Why?"]}]),
    ([USER, ANSWER, USER, ANSWER | {"content": ""}], [USER, ANSWER, USER]),
    (
      [USER, ANSWER | {"content": ["A", "B"]}, USER],
      [USER, ANSWER | {"content": "A"}, ANSWER | {"content": "B"}, USER],
    ),
    ([{"role": "system", "content": "S"}, USER], [{"role": "developer", "content": ["S"]}, USER]),
    (
      [USER, ANSWER, {"role": "system", "content": "S"}, USER],
      [USER, ANSWER, USER, {"role": "developer", "content": "S"}],
    ),
    ([USER | {"name": "me"}], [USER | {"tool_calls": [], "audio": None}]),
    ([ANSWER, USER], [ANSWER | {"annotations": [], "refusal": None, "function_call": None}, USER]),
    (
      [USER, ANSWER | {"content": "<image> \x00"}, USER],
      [USER, ANSWER | {"content": "<image> \ufffd"}, USER],
    ),
  ],
)
def test_a_history_goes_on(served, messages, same):
  client, _ = served
  assert serving.said(client.post(CHAT, json=ask(*messages))) == serving.said(client.post(CHAT, json=ask(*same)))


def test_a_system_turn_is_read_wherever_it_stands(served, model):
  client, _ = served
  system = {"role": "system", "content": "Answer with one word."}
  for messages in ([system, USER], [USER, ANSWER, system, USER], [USER, ANSWER, USER, system]):
    turns = [x for x in messages if x is not system]
    got = serving.said(client.post(CHAT, json=ask(*messages, max_tokens=20)))
    assert got == model.understand(messages, max_tokens=20) != model.understand(turns, max_tokens=20)


# --- seeds ------------------------------------------------------------------------------------------------


def test_a_seed_of_any_kind_gives_one_answer_and_one_picture(served, model):
  client, _ = served
  seeds = [7, 2**32 - 1, 2**32, 2**40, 2**41, -1, -(2**63), 2**63, 2**64 - 1]
  answers = [client.post(CHAT, json=ask(temperature=1.0, max_tokens=20, seed=seed)).json() for seed in seeds]
  assert [x["seed"] for x in answers] == seeds
  texts = [x["choices"][0]["message"]["content"] for x in answers]
  assert len(set(texts)) == len(seeds)
  again = client.post(CHAT, json=ask(temperature=1.0, max_tokens=20, seed=-1))
  assert serving.said(again) == texts[seeds.index(-1)]
  assert texts[:2] == [model.understand([USER], max_tokens=20, temperature=1.0, seed=seed) for seed in seeds[:2]]

  def paint(seed, n=1):
    response = client.post(PAINT, json={"prompt": "a ring", "steps": 4, "n": n, "seed": seed})
    assert response.status_code == 200, response.text
    return [(x["seed"], x["b64_json"]) for x in response.json()["data"]]

  for first in (-1, 2**32 - 1):  # the pictures of a request have the seeds that follow, across the edge too
    pair = paint(first, 2)
    assert [seed for seed, _ in pair] == [first, first + 1]
    assert [
      np.abs(_pixels(a) - _pixels(b)).max() <= 1 for (_, a), ((_, b),) in zip(pair, map(paint, (first, first + 1)))
    ]
  (want,) = model.generate(["a ring"], 4, seed=0)
  assert np.abs(_pixels(paint(0)[0][1]) - np.asarray(want).astype(int)).max() <= 1


def _pixels(b64_json: str) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json)))).astype(int)


# --- stop sequences ---------------------------------------------------------------------------------------


def test_an_answer_ends_before_its_stop_sequence(served):
  client, engine = served
  body = ask(max_tokens=100)
  whole = serving.said(client.post(CHAT, json=body))
  middle = len(whole) // 2
  for stop in (
    whole[middle : middle + 1],
    whole[middle : middle + 7],
    [whole[middle : middle + 7], "never said"],
  ):
    wanted = whole[: whole.find(stop if isinstance(stop, str) else stop[0])].rstrip()
    answer = client.post(CHAT, json=body | {"stop": stop}).json()
    assert answer["choices"][0]["message"]["content"] == wanted and answer["choices"][0]["finish_reason"] == "stop"
    assert 0 < answer["usage"]["completion_tokens"] < 100
    streamed = body | {"stop": stop, "stream": True, "stream_options": {"include_usage": True}}
    lines = [x[6:] for x in client.post(CHAT, json=streamed).text.split("\n") if x]
    *chunks, usage = map(json.loads, lines[:-1])
    assert "".join(x["choices"][0]["delta"].get("content", "") for x in chunks) == wanted
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop" and usage["usage"] == answer["usage"]
    assert all(x["usage"] is None for x in chunks)
  answer = client.post(CHAT, json=body | {"stop": [whole[0]]}).json()
  assert answer["choices"][0]["message"]["content"] == "" and answer["choices"][0]["finish_reason"] == "stop"
  assert serving.said(client.post(CHAT, json=body | {"stop": [whole + "x"]})) == whole


@pytest.mark.parametrize(
  "text, stops, want",
  [
    ("a red ring\nand more", ["\n"], "a red ring"),
    ("a red ring", ["red ring"], "a"),
    ("a red ring", ["ring!", "redd"], "a red ring"),
    ("abcd", ["bcd", "c"], "ab"),  # the first that is complete
    ("abcd", ["cd", "d"], "ab"),  # of those, the longest
    ("aab aaab", ["aaab"], "aab"),
    ("two\n\nlines", ["\n\n"], "two"),
    ("weiß 世界 🙂 end", ["🙂"], "weiß 世界"),
    ("weiß 世界 🙂 end", ["界 "], "weiß 世"),
    ("end\n", ["\n"], "end"),
  ],
)
def test_no_part_of_a_stop_sequence_is_shown(text, stops, want):
  tokenizer = Tokenizer.load(str(tiny.TOKENIZER))
  ids, counts = tokenizer.encode(" " + text), set()
  for size in (1, 2, 3, len(ids)):
    stream, shown = Text(tokenizer, stops), ""
    for at in range(0, len(ids), size):
      shown += stream.add(ids[at : at + size], last=at + size >= len(ids))
      assert want.startswith(shown)
      if stream.stopped:
        break
    assert shown == stream.text == want and stream.stopped == (want != text)
    counts.add(len(stream.tokens))
  assert len(counts) == 1, "how many tokens an answer has depends on how they came"


def test_a_stop_sequence_frees_the_slot_at_once(model, monkeypatch):
  with serving.serving(model, slots=1) as (base, engine), serving.client(base) as client:
    whole = serving.said(client.post(CHAT, json=ask(max_tokens=100)))
    steps = itertools.count()
    real = serving.decoder(engine).step
    monkeypatch.setattr(serving.decoder(engine), "step", lambda n: (next(steps), real(min(n, 4)))[1])
    client.post(CHAT, json=ask(max_tokens=100, stop=whole[:3]))
    assert serving.said(client.post(CHAT, json=ask(max_tokens=1)))
    assert next(steps) < 12, "the answer went on after its stop sequence"


# --- pictures ---------------------------------------------------------------------------------------------

PNG = picture()
B64 = URL.partition(",")[2]
URLS = {
  "as it should be": "data:image/png;base64," + B64,
  "parameters": "data:image/png;charset=utf-8;name=a.png;base64," + B64,
  "upper case": "DATA:IMAGE/PNG;BASE64," + B64,
  "another type": "data:image/jpeg;base64," + B64,
  "no type": "data:;base64," + B64,
  "a file of no known type": "data:application/octet-stream;base64," + B64,
  "line breaks": "data:image/png;base64," + "\r\n".join(B64[i : i + 76] for i in range(0, len(B64), 76)) + "\n",
  "spaces": " data:image/png; base64, " + " ".join(B64[i : i + 4] for i in range(0, len(B64), 4)),
  "the alphabet for addresses": "data:image/png;base64," + B64.replace("+", "-").replace("/", "_"),
  "no padding": "data:image/png;base64," + B64.rstrip("="),
  "percent-encoded": "data:image/png;base64," + urllib.parse.quote(B64, safe=""),
  "percent-encoded breaks": "data:image/png;base64," + "%0A".join((B64[:40], B64[40:])),
  "no base64": "data:image/png," + urllib.parse.quote_from_bytes(PNG),
}


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
def test_a_picture_is_read_as_a_browser_writes_it(url):
  assert data_uri.decode(url) == PNG
  assert schemas.parse_chat(ask(show(url)), "m").images == [PNG]


@pytest.mark.parametrize(
  "url",
  [
    "https://example.com/a.png",
    "http://127.0.0.1/a.png",
    "file:///etc/passwd",
    "/etc/passwd",
    "a.png",
    "",
    "data:",
    "blob:x",
    "data:image/png;base64",
    "data:text/html;base64," + B64,
    "data:application/pdf;base64," + B64,
    B64,
    "data:image/png;base64,A",
    "data:image/png;base64,AA=A",
    "data:image/png;base64,A===",
    "data:image/png;base64,\u00e9AA",
    "data:image/png;base64,&&&&",
    "data:image/png;base64,%zz",
    "data:image/png;" + "a" * 2000 + ";base64," + B64,
  ],
)
def test_what_is_no_picture_of_its_own_is_refused(url):
  with pytest.raises(ApiError) as caught:
    schemas.parse_chat(ask(show(url)), "m")
  assert caught.value.status == 400 and caught.value.field == "messages[0].content[0].image_url.url"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_every_format_is_read_by_its_bytes(served, model, kind):
  client, _ = served
  file = picture(1, kind)
  url = f"data:image/{kind.lower()};base64," + base64.b64encode(file).decode()
  turns = [{"role": "user", "content": "<image>\nWhat?"}]
  assert serving.said(client.post(CHAT, json=ask(show(url)))) == model.understand(turns, [file], 8)


def test_pictures_of_earlier_turns_and_the_first_of_an_animation_are_seen(served, model):
  client, _ = served
  file = io.BytesIO()
  frames = [Image.open(io.BytesIO(picture(i))) for i in range(3)]
  frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
  gif = "data:image/gif;base64," + base64.b64encode(file.getvalue()).decode()
  messages = [show(gif), show(URLS["parameters"]), ANSWER, {"role": "system", "content": "S"}, USER]
  turns = [
    {"role": "user", "content": "<image>\nWhat?\n<image>\nWhat?"},
    ANSWER,
    {"role": "system", "content": "S"},
    USER,
  ]
  first = io.BytesIO()
  Image.open(file).convert("RGB").save(first, "PNG")
  assert serving.said(client.post(CHAT, json=ask(*messages))) == model.understand(turns, [first.getvalue(), PNG], 8)
