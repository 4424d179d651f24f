"""Benchmarks as the TSV files of VLMEvalKit, written for tests."""

import base64
import csv
import io
import pathlib

from PIL import Image


def png(color: str) -> str:
  buffer = io.BytesIO()
  Image.new("RGB", (8, 6), color).save(buffer, "PNG")
  return base64.b64encode(buffer.getvalue()).decode()


def write_table(path, rows: list[dict]) -> None:
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
    writer.writeheader()
    writer.writerows(rows)


def pope_rows(count: int = 6) -> list[dict]:
  return [
    {
      "index": i,
      "image": png("red") if i % 3 == 0 else i - i % 3,
      "question": f"Is there a cat {i}? Please answer yes or no.",
      "answer": "Yes" if i % 2 else "No",
      "category": "random,popular",
    }
    for i in range(count)
  ]


def pope_folder(folder: pathlib.Path) -> pathlib.Path:
  """A new folder with a POPE.tsv of six questions about two pictures."""
  folder.mkdir()
  write_table(folder / "POPE.tsv", pope_rows())
  return folder
