"""The model that lmms-eval finds: its requests answered by a checkpoint and by a server."""

import base64
import http.server
import importlib.metadata
import io
import json
import shutil
import subprocess
import sys
import threading
import tomllib
import types
from typing import NamedTuple

import pytest
import tiny
from PIL import ExifTags, Image
from refusals import refused

import jflow
from jflow.data import images as pictures
from jflow.evaluation import lmms, report
from jflow.inference import loading


class Request(NamedTuple):
  """A request as lmms-eval hands it over."""

  args: tuple


def test_lmms_evals_requests_are_answered_as_by_understand(tiny_checkpoint):
  model = lmms.Model(checkpoint=tiny_checkpoint, batch_size="2", device="cpu")
  picture = Image.new("RGB", (8, 8), "red")
  model.task_dict = {"pope": {"test": [{"picture": picture}, {"picture": None}]}}
  visual = lambda doc: [doc["picture"]] if doc["picture"] else []
  arguments = {"max_new_tokens": 4, "until": ["\n\n"], "temperature": 0, "top_p": None, "num_beams": 1}
  requests = [Request(("What is it?", arguments, visual, i, "pope", "test")) for i in (0, 1, 0)]
  alone = jflow.load(tiny_checkpoint)
  expected = [alone.understand("What is it?", images, 4) for images in ([picture], [], [picture])]
  assert model.generate_until(requests) == expected
  (scored,) = model.loglikelihood([Request(("What is it?", lambda doc: "red", visual, 0, "pope", "test"))])
  assert scored == pytest.approx(alone.loglikelihood("What is it?", [picture], ["red"])[0], rel=1e-5)


def test_images_of_a_task_are_never_all_in_memory_and_the_answers_keep_their_order(tiny_checkpoint, monkeypatch):
  model = lmms.Model(checkpoint=tiny_checkpoint, batch_size=1)
  open_images, sizes = [], []

  def visual(doc):
    open_images.append(doc)
    return [Image.new("RGB", (8, 8))]

  def answer(asked):
    sizes.append(len(open_images))
    open_images.clear()
    return [text.upper() for text, _, _ in asked]

  monkeypatch.setattr(model.answers, "answer", answer)
  model.task_dict = {"t": {"s": list(range(10))}}
  texts = [f"q{i}" for i in range(10)]
  requests = [Request((text, {}, visual, i, "t", "s")) for i, text in enumerate(texts)]
  assert model.generate_until(requests) == [text.upper() for text in texts] and sizes == [4, 4, 2]


def test_a_stopped_run_goes_on_with_its_cache(tiny_checkpoint, tmp_path):
  visual = lambda doc: [Image.new("RGB", (8, 8), doc)]
  docs = {"t": {"s": ["red", "blue", "green", "white", "black", "red"]}}
  greedy, drawn = {"max_new_tokens": 3}, {"max_new_tokens": 3, "do_sample": True}
  requests = [Request(("What?", greedy, visual, i, "t", "s")) for i in range(6)]
  scored = [Request(("What?", lambda doc: doc, visual, i, "t", "s")) for i in range(2)]

  def model(cache="", **more):
    out = lmms.Model(checkpoint=tiny_checkpoint, batch_size="1", cache=cache, **more)
    out.task_dict, out.asked = docs, []
    for name in ("answer", "likelihoods"):
      run = getattr(out.answers, name)
      setattr(out.answers, name, lambda asked, run=run: out.asked.extend(asked) or run(asked))
    return out

  plain = model()
  expected, likely = plain.generate_until(requests), plain.loglikelihood(scored)
  cache = str(tmp_path / "cache")
  first = model(cache)
  read = first.answers.answer

  def stops(asked):
    if len(asked) == 2:  # the second group
      raise KeyboardInterrupt
    return read(asked)

  first.answers.answer = stops
  with pytest.raises(KeyboardInterrupt):
    first.generate_until(requests)
  first.close()  # as the end of its process does
  second = model(cache)
  assert second.generate_until(requests) == expected and len(second.asked) == 2
  assert second.loglikelihood(scored) == likely
  second.close()
  third = model(cache)
  assert third.generate_until(requests) == expected and third.loglikelihood(scored) == likely and not third.asked
  other = [Request(("Which?", greedy, visual, 0, "t", "s")), Request(("What?", drawn, visual, 0, "t", "s"))]
  third.generate_until(other)
  third.generate_until(other)
  assert len(third.asked) == 3  # a drawn answer is never kept
  third.close()
  with refused("dtype", "float32", "bfloat16"):
    model(cache, dtype="bfloat16")


def test_a_step_that_is_saved_meanwhile_is_not_taken_for_the_one_that_the_cache_names(
  tiny_checkpoint, tmp_path, monkeypatch
):
  workdir, opened = tmp_path / "run", []
  shutil.copytree(tiny_checkpoint, workdir)

  def load(path, **more):
    opened.append(path)
    shutil.copytree(workdir / "checkpoints" / "0", workdir / "checkpoints" / "5")

  monkeypatch.setattr(loading, "load", load)
  named, made = [], report.fingerprint
  monkeypatch.setattr(report, "fingerprint", lambda path, *more: named.append(path) or made(path, *more))
  lmms.Model(checkpoint=str(workdir), cache=str(tmp_path / "cache"))
  assert opened == named == [workdir / "checkpoints" / "0"]


