"""tests/tools/load_test.py in small: nothing lost, nothing wrong, every bad request refused in one line."""

import os

import pytest
import serving
import tiny
from tools import load_test

MAX_BODY = 2**20


@pytest.fixture(scope="module")
def model():
  return tiny.pipeline()


@pytest.fixture(scope="module")
def base(model):
  with serving.serving(model, token=load_test.TOKEN, max_body=MAX_BODY, batch=2) as (base, _):
    yield base


def test_every_answer_under_load_is_the_one_made_offline(model, base):
  requests = [load_test.make_request(i) for i in range(24)]
  wanted = list(zip(requests, load_test.offline(model, requests)))
  assert {"chat", "images"} == {r["path"].split("/")[2] for r, _ in wanted}
  assert {True, False} == {r["body"].get("stream") for r, _ in wanted if "messages" in r["body"]}
  report = load_test.run(base, os.getpid(), wanted, clients=8)
  assert report["lost"] == [] and report["wrong"] == []


def test_the_comparison_sees_a_wrong_answer(model, base):
  """A changed seed of a picture and a changed question are noticed: the test above could fail."""
  wanted = []
  for i in (3, 4):
    request = load_test.make_request(i)
    (want,) = load_test.offline(model, [request])
    changed = load_test.make_request(i)
    if "seed" in changed["body"] and "prompt" in changed["body"]:
      changed["body"]["seed"] += 1
    else:
      changed["body"]["messages"][-1]["content"] = "red"
      changed["body"]["temperature"] = 0.0
    wanted.append((changed, want))
  assert sorted(load_test.run(base, os.getpid(), wanted, clients=2)["wrong"]) == [0, 1]


BAD = load_test.bad_requests(tiny.CONFIG.image_size, 128, MAX_BODY)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_a_4xx_and_one_line(base, name):
  status, arguments = BAD[name]
  assert 400 <= status < 500
  assert load_test.refused(base, status, arguments) == ""


def test_the_kinds_of_bad_requests_are_many():
  assert len(BAD) >= 20
