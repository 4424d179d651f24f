"""A model published on the hub: a small server stands in for it and keeps what arrives."""

import base64
import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import official_checkpoint
import pytest
from refusals import refused

from jflow.__main__ import main
from jflow.errors import UserError
from jflow.interop import adapter_files, publish, remote

ROOT = pathlib.Path(__file__).parents[2]
NAME = "me/small-model"


class Hub(http.server.ThreadingHTTPServer):
  """Takes the files of one repository; `failing` requests of large files fail first."""

  def __init__(self, failing: int = 0, status: int = 200):
    super().__init__(("127.0.0.1", 0), Handler)
    self.failing, self.status, self.stored, self.commits, self.puts = failing, status, {}, [], 0
    self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers as the hub does."""

  server: Hub

  def do_POST(self) -> None:
    hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0)))
    path = self.path.split("?")[0]
    if hub.status != 200:
      return self._send(hub.status, {"error": "no"})
    if path == "/api/repos/create":
      return self._send(200, {"url": f"{hub.address}/{NAME}"})
    if path.endswith("/preupload/main"):
      mode = lambda name: "lfs" if name.endswith(".safetensors") else "regular"
      names = [one["path"] for one in json.loads(body)["files"]]
      files = [{"path": x, "uploadMode": mode(x), "shouldIgnore": False} for x in names]
      return self._send(200, {"files": files})
    if path.endswith("/info/lfs/objects/batch"):
      objects = json.loads(body)["objects"]
      for one in objects:
        if one["oid"] not in hub.stored:
          one["actions"] = {"upload": {"href": f"{hub.address}/lfs/{one['oid']}"}}
      return self._send(200, {"transfer": "basic", "objects": objects})
    if path.endswith("/commit/main"):
      hub.commits.append([json.loads(line) for line in body.splitlines()])
      return self._send(200, {"commitUrl": f"{hub.address}/{NAME}/commit/1", "commitOid": "c" * 40})
    return self._send(200, {})

  def do_PUT(self) -> None:
    content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    self.server.puts += 1
    if self.server.failing:
      self.server.failing -= 1
      return self._send(400, {"error": "the disk is full"})
    self.server.stored[self.path.rpartition("/")[2]] = content
    return self._send(200, {})

  def do_GET(self) -> None:
    self._send(200, {"id": NAME, "modelId": NAME, "sha": "a" * 40, "siblings": [], "xetEnabled": False})

  do_HEAD = do_GET

  def _send(self, status: int, value: dict) -> None:
    content = json.dumps(value).encode()
    self.send_response(status)
    self.send_header("Content-Length", str(len(content)))
    self.send_header("Connection", "close")
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(content)

  def log_message(self, *args: object) -> None:
    """Says nothing."""


@pytest.fixture
def model(tmp_path):
  return official_checkpoint.write(tmp_path / "model", tokenizer=True)


def push(hub, tmp_path, *args) -> subprocess.CompletedProcess:
  environment = os.environ | {
    "HF_ENDPOINT": hub.address,
    "HF_HOME": str(tmp_path / "cache"),
    "HF_TOKEN": "hf_token",
    "HF_HUB_DISABLE_XET": "1",
    "PYTHONPATH": str(ROOT),
    "no_proxy": "*",
  }
  argv = [sys.executable, "-m", "jflow", "push", *map(str, args)]
  return subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)


def run(hub, *args):
  threading.Thread(target=hub.serve_forever, daemon=True).start()
  try:
    return push(hub, *args)
  finally:
    hub.shutdown()


@pytest.mark.process
def test_all_files_and_a_card_arrive_in_one_commit_and_nothing_twice(model, tmp_path):
  (model / "chat_template.jinja").write_text("{{ messages }}")
  hub = Hub()
  done = run(hub, tmp_path, model, NAME, "--license=mit")
  assert done.returncode == 0, done.stderr
  (header, *lines) = hub.commits[0]
  assert len(hub.commits) == 1 and header["key"] == "header"
  sent = {one["value"]["path"]: one["value"] for one in lines}
  assert set(sent) == set(publish.files_of(model)) | {"README.md"} >= {"chat_template.jinja"}
  weights = (model / "model.safetensors").read_bytes()
  assert sent["model.safetensors"]["oid"] == hashlib.sha256(weights).hexdigest()
  assert hub.stored == {sent["model.safetensors"]["oid"]: weights}
  assert base64.b64decode(sent["config.json"]["content"]) == (model / "config.json").read_bytes()
  card = base64.b64decode(sent["README.md"]["content"]).decode()
  assert card.startswith("---\nlicense: mit\n") and f'jflow.load("{NAME}", vae=' in card
  assert run(again := Hub(), tmp_path, model, NAME).returncode == 0 and again.puts == 1


@pytest.mark.process
def test_a_lost_connection_leaves_no_commit_and_the_same_command_goes_on(model, tmp_path):
  hub = Hub(failing=99)
  threading.Thread(target=hub.serve_forever, daemon=True).start()
  done = push(hub, tmp_path, model, NAME)
  assert done.returncode in (1, 2) and len(done.stderr.strip().splitlines()[-1:]) == 1 and NAME in done.stderr
  assert "Traceback" not in done.stderr and not hub.commits
  hub.failing = 0
  assert push(hub, tmp_path, model, NAME).returncode == 0 and len(hub.commits) == 1
  puts = hub.puts
  assert push(hub, tmp_path, model, NAME).returncode == 0 and hub.puts == puts  # its weights are there already
  hub.shutdown()


@pytest.mark.process
def test_who_may_not_write_is_told_how(model, tmp_path):
  done = run(Hub(status=403), tmp_path, model, NAME)
  assert done.returncode == 2 and NAME in done.stderr and "hf auth login" in done.stderr


def test_the_card_says_recipe_and_scores(model, tmp_path):
  run = tmp_path / "run"
  run.mkdir()
  values = dict(
    train=dict(steps=7, batch_size=8, seed=3, init_from="runs/base"),
    data=dict(row_tokens=128, sources=dict(understanding=(), generation=[["data/mine", 1.0]], text=())),
    optimizer=dict(learning_rate=2e-4, trained=[]),
    lora=dict(rank=4),
  )
  (run / "config.json").write_text(json.dumps(values))
  body = dict(benchmark="shapes", scores=dict(overall=dict(value=0.75)), notes=["Judged strictly."])
  text = publish.card(NAME, model, "mit", run, [body])
  for part in ("7 x 8 of 128", "rank 4", "| data: generation | mine (1) |", "| overall | 0.75 |", "Judged strictly."):
    assert part in text


def test_the_card_of_a_model_with_its_autoencoder_names_no_other():
  assert f'jflow.load("{NAME}")' in publish.card(NAME, ROOT / "jflow" / "world" / "model", "mit", None, [])


def test_an_adapter_is_published_with_a_card_of_its_own(tmp_path):
  adapter_files.save(tmp_path, {"format": "jflow", "rank": 4}, {"a/lora_a": np.zeros((2, 4), np.float32)})
  assert publish.files_of(tmp_path) == ["adapter_config.json", "adapter_model.safetensors"]
  text = publish.card(NAME, tmp_path, "mit", None, [])
  assert "- lora" in text and "rank 4" in text and f'adapter="{NAME}"' in text
  files = {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"}
  with_template = {"config.json", "chat_template.jinja", "model.bin"}
  assert remote.files_wanted(NAME, with_template, None, lambda name: b"") == ["chat_template.jinja", "config.json"]
  assert remote.files_wanted(NAME, files, None, lambda name: b"") == [
    "adapter_config.json",
    "adapter_model.safetensors",
  ]
  (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
  with refused("adapter_model.bin"):
    publish.files_of(tmp_path)


@pytest.mark.parametrize(
  "change, part",
  [
    (lambda d: (d / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin"),
    (lambda d: (d / "config.json").unlink(), "config.json"),
    (lambda d: (d / "model.safetensors").unlink(), "safetensors"),
    (lambda d: (d / "model.safetensors").write_bytes(b"12345678"), "model.safetensors"),
    (lambda d: (d / "checkpoints").mkdir(), "convert"),
  ],
)
def test_what_is_no_model_is_not_published(model, change, part):
  change(model)
  with pytest.raises(UserError) as error:
    publish.files_of(model)
  assert part in str(error.value)


@pytest.mark.parametrize("flag, named", [("--run=.", "config.json"), ("--license=a b: c", "--license=a b: c")])
def test_a_card_that_cannot_be_is_refused(model, tmp_path, monkeypatch, capsys, flag, named):
  monkeypatch.chdir(tmp_path)
  assert main(["push", str(model), NAME, "--dry_run", flag]) == 2
  assert named in capsys.readouterr().err


@pytest.mark.parametrize("name", ["me", "me/", "/x", "me/x/y", "me/x@v1", "../x"])
def test_a_name_must_be_one_of_the_hub(name):
  with pytest.raises(UserError) as error:
    publish.check_name(name)
  assert repr(name) in str(error.value)
