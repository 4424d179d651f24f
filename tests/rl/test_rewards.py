"""Rewards: what they give, and that what cannot be scored stops a run by name."""

import base64
import http.server
import io
import json
import random
import sys
import threading

import jax
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from PIL import Image
from refusals import refused

from jflow import sharding
from jflow.errors import Unscored
from jflow.rl import prompts, rewards
from jflow.rl.rewards import Weighted
from jflow.training import config_files, optim, setup
from jflow.world import scenes, source

SIDE = 64


def config(*names, **rl):
  return tiny.configuration(rl=dict(rewards=tuple((name, 1.0) for name in names)) | rl).rl


def drawn(seed, tag="colors"):
  """(A true picture, its prompt, its metadata)."""
  scene, combination = scenes.sample(tag, "train", random.Random(seed))
  return scene.render(SIDE), *source.prompt(combination)


def test_the_judge_is_right_about_what_was_asked():
  (first, right, about), (_, wrong, other) = drawn(0), drawn(1)
  assert about["include"] != other["include"]
  opened = rewards.opened(config("strict", "lenient"), [about, other])
  got = rewards.scores(opened, np.stack([first, first]), [right, wrong], [about, other])
  np.testing.assert_array_equal(got, [[1, 1], [0, 0]])


def test_the_guard_punishes_noise_and_lets_true_pictures_be_as_they_are():
  """19 of 20 true pictures, of any kind, lose nothing, and none gains: neither does the blandest of all."""
  (guard,) = rewards.opened(config("true"), [{}])
  score = lambda images: rewards.scores([guard], np.stack(images), [""] * len(images), [{}] * len(images))[:, 0]
  true = score([drawn(seed, tag)[0] for tag in scenes.TAGS for seed in range(40)])
  assert true.max() == 0 and 0.9 <= np.mean(true == 0) < 1
  noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
  speckled = np.clip(drawn(0)[0] + np.random.default_rng(0).normal(0, 60, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
  gray = np.full((SIDE, SIDE, 3), 128, np.uint8)
  much, some, bland = score([noise, speckled, gray])
  assert much < some < true.min() and bland == 0


def mean_red(images, prompts, metadata):
  return images[..., 0].mean((1, 2))


def test_a_reward_of_ones_own_comes_by_its_import_path():
  (own,) = rewards.opened(config(f"{__name__}:mean_red"), [{}])
  np.testing.assert_array_equal(rewards.scores([own], np.full((1, 4, 4, 3), 7, np.uint8), [""], [{}]), [[7]])


@pytest.mark.parametrize(
  "names, metadata, named",
  [
    (["nobody"], [{}], "nobody"),
    (["no.such.module:f"], [{}], "no.such.module"),
    (["math:pi"], [{}], "math:pi"),
    (["strict"], [{"include": []}, {}], "include"),
    (["strict"], [{"include": [{"class": "bench", "count": 1}]}], "bench"),
    (["strict"], [{"include": [{"class": "circle"}]}], "count"),
    (["lenient"], [{"include": [{"class": "circle", "count": 1, "color": "mauve"}]}], "mauve"),
    (["lenient"], [{"include": "circle"}], "include"),
    (["true", "true"], [{}], "true"),
    (["http://"], [{}], "http://"),
    (["http://scorer:none/score"], [{}], "http://scorer:none/score"),
  ],
)
def test_a_reward_that_cannot_be_used_is_refused_before_the_run(names, metadata, named):
  with refused(named):
    rewards.opened(config(*names), metadata)


def _raises(images, prompts, metadata):
  raise RuntimeError("out of\nmemory")


def _paints(images, prompts, metadata):
  """Changes what the next reward is given."""
  images[:] = 0
  return [0.0, 1.0]


@pytest.mark.parametrize(
  "function",
  [
    _raises,
    _paints,
    lambda i, p, m: [1.0],
    lambda i, p, m: [1.0, float("nan")],
    lambda i, p, m: "good",
    lambda i, p, m: None,
    lambda i, p, m: ["1", "2"],
    lambda i, p, m: [1j, 2j],
    lambda i, p, m: [1e300, 0.0],
    lambda i, p, m: np.zeros((2, 1)),
    lambda i, p, m: sys.exit(0),
  ],
)
def test_a_reward_that_fails_is_named(function):
  with refused("mine", error=Unscored):
    rewards.scores([Weighted("mine", 1.0, function)], np.zeros((2, 4, 4, 3), np.uint8), ["a", "b"], [{}, {}])


def test_a_reward_that_writes_into_metadata_changes_only_its_own():
  asked = [{"tag": "one"}, {"tag": "two"}]
  several = [
    Weighted(name, 1.0, lambda i, p, m: [len(about.pop("tag")) for about in m]) for name in ("first", "second")
  ]
  found = rewards.scores(several, np.zeros((2, 4, 4, 3), np.uint8), ["a", "b"], asked)
  np.testing.assert_array_equal(found, 3)
  assert asked == [{"tag": "one"}, {"tag": "two"}]


class _Scorer(http.server.BaseHTTPRequestHandler):
  """Answers the mean of each picture; fails as often as `fails` says."""

  fails, status, answer = 0, 503, None  # a status of b"...": what is sent in place of an answer

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    cls = type(self)
    if cls.fails:
      cls.fails -= 1
      if isinstance(cls.status, bytes):
        self.wfile.write(cls.status)
      else:
        self.send_error(cls.status)
      return
    means = [float(np.asarray(Image.open(io.BytesIO(base64.b64decode(x)))).mean()) for x in body["images"]]
    assert len(body["prompts"]) == len(body["metadata"]) == len(means)
    self.send_response(200)
    self.end_headers()
    self.wfile.write(cls.answer or json.dumps({"scores": means}).encode())

  def log_message(self, *_):
    pass


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setattr(rewards.http, "_PAUSE", 0.0)
  scorer = type("Scorer", (_Scorer,), {})
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), scorer) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield scorer, f"http://127.0.0.1:{server.server_address[1]}/score"
    server.shutdown()


