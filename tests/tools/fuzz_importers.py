"""Fuzzes the importers of `prepare`: python tests/tools/fuzz_importers.py --seed=0 --tries=2000

Each round writes sound records with spoiled ones between them, in one of `LAYOUTS`, and imports them in this
process. A try is a spoiled record, or a file of which bytes were changed. Asked is that nothing but
`UserError` escapes, that a round ends in time, that every sound record of a round is there, and that
accepted, rejected and dropped ones add up. Prints one line of JSON, {"tried", "escaped", "hung", "lost"}, and
on stderr what broke and how to see it again.
"""

import argparse
import collections
import copy
import gzip
import json
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

from preparing import image
from tools import fuzz_layouts
from tools.fuzzing import Layout, mark, places, spoil_bytes

from jflow.data.store import prepare, prepared
from jflow.errors import UserError

SECONDS = 30  # of a round, far beyond what one takes
SPOILED = 12  # records of a round
PICTURES = tuple(image(i) for i in range(4))


class Hung(BaseException):
  """A round did not end."""


class Raw(str):
  """Text that stands in a JSON text as it is."""


# Values that stand where others are expected.
ODD: tuple[Any, ...] = (
  None,
  True,
  False,
  0,
  -1,
  2**63,
  1.5,
  float("nan"),
  float("inf"),
  "",
  " ",
  "x",
  "\ud800",
  "a\0b",
  "\u2028",
  "\ufeff",
  "<image>",
  "<image_placeholder>",
  "../x.png",
  "/etc/hostname",
  "0.png",
  "x" * 70_000,
  [],
  {},
  [None],
  [""],
  [[]],
  [{}],
  {"a": {}},
  [["a"]],
  {"bytes": None, "path": None},
  [0] * 500,
  "system",
  "[",
  "[]",
  '[{"from": []}]',
  Raw("1e400"),
  Raw("9" * 5000),
  Raw("[" * 60 + "]" * 60),
  Raw("[" * 3000 + "]" * 3000),
  Raw('{"a": 1, "a": 2}'),
  Raw('"\\ud83d"'),
  Raw("-0"),
  Raw("1E+2"),
)
KEYS = (
  "id",
  "image",
  "images",
  "conversations",
  "messages",
  "texts",
  "caption",
  "text",
  "content",
  "question",
  "answer",
  "video",
  "audio",
  "sound",
  "from",
  "role",
  "value",
  "user",
  "assistant",
  "type",
  "img_path",
  "prompt",
  "",
)


def spoil_fields(rng: random.Random, record: dict[str, Any]) -> dict[str, Any]:
  """Returns an object with one to three of its values replaced, removed, doubled, wrapped or renamed."""
  record = json.loads(json.dumps(record))
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    inside, key = rng.choice(list(places(record)) or [(record, "text")])
    change = rng.randrange(7)
    if change <= 2 or not record:
      inside[key] = copy.deepcopy(rng.choice(ODD))
    elif change == 3:
      del inside[key]
    elif change == 4:
      inside[key] = [copy.deepcopy(inside[key]) for _ in range(rng.choice((1, 2, 40)))]
    elif change == 5:
      record[rng.choice(KEYS)] = copy.deepcopy(rng.choice((*ODD, inside[key])))
    elif isinstance(inside, dict):
      inside[rng.choice(KEYS)] = inside.pop(key)
  return record


def to_json(value: Any) -> bytes:
  """Returns a JSON text in which each `Raw` stands as it is."""
  raws: list[str] = []

  def tokens(value: Any) -> Any:
    if isinstance(value, Raw):
      raws.append(value)
      return f"raw-{len(raws) - 1}-"
    if isinstance(value, dict):
      return {key: tokens(inner) for key, inner in value.items()}
    return [tokens(inner) for inner in value] if isinstance(value, list) else value

  text = json.dumps(tokens(value))
  for number, raw in enumerate(raws):
    text = text.replace(f'"raw-{number}-"', raw)
  return text.encode()


def _line(record: Any) -> bytes:
  """Returns a record as one line that is not blank."""
  line = record if isinstance(record, bytes) else to_json(record)
  line = line.replace(b"\n", b" ")
  return line if line.strip(b" \t\r\n\v\f\xef\xbb\xbf") else b"?"


def _spoil_line(rng: random.Random, record: dict[str, Any]) -> Any:
  return spoil_fields(rng, record) if rng.random() < 0.7 else spoil_bytes(rng, to_json(record))


def _chat(number: int) -> dict[str, Any]:
  turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": mark(number)}]
  return {"id": f"r{number}", "image": f"{number % 4}.png", "conversations": turns, "width": 12}


def _talk(number: int) -> dict[str, Any]:
  turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": mark(number)}]
  return {"messages": turns, "source": "talks"}


def _write_lines(folder: pathlib.Path, records: list[Any]) -> pathlib.Path:
  for number, picture in enumerate(PICTURES):
    (folder / f"{number}.png").write_bytes(picture)
  (folder / "data.jsonl").write_bytes(b"".join(_line(record) + b"\n" for record in records))
  return folder / "data.jsonl"


def _write_array(folder: pathlib.Path, records: list[Any]) -> pathlib.Path:
  _write_lines(folder, []).unlink()
  (folder / "data.json").write_bytes(b"[" + b",\n".join(map(to_json, records)) + b"]\n")
  return folder / "data.json"


def _write_gzip(folder: pathlib.Path, records: list[Any]) -> pathlib.Path:
  path = folder / "data.jsonl.gz"
  path.write_bytes(gzip.compress(b"\n".join(map(_line, records)), 0))
  return path


