"""Shared by the tests of `prepare`: small images, a folder in LLaVA's layout, a prepared directory read back."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from jflow.data.store import prepare
from jflow.data.store.prepared import PreparedSource


def image(index: int, format: str = "PNG") -> bytes:
  """Encodes 12 + index by 9 pixels of value index."""
  buffer = io.BytesIO()
  Image.fromarray(np.full((9, 12 + index, 3), index, np.uint8)).save(buffer, format)
  return buffer.getvalue()


def chat(image, question="<image>\nWhich?", answer="This.", **more):
  return {
    "image": image,
    "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    **more,
  }


def write_lines(path, lines) -> str:
  with open(path, "wb") as file:
    for line in lines:
      file.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")
  return str(path)


def make_folder(folder):
  """A folder with 12 images and their conversations."""
  (folder / "pictures").mkdir(parents=True)
  for i in range(12):
    (folder / "pictures" / f"{i}.png").write_bytes(image(i))
  write_lines(
    folder / "chat.jsonl",
    [chat(f"pictures/{i}.png", answer=f"Number {i}, né.", id=f"r{i}") for i in range(12)],
  )
  return folder


def run(folder, task="understanding", name="chat.jsonl", format="llava-jsonl", output=None, **options):
  """Prepares folder/name into a directory beside the folder; returns the summary and the directory."""
  output = output or str(folder.parent / "out")
  return prepare.prepare(format, output, task, str(folder / name), **options), output


def read_back(output, task="understanding"):
  source = PreparedSource(output, task)
  return [source[i] for i in range(len(source))]


def write_tar(path, members: dict[str, bytes], mode: str = "w", **options) -> str:
  """Writes a tar by the standard library."""
  with tarfile.open(path, mode, **options) as tar:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return str(path)