PICTURES = np.stack([np.full((4, 4, 3), 10, np.uint8), np.full((4, 4, 3), 90, np.uint8)])


def from_server(address, retries=2):
  opened = rewards.opened(config(address, timeout=20.0, retries=retries), [{}])
  return rewards.scores(opened, PICTURES, ["a", "b"], [{"tag": 1}, {}])


CUT = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{"


@pytest.mark.parametrize("status", [503, 429, CUT, b"?\r\n\r\n"], ids=["busy", "too many", "cut", "no status"])
def test_a_server_scores_pictures_and_is_asked_again(server, status):
  scorer, address = server
  scorer.fails, scorer.status = 2, status
  np.testing.assert_array_equal(from_server(address), [[10], [90]])


@pytest.mark.parametrize(
  "fails, status, answer",
  [
    (9, 503, None),
    (1, 400, None),
    (0, 200, b"{}"),
    (0, 200, b"x"),
    (0, 200, b'{"scores": [1, "2"]}'),
    (0, 200, b'{"scores": [1]}'),
  ],
)
def test_a_server_without_scores_is_named(server, fails, status, answer):
  scorer, address = server
  scorer.fails, scorer.status, scorer.answer = fails, status, answer
  with refused(address, error=Unscored):
    from_server(address)


@pytest.mark.parametrize("line", ["[]", "{", '{"prompt": ""}', '{"text": "a"}', ""])
def test_prompts_that_are_none_are_refused(tmp_path, line):
  (tmp_path / "prompts.jsonl").write_text(line + "\n")
  with refused("rl.prompts", tmp_path / "prompts.jsonl"):
    prompts.read(str(tmp_path / "prompts.jsonl"), {})


@pytest.mark.parametrize("name", ["gone.jsonl", ""])
def test_a_file_of_prompts_that_is_none_is_refused(tmp_path, name):
  with refused("rl.prompts", tmp_path / name):
    prompts.read(str(tmp_path / name), {})


def test_prompts_are_the_lines_of_a_file_or_the_worlds(tmp_path):
  file = tmp_path / "prompts.jsonl"
  file.write_text('{"prompt": "a dog", "tag": "x"}\n\n{"prompt": "a cat"}\n')
  assert prompts.read(str(file), {}) == [("a dog", {"prompt": "a dog", "tag": "x"}), ("a cat", {"prompt": "a cat"})]
  shapes = vars(tiny.configuration().data.shapes) | {"tags": {"colors": 1.0, "several": 1.0}}
  found = prompts.read("shapes", shapes)
  held_out = {text for text, _ in source.evaluation_prompts("held_out", 500, 0)}
  assert {about["tag"] for _, about in found} == {"colors"} and not held_out & {text for text, _ in found}
  tags = {"two_object": 0.3, "colors": 0.1, "several": 0.6}
  found = [about["tag"] for _, about in prompts.read("shapes", shapes | {"tags": tags})]
  assert found.count("two_object") == 3 * found.count("colors") > 0


GIVEN = ("--config.data.tokenizer=configs/tokenizer", "--config.train.init_from=runs/none")
PUBLISHED = ("--config.rl.prompts=x.jsonl", "--config.rl.rewards=(('http://scorer/score',1.0),)")


@pytest.mark.parametrize(
  "named, flags",
  [
    ("grpo", PUBLISHED),
    ("grpo:quick", ()),
    ("grpo:shapes", ()),
    ("grpo:world", ()),
    ("janus/grpo:pro-7b", PUBLISHED),
    ("janus/grpo:shapes", ()),
    ("dpo", ("--config.rl.pairs=data/pairs",)),
    ("dpo:shapes", ()),
    ("janus/dpo:pro-1b", ("--config.rl.pairs=data/pairs",)),
    ("janus/dpo:tiny", ()),
  ],
)
def test_the_configs_fit(named, flags):
  config = config_files.load(named, [*GIVEN, *flags])
  setup.check(config)
  assert config.rl.method == ("dpo" if "dpo" in named else "grpo")


def test_a_cool_down_that_ends_before_the_updates_do_is_refused():
  """It counts updates: with two of each batch the rate of the second half would be 0."""
  with refused("optimizer.cooldown_steps", "1200"):
    setup.check(config_files.load("grpo:world", [*GIVEN, "--config.rl.updates=2"]))


@pytest.mark.parametrize("size", ["tiny", "quick", "shapes", "world"])
@pytest.mark.parametrize("named", ["grpo", "janus/grpo", "dpo", "janus/dpo", "tune", "janus/tune"])
def test_their_patterns_name_what_is_trained(named, size):
  """Also those that a size brings along from stage 3, where more is trained."""
  config = config_files.load(f"{named}:{size}", [*GIVEN, "--config.compute.remat=none"])
  model = setup.build(config, jax.devices()[0])
  params = jax.eval_shape(lambda: sharding.unbox(setup.initial_params(config, model)))
  own = config.optimizer
  trained, _ = optim.partition(params, own.trained, own.frozen)
  optim.rate_factors(flatten_dict(trained, sep="/"), own.rates)
  optim.check_muon(trained, own.muon)