def _write_paragraphs(folder: pathlib.Path, records: list[bytes]) -> pathlib.Path:
  (folder / "data.txt").write_bytes(b"\n\n".join(records))
  return folder / "data.txt"


def _write_files(folder: pathlib.Path, records: list[bytes]) -> pathlib.Path:
  for number, record in enumerate(records):
    (folder / f"{number:04d}.txt").write_bytes(record)
  return folder


def _document(number: int) -> dict[str, Any]:
  return {"text": f"{mark(number)} A story.", "id": number, "tags": ["a", 1]}


def _text(number: int) -> bytes:
  return f"{mark(number)}\nA né line.".encode()


LAYOUTS = {
  "llava lines": Layout("llava-jsonl", "understanding", _chat, _spoil_line, _write_lines),
  "llava lines, text": Layout("llava-jsonl", "text", _talk, _spoil_line, _write_lines, {"part_records": 7}),
  "llava array": Layout("llava-jsonl", "understanding", _chat, spoil_fields, _write_array),
  "llava captions": Layout(
    "llava-jsonl",
    "generation",
    lambda number: {"image": f"{number % 4}.png", "caption": mark(number)},
    _spoil_line,
    _write_lines,
  ),
  "text lines": Layout("text", "text", _document, _spoil_line, _write_lines),
  "text gzip": Layout("text", "text", _document, _spoil_line, _write_gzip),
  "text paragraphs": Layout(
    "text", "text", _text, spoil_bytes, _write_paragraphs, {"documents": "paragraph"}, exact=False
  ),
  "text files": Layout("text", "text", _text, spoil_bytes, _write_files),
  **fuzz_layouts.LAYOUTS,
}


def run_round(layout: Layout, rng: random.Random, folder: pathlib.Path) -> tuple[int, str]:
  """Imports sound records with spoiled ones between them, or a file with changed bytes.

  Returns:
    The number of tries, and what broke: "" or "escaped: ...", "hung: ...", "lost: ...".
  """
  (folder / "in").mkdir(parents=True)
  sound = [layout.sound(number) for number in range(SPOILED + 1)]
  whole = rng.random() < 0.15
  records = sound[:1]
  for number in range(1, SPOILED + 1):
    records += [*(() if whole else [layout.spoil(rng, layout.sound(SPOILED + number))]), sound[number]]
  path = layout.write(folder / "in", records)
  if whole:
    changed = rng.choice(sorted(file for file in (folder / "in").rglob("*") if file.is_file()))
    changed.write_bytes(spoil_bytes(rng, changed.read_bytes()))
  summary, broken = _import(layout, path, folder / "out")
  if broken or whole:
    return 1 if whole else SPOILED, broken
  if summary is None:
    return SPOILED, "lost: all, the input was refused"
  return SPOILED, _missing(layout, summary, folder / "out", len(records))


def _import(layout: Layout, path: pathlib.Path, output: pathlib.Path) -> tuple[dict[str, Any] | None, str]:
  def stop(*_: Any) -> None:
    raise Hung

  before = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, SECONDS)
  try:
    options = {"max_rejected_share": 1.0, **layout.options}
    return prepare.prepare(layout.format, str(output), layout.task, str(path), **options), ""
  except UserError:
    return None, ""
  except Hung:
    return None, f"hung: {traceback.format_exc(limit=-3)}"
  except Exception:
    return None, f"escaped: {traceback.format_exc(limit=-6)}"
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def _missing(layout: Layout, summary: dict[str, Any], output: pathlib.Path, records: int) -> str:
  """Returns which sound records are not there, or how the counts do not add up; "" where all is right."""
  kept = [str(record) for record in prepared.PreparedSource(str(output), layout.task).outlines()]
  lost = [number for number in range(SPOILED + 1) if not any(mark(number) in text for text in kept)]
  if lost:
    return f"lost: {lost}; {summary['first_rejected']}"
  counts = summary["accepted"], sum(summary["rejected"].values()), sum(summary["filtered"].values())
  if layout.exact and sum(counts) != records:
    return f"lost: {records} records became {counts} (accepted, rejected, dropped)"
  return ""


def fuzz(seed: int, tries: int, names: Sequence[str] = tuple(LAYOUTS)) -> dict[str, int]:
  """Runs rounds, the layouts in turn, until there were so many tries; returns the counts."""
  counts = collections.Counter(tried=0, escaped=0, hung=0, lost=0)
  number = 0
  with tempfile.TemporaryDirectory() as root:
    while counts["tried"] < tries:
      name = names[number % len(names)]
      folder = pathlib.Path(root) / str(number)
      tried, broken = run_round(LAYOUTS[name], random.Random(f"{seed}/{name}/{number}"), folder)
      counts["tried"] += tried
      if broken:
        counts[broken.partition(":")[0]] += 1
        print(f"seed {seed}, {name}, round {number}: {broken}", file=sys.stderr)
      shutil.rmtree(folder, ignore_errors=True)
      number += 1
  return dict(counts)


def main() -> int:
  """Runs the command line; exit code 1 where anything broke."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--tries", type=int, default=2000)
  parser.add_argument("--layout", choices=LAYOUTS, action="append", help="repeatable; all by default")
  args = parser.parse_args()
  counts = fuzz(args.seed, args.tries, args.layout or tuple(LAYOUTS))
  print(json.dumps(counts))
  return int(any(counts[what] for what in ("escaped", "hung", "lost")))


if __name__ == "__main__":
  sys.exit(main())