def test_what_a_task_gives_for_an_image_is_opened_or_refused(tmp_path):
  buffer = io.BytesIO()
  Image.new("RGB", (3, 2), "blue").save(buffer, "PNG")
  path = tmp_path / "image.png"
  path.write_bytes(buffer.getvalue())
  data = buffer.getvalue()
  given = [data, str(path), path, {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}]
  opened = lmms.images_of(given, "x")
  assert [(image.size, image.getpixel((0, 0))) for image in opened] == [((3, 2), (0, 0, 255))] * 5
  assert lmms.images_of(None, "x") == lmms.images_of([], "x") == []
  assert lmms.images_of(opened[0], "x") == [opened[0]]
  odd = Image.new("RGBA", (4, 2), (200, 100, 0, 0))  # by the published code's reading neither turned nor over white
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = 6
  odd.save(buffer := io.BytesIO(), "PNG", exif=exif)
  for form in (buffer.getvalue(), Image.open(buffer)):
    (read,) = lmms.images_of(form, "x")
    shown = pictures.for_understanding(read, 4)
    assert read.size == (4, 2) and not read.getexif() and shown[1, 0].tolist() == [200, 100, 0]
  Image.effect_noise((40, 40), 50).save(buffer := io.BytesIO(), "PNG")
  cut_short = Image.open(io.BytesIO(buffer.getvalue()[:200]))
  model = lmms.Model(server="http://127.0.0.1:1")
  cases = (
    (cut_short, "cut short"),
    (7, "int"),
    (None, "NoneType"),
    (b"x", "1 bytes"),
    ({}, "NoneType"),
    (str(tmp_path / "no.png"), "no.png"),
    ("https://x/y.png", "x/y.png"),
  )
  for wrong, message in cases:
    model.task_dict = {"pope": {"test": [[wrong]]}}
    request = Request(("What?", {}, lambda doc: doc, 0, "pope", "test"))
    with refused("task pope", "document 0 of test", message):
      model.generate_until([request])


class Manifest(NamedTuple):
  """As lmms-eval's."""

  model_id: str
  simple_class_path: str


def test_the_entry_point_resolves_to_a_manifest_of_the_model(monkeypatch):
  group = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
  for name in ("lmms_eval", "lmms_eval.models"):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  registry = types.ModuleType("lmms_eval.models.registry_v2")
  registry.ModelManifest = Manifest
  monkeypatch.setitem(sys.modules, registry.__name__, registry)
  ((name, value),) = group.items()
  found = importlib.metadata.EntryPoint(name, value, "lmms_eval.models").load()()
  assert found.model_id == "jflow"
  module, _, attribute = found.simple_class_path.rpartition(".")
  assert getattr(importlib.import_module(module), attribute) is lmms.Model
  # In a process of its own: the registry loads it while lmms-eval is half imported.
  code = f"import sys, {value.split(':')[0]}; print(sorted({{'jax', 'numpy', 'PIL', 'lmms_eval'}} & set(sys.modules)))"
  run = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True, check=True)
  assert run.stdout.strip() == "[]"


def test_only_a_missing_lmms_eval_is_done_without(tmp_path, monkeypatch):
  assert lmms.base() is object or "lmms_eval" in sys.modules
  for name in [name for name in sys.modules if name.split(".")[0] == "lmms_eval"]:
    monkeypatch.delitem(sys.modules, name)
  package = tmp_path / "lmms_eval" / "api"
  package.mkdir(parents=True)
  for folder in (package, package.parent):
    (folder / "__init__.py").touch()
  monkeypatch.syspath_prepend(tmp_path)
  (package / "model.py").write_text("class lmms: pass\n")
  assert lmms.base().__name__ == "lmms"
  (package / "model.py").unlink()
  for name in ("lmms_eval.api.model", "lmms_eval.api", "lmms_eval"):
    monkeypatch.delitem(sys.modules, name)
  (package / "model.py").write_text("import a_module_that_is_not_there\n")
  with pytest.raises(ModuleNotFoundError) as missing:
    lmms.base()
  assert missing.value.name == "a_module_that_is_not_there"
  for name in ("lmms_eval.api.model", "lmms_eval.api", "lmms_eval"):
    sys.modules.pop(name, None)


def test_lmms_evals_arguments_become_ours():
  assert lmms.sampling({"temperature": 0, "do_sample": False}) == {"max_tokens": 512, "temperature": 0.0}
  sampled = lmms.sampling({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 16})
  assert sampled == {"max_tokens": 16, "temperature": 0.7, "top_p": 0.9}
  assert lmms.cut(" yes\n\nno END", ["\n\n", "END"]) == "yes" and lmms.cut("a b", "b") == "a"
  with refused("checkpoint", "server"):
    lmms.Answers()
  with refused("--batch_size=auto"):
    lmms.Answers(server="http://x", batch_size="auto")


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
  with refused("429"):
    model.answer([("fail", [], {})])
  server.shutdown()
  server.server_close()
