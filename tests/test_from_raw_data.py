"""The examples of `prepare --help` run as they stand, one per format, and what they write trains together."""

import io
import json
import shlex

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import runs
import tfds_sets
from PIL import Image
from preparing import write_lines, write_tar

from jflow.cli import prepare as prepare_command
from jflow.data import importers
from jflow.training.metrics import read_lines


def _photo(index: int) -> bytes:
  colours = np.random.default_rng(index).integers(0, 256, (5, 7, 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(colours).resize((330 + index, 260)).save(buffer, "JPEG")
  return buffer.getvalue()


def _write_inputs(folder) -> None:
  """Writes ten records of each format under the names that the help uses."""
  (folder / "photos").mkdir()
  for i in range(10):
    (folder / "photos" / f"{i}.jpg").write_bytes(_photo(i))
  turns = [
    {"from": "human", "value": "<image>\nWhat is this?"},
    {"from": "gpt", "value": "Coloured squares."},
  ]
  chats = [{"id": str(i), "image": f"{i}.jpg", "conversations": turns * (1 + i % 2)} for i in range(10)]
  for i in range(1, 10, 2):  # of several turns, the first alone shows the picture
    chats[i]["conversations"] = turns + [
      {"from": "human", "value": "Sure?"},
      {"from": "gpt", "value": "Yes."},
    ]
  document = {"images": ["0.jpg", "1.jpg"], "text": "First <image> then <image> and the end."}
  write_lines(folder / "photos" / "chat.jsonl", [*chats, document])
  (folder / "my_pictures").mkdir()
  for i in range(10):
    (folder / "my_pictures" / f"{i}.jpg").write_bytes(_photo(i))
    (folder / "my_pictures" / f"{i}.txt").write_text(f"my squares number {i}")
  (folder / "tars").mkdir()
  members = {}
  for i in range(10):
    meta = {
      "caption": f"picture {i} of squares",
      "width": 330 + i,
      "height": 260,
      "aesthetic": 5.5,
      "url": "http://a.b",
    }
    members |= {f"{i:09d}.jpg": _photo(i), f"{i:09d}.txt": meta["caption"].encode()}
    members |= {f"{i:09d}.json": json.dumps(meta).encode()}
  write_tar(folder / "tars" / "00000.tar", members)
  (folder / "tables").mkdir()
  image = lambda i: {"bytes": _photo(i), "path": f"{i}.jpg"}
  rows = [{"image": image(i), "caption": f"Squares number {i}.", "pwatermark": 0.1} for i in range(10)]
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "tables" / "train-00000-of-00001.parquet")
  (folder / "books").mkdir()
  for i in range(10):
    (folder / "books" / f"{i}.txt").write_text(f"Chapter {i}.\n\n" + "Once there was a cat. " * 20)
  pets = [{"image": _photo(i), "label": i % 2, "caption": f"pet {i}", "score": 0.0} for i in range(10)]
  tfds_sets.write(folder / "tfds", tfds_sets.captioned, pets)


def test_every_format_comes_in_as_the_help_says_and_trains(tmp_path, monkeypatch, capsys, compilation_cache):
  monkeypatch.chdir(tmp_path)
  _write_inputs(tmp_path)
  with pytest.raises(SystemExit):
    prepare_command.main(["--help"])
  shown = capsys.readouterr().out.replace("\\\n", " ").split("afterwards")[0]
  examples = [shlex.split(line)[4:] for line in shown.splitlines() if line.startswith("  python -m jflow prepare")]
  flags = [dict(flag[2:].split("=", 1) for flag in example) for example in examples]
  assert {flag["format"] for flag in flags} == set(importers.FORMATS)
  sources = {"understanding": [], "generation": [], "text": []}
  for example, flag in zip(examples, flags):
    small = ["--records=12", "--image_size=32"] if flag["format"] == "shapes" else []
    prepare_command.main([*example, *small, "--processes=1"])
    records = json.loads((tmp_path / flag["output"] / "summary.json").read_text())["accepted"]
    assert records == {"shapes": 12, "llava-jsonl": 11}.get(flag["format"], 10)
    sources[flag["task"]].append((str(tmp_path / flag["output"]), 1.0))
  assert all(sources.values())
  fields = [f"--config.data.sources.{task}={tuple(listed)!r}" for task, listed in sources.items()]
  runs.train(2, tmp_path / "run", compilation_cache, "", "--config.train.steps=2", *fields)
  for row in read_lines(tmp_path / "run" / "metrics.jsonl"):
    assert np.isfinite(row["loss"]) and row["rejected"] == {} and min(row["packs"].values()) > 0
