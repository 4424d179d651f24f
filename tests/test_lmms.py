"""The model that lmms-eval finds: its requests answered by a checkpoint and by a server."""

import base64
import http.server
import io
import json
import threading
from typing import NamedTuple

import pytest
import tiny
from PIL import Image

import jflow
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.evaluation import lmms
from jflow.training.checkpoint import save_params


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
  path = tmp_path_factory.mktemp("lmms") / "model"
  config = {"model": tiny.CONFIG.to_dict(), "data": {"template": "plain"}}
  save_params(path, tiny.params(), config, Tokenizer.load(str(tiny.TOKENIZER)))
  return str(path)


class Request(NamedTuple):
  """What lmms-eval hands over."""

  args: tuple


def test_lmms_evals_requests_are_answered_as_by_understand(checkpoint):
  model = lmms.Model(checkpoint=checkpoint, batch_size="2", device="cpu")
  picture = Image.new("RGB", (8, 8), "red")
  model.task_dict = {"pope": {"test": [{"picture": picture}, {"picture": None}]}}
  visual = lambda doc: [doc["picture"]] if doc["picture"] else []
  arguments = {"max_new_tokens": 4, "until": ["\n\n"], "temperature": 0, "top_p": None, "num_beams": 1}
  requests = [Request(("What is it?", arguments, visual, i, "pope", "test")) for i in (0, 1, 0)]
  alone = jflow.load(checkpoint)
  expected = [alone.understand("What is it?", images, 4) for images in ([picture], [], [picture])]
  assert model.generate_until(requests) == expected
  (scored,) = model.loglikelihood([Request(("What is it?", lambda doc: "red", visual, 0, "pope", "test"))])
  assert scored == pytest.approx(alone.loglikelihood("What is it?", [picture], ["red"])[0], rel=1e-5)


def test_lmms_evals_arguments_become_ours():
  assert lmms.sampling({"temperature": 0, "do_sample": False}) == {"max_tokens": 512, "temperature": 0.0}
  sampled = lmms.sampling({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 16})
  assert sampled == {"max_tokens": 16, "temperature": 0.7, "top_p": 0.9}
  assert lmms.cut(" yes\n\nno END", ["\n\n", "END"]) == "yes" and lmms.cut("a b", "b") == "a"
  with pytest.raises(UserError, match="one of them"):
    lmms.Answers()


def test_a_server_is_asked_in_its_own_format():
  """A small HTTP server takes the request apart."""
  seen = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      seen.append((self.path, body))
      answer = json.dumps(
        {"choices": [{"message": {"content": f"answer {body['messages'][0]['content'][-1]['text']}"}}]}
      )
      self.send_response(200 if "fail" not in answer else 429)
      self.end_headers()
      self.wfile.write(answer.encode())

    def log_message(self, *_):
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  model = lmms.Answers(server=f"http://127.0.0.1:{server.server_port}/", batch_size=4)
  picture = Image.new("RGB", (4, 4), "blue")
  texts = model.answer([(f"<image>\nq{i}", [picture], {"max_new_tokens": 5}) for i in range(6)])
  assert texts == [f"answer q{i}" for i in range(6)]
  path, body = seen[0]
  image, text = body["messages"][0]["content"]
  assert "model" not in body  # a server has one, under the name of its directory
  assert path == "/v1/chat/completions" and body["max_tokens"] == 5 and body["temperature"] == 0
  data = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
  assert Image.open(io.BytesIO(data)).getpixel((0, 0)) == (0, 0, 255) and text["type"] == "text"
  with pytest.raises(UserError, match="answers 429"):
    model.answer([("fail", [], {})])
  server.shutdown()
  server.server_close()
