"""A checkpoint, or a data set, of the Hugging Face hub, by its name: a small server stands in for the hub."""

import hashlib
import http.server
import io
import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import official_checkpoint
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import load_file

from jflow.interop import remote

ROOT = pathlib.Path(__file__).parents[2]
NAME, COMMIT = "org/small-model", "a" * 40


class Hub(http.server.ThreadingHTTPServer):
  """Serves the files of a folder as those of one model, or data set, whose revisions are `main` and `v1`."""

  def __init__(self, folder: pathlib.Path, kind: str = "models"):
    super().__init__(("127.0.0.1", 0), Handler)
    self.folder, self.kind, self.asked = folder, kind, []
    self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers as the hub does."""

  server: Hub

  def do_GET(self) -> None:
    path = self.path.split("?")[0]
    self.server.asked.append(path)
    files = {p.name: p for p in self.server.folder.iterdir()}
    api, place = f"/api/{self.server.kind}/{NAME}", "" if self.server.kind == "models" else f"/{self.server.kind}"
    for revision in ("main", "v1", COMMIT):
      if path in (f"{api}/revision/{revision}", api):
        return self._send(200, json.dumps(self._info(files)).encode())
      if path.startswith(f"{api}/tree/{revision}"):
        tree = [{"type": "file", "path": x, "size": p.stat().st_size, "oid": "b" * 40} for x, p in files.items()]
        return self._send(200, json.dumps(tree).encode())
      name = path.removeprefix(f"{place}/{NAME}/resolve/{revision}/")
      if name in files:
        return self._send(200, files[name].read_bytes())
    code = "RevisionNotFound" if path.startswith(f"{api}/") else "RepoNotFound"
    return self._send(404, b"{}", {"X-Error-Code": code})

  do_HEAD = do_GET

  def _info(self, files: dict[str, pathlib.Path]) -> dict:
    return {"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}

  def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
    tag = hashlib.sha256(content).hexdigest()
    lines = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Connection": "close"}
    if status == 200 and (asked := self.headers.get("Range")):
      first, last = (int(n) for n in asked.removeprefix("bytes=").split("-"))
      lines["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
      status, content = 206, content[first : last + 1]
    lines["Content-Length"] = str(len(content))
    self.send_response(status)
    for name, value in (lines | (headers or {})).items():
      self.send_header(name, value)
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(content)

  def log_message(self, *args: object) -> None:
    """Says nothing."""


def pictures(count: int) -> list[bytes]:
  """Small PNG files, no two of them alike."""
  out = []
  for number in range(count):
    file = io.BytesIO()
    Image.fromarray(np.full((40, 40, 3), number, np.uint8)).save(file, "PNG")
    out.append(file.getvalue())
  return out


@pytest.fixture
def hub(tmp_path):
  """The hub with a small published checkpoint and files that nobody should download; a function that converts from
  it."""
  folder = official_checkpoint.write(tmp_path / "hub", tokenizer=True)
  for name in ("pytorch_model.bin", "modeling_janus.py", "README.md"):
    (folder / name).write_text("print('no')")
  server = Hub(folder)
  threading.Thread(target=server.serve_forever, daemon=True).start()

  def convert(name: str, output: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
      "HF_ENDPOINT": server.address,
      "HF_HOME": str(tmp_path / "cache"),
      "PYTHONPATH": str(ROOT),
      "no_proxy": "*",
    }
    argv = [sys.executable, "-m", "jflow", "convert", f"--input={name}", "--to=official", f"--output={output}"]
    return subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)

  yield server, convert
  server.shutdown()


@pytest.mark.process
def test_a_name_of_the_hub_is_downloaded_once_and_read_without_a_connection(hub, tmp_path):
  server, convert = hub
  done = convert(f"{NAME}@v1", "one")
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "one" / "tokenizer.json").is_file()
  want, got = (load_file(folder / "model.safetensors") for folder in (server.folder, tmp_path / "one"))
  assert {name: x.tobytes() for name, x in want.items()} == {name: x.tobytes() for name, x in got.items()}
  assert not [path for path in server.asked if path.endswith((".bin", ".py", ".md"))]
  server.shutdown()
  server.server_close()
  again = convert(f"{NAME}@v1", "two")
  assert again.returncode == 0, again.stderr
  other = convert(f"{NAME}@v2", "three")
  assert other.returncode == 2 and len(other.stderr.strip().splitlines()) == 1 and "cannot be reached" in other.stderr


@pytest.mark.process
@pytest.mark.parametrize("name, part", [("org/other", "org/other does not exist"), (f"{NAME}@v3", "no revision v3")])
def test_what_the_hub_lacks_is_one_line(hub, name, part):
  _, convert = hub
  done = convert(name, "out")
  assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and part in done.stderr, done.stderr


@pytest.mark.process
def test_a_data_set_is_read_by_its_name(tmp_path):
  """Its tables alone, by ranges; the name is that of the hub, with or without `datasets/`."""
  folder = tmp_path / "hub"
  folder.mkdir()
  (folder / "README.md").write_text("cats")
  cells = [{"bytes": picture, "path": f"{i}.png"} for i, picture in enumerate(pictures(6))]
  for part in range(2):
    table = {"image": cells[3 * part :][:3], "text": [f"cat {part} {i}" for i in range(3)]}
    pq.write_table(pa.table(table), folder / f"train-{part}.parquet")
  server = Hub(folder, "datasets")
  threading.Thread(target=server.serve_forever, daemon=True).start()
  environment = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
  argv = ["prepare", "--format=parquet", f"--input=hf://{NAME}", "--task=generation", "--output=out"]
  done = subprocess.run(
    [sys.executable, "-m", "jflow", *argv],
    cwd=tmp_path,
    env=os.environ | environment | {"no_proxy": "*"},
    capture_output=True,
    text=True,
    timeout=100,
  )
  server.shutdown()
  assert done.returncode == 0, done.stderr
  assert json.loads((tmp_path / "out" / "summary.json").read_text())["accepted"] == 6
  assert not [path for path in server.asked if path.endswith(".md")]


def test_a_folder_that_is_here_is_never_looked_for_elsewhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "runs").mkdir()
  for name in ("runs/stage1", "runs", "/runs/stage1", "./runs/stage1", "../runs/stage1", "a/b/c", "runs/stage1@v1"):
    assert not remote.is_remote(name), name
  for name in ("org/name", "org/name@v1.0", "org/name@refs/pr/1", "gs://bucket/run", "gs:/bucket/run"):
    assert remote.is_remote(name), name
