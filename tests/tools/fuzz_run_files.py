"""Damages what jflow wrote and opens it again: python tests/tools/fuzz_run_files.py --seed=0 --tries=300

A try takes a copy of a finished run, of a prepared data set with its plans and latents, or of a killed import; harms
some of its files and folders (`HARM`); and goes on as the commands do, in this process. Asked is that nothing but
`UserError` escapes, that it ends, that no run starts over, that what is restored is as it was saved, and that
nothing whole is gone: neither a file, nor a line of metrics, nor a record, nor what a link leads to.
Prints one line of JSON, {"tried", "escaped", "hung", "lost"}, and on stderr what broke and how to see it again.
"""

import argparse
import collections
import contextlib
import functools
import io
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny
from ml_dtypes import bfloat16
from preparing import make_folder
from tools.fuzzing import places

from jflow.batch import RowShape
from jflow.config import RunConfig
from jflow.data.records import RecordError
from jflow.data.store import plans, prepare, prepared, stored, stored_writer
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.generation.flow import FAMILY
from jflow.interop.steps import damage
from jflow.training import workdir as workdirs
from jflow.training.checkpoint import Checkpointer
from jflow.training.goodput import Goodput, summary
from jflow.training.metrics import Lines, read_metrics
from jflow.training.state import TrainState

SECONDS = 60  # of a try, far beyond what one takes
SAVED, LAST = (2, 4, 6), 7  # steps of the run with a checkpoint, and with a line of metrics
RECORDS, SHARD = 12, 5
MOMENTS = (2, 2, 4)
SHAPE = RowShape(tokens=64, images=2, image_patches=4, image_size=8, writer="flow")
LATENTS = FAMILY.stored


class Hung(BaseException):
  """A try did not end."""


class Begun(Exception):
  """A run begins, at step 0."""


class Lost(Exception):
  """Something whole is gone, or a run has started over."""


@functools.cache
def tokenizer() -> Tokenizer:
  """That of the tests."""
  return Tokenizer.load(str(tiny.TOKENIZER))


@functools.cache
def configuration() -> RunConfig:
  """The config of the run."""
  return tiny.configuration()


# --- what is harmed --------------------------------------------------------------------------------------------


@functools.cache
def state(step: int) -> TrainState:
  """The state of the run at a step: a function of it."""
  kernel = jnp.asarray(np.random.default_rng(step).standard_normal((3, 2)), jnp.float32)
  made = TrainState.create({"kernel": kernel}, {"tower": kernel + 1}, optax.sgd(0.1))
  return made.replace(step=jnp.asarray(step, jnp.int32))


def line(step: int) -> dict[str, Any]:
  """The metrics of a step."""
  return {"step": step, "loss": 1 / step, "packs": {"text": step}}


def make_run(workdir: pathlib.Path) -> None:
  """Writes a run as the trainer does, one that ended one step after its last checkpoint."""
  held = workdirs.claim(workdir, configuration(), tokenizer())
  checkpointer = open_checkpoints(workdir)
  assert checkpointer.restore(abstract()) is None
  workdirs.write_config(workdir, configuration(), tokenizer())
  record, lines = Goodput(workdir, time.time()), Lines(workdir / "metrics.jsonl", 1)
  for step in range(1, LAST + 1):
    lines.write(line(step))
    record.steps(step, now=True)
    if step in SAVED:
      checkpointer.save(state(step))
  checkpointer.wait()
  record.write_summary()
  record.close()
  lines.close()
  workdirs.unlock(held)


def open_checkpoints(workdir: pathlib.Path) -> Checkpointer:
  """The checkpoints of the run, of which none is deleted."""
  about = {"config": configuration().to_dict(), "tokenizer": tokenizer().fingerprint}
  return Checkpointer(workdir / "checkpoints", 10, about)


def abstract() -> TrainState:
  """Shapes and places of a state."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))


def go_on(workdir: pathlib.Path, rng: random.Random) -> int:
  """Starts the run again for some steps, as the trainer does; returns the step that it went on from."""
  held = workdirs.claim(workdir, configuration(), tokenizer())
  try:
    checkpointer = open_checkpoints(workdir)
    restored = checkpointer.restore(abstract())
    if restored is None:
      raise Begun
    first = int(restored.step)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(state(first)), strict=True):
      if not np.array_equal(x, y):
        raise Lost(f"step {first} is not as it was saved")
    workdirs.write_config(workdir, configuration(), tokenizer())
    record = Goodput(workdir, time.time())
    record.mark("restore", first)
    lines = Lines(workdir / "metrics.jsonl", first + 1, keep_dropped=True)
    stop = rng.choice((first + 1, first + 2, 9))
    for step in range(first + 1, stop + 1):
      lines.write(line(step))
      record.steps(step, now=True)
    checkpointer.save(state(stop))
    checkpointer.wait()
    record.write_summary()
    record.close()
    lines.close()
    if [row["step"] for row in read_metrics(workdir)][-1] != stop or not summary(workdir)["starts"]:
      raise Lost("what was written is not read")
    return first
  finally:
    workdirs.unlock(held)


def try_run(workdir: pathlib.Path, harmed: set[str], rng: random.Random) -> None:
  """Goes on with a harmed run."""
  before, old = snapshot(workdir), whole_lines(workdir)
  folders = {f"checkpoints/{step}/" for step in SAVED}
  # What is damaged by its own manifest is written again, if the run saves that step.
  damaged = tuple(f for f in folders if "manifest.json" not in (damage(workdir / f) or "manifest.json"))
  try:
    first = go_on(workdir, rng)
  except Begun:
    if any(name.startswith(("checkpoints/", "metrics.jsonl", "goodput.jsonl")) for name in before):
      raise Lost("the run has started over") from None
    return
  except UserError:
    check_kept(before, snapshot(workdir), lambda name: name == "lock")
    return
  after = snapshot(workdir)
  kept = collections.Counter(after.values())
  for name, content in before.items():
    if name.startswith("checkpoints/") and not kept[content] and not name.startswith(damaged):
      raise Lost(f"{name} is gone")
  new = whole_lines(workdir)
  everywhere = "".join(c.decode("utf-8", "replace") for n, c in after.items() if n.startswith("metrics.jsonl"))
  for step, text in old.items():
    if step <= first and new.get(step) != text:
      raise Lost(f"the line of step {step} is gone, the run went on from {first}")
    if text not in everywhere:
      raise Lost(f"the line of step {step} is kept nowhere")
  steps = [row["step"] for row in read_metrics(workdir)]
  if len(set(steps)) != len(steps):
    raise Lost(f"steps stand twice: {steps}")
  if rng.random() < 0.3:
    go_on(workdir, rng)  # what was mended stays so


def whole_lines(workdir: pathlib.Path) -> dict[int, str]:
  """Step -> its line, of those in metrics.jsonl that are as they were written."""
  path = workdir / "metrics.jsonl"
  text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
  written = {json.dumps(line(step)): step for step in range(1, 20)}
  return {written[row]: row for row in text.replace("\r", "").split("\n") if row in written}


def make_data(folder: pathlib.Path) -> None:
  """Writes a prepared data set with its plan, lengths and latents."""
  prepare.prepare("shapes", str(folder), "generation", records=RECORDS, image_size=8, part_records=SHARD)
  encode = lambda pixels: np.repeat(pixels.mean((1, 2, 3)), 16).reshape(-1, *MOMENTS).astype(bfloat16)
  stored_writer.write(LATENTS, str(folder), 8, MOMENTS, "encoder", encode, batch_size=4, seed=0, threads=1)
  read_data(folder)


def read_data(folder: pathlib.Path) -> tuple[list[Any], plans.Planned, list[Any]]:
  """Opens a data set as a run does: its records, their plan, their latents; None for what is damaged."""
  source = prepared.PreparedSource(str(folder), "generation")
  planned = plans.planned(source, "generation", tokenizer(), "plain", SHAPE, "")
  made = stored.StoredImages(LATENTS, source, 8, MOMENTS)
  return [at(source, i) for i in range(len(source))], planned, [at(made, i) for i in range(len(source))]


def at(source: Any, index: int) -> Any:
  """The content at an index, as text; None where it is damaged."""
  try:
    return repr(source[index])
  except RecordError:
    return None


def try_data(folder: pathlib.Path, harmed: set[str], rng: random.Random) -> None:
  """Opens a harmed data set."""
  derived = lambda name: name.startswith(("plan-", "lengths-"))
  before = snapshot(folder)
  try:
    records, planned, made = read_data(folder)
  except UserError:
    if all(map(derived, harmed)):
      raise Lost(f"plans and lengths are made anew, and are refused: {harmed}") from None
    check_kept(before, snapshot(folder), derived)
    return
  check_kept(before, snapshot(folder), derived)
  wanted = sound_data()
  if any(b not in (a, None) for a, b in (*zip(wanted[0], records, strict=True), *zip(wanted[2], made, strict=True))):
    raise Lost("a record is another one")
  same = planned[1:] == wanted[1][1:] and all(map(np.array_equal, planned.plan, wanted[1].plan))
  if not same:
    raise Lost(f"the plan is another one: {planned}")


def make_import(folder: pathlib.Path) -> None:
  """Leaves the parts of an import that did not end well: more records are unusable than allowed."""
  with contextlib.suppress(UserError):
    import_again(folder, 0.0)
  assert (folder / "out.partial" / "part-00000.json").exists()


@functools.cache
def input_folder() -> pathlib.Path:
  """Twelve sound records and one that cannot be used."""
  folder = make_folder(pathlib.Path(tempfile.mkdtemp()) / "in")
  with open(folder / "chat.jsonl", "a") as file:
    file.write('{"image": "nowhere.png"}\n')
  return folder


def import_again(folder: pathlib.Path, share: float) -> dict[str, Any]:
  """Runs the import."""
  source = str(input_folder() / "chat.jsonl")
  return prepare.prepare(
    "llava-jsonl", str(folder / "out"), "understanding", source, max_rejected_share=share, part_records=SHARD
  )


def try_import(folder: pathlib.Path, harmed: set[str], rng: random.Random) -> None:
  """Goes on with a harmed import."""
  before = snapshot(folder)
  try:
    made = import_again(folder, 1.0)
  except UserError:
    again = {name[: len("out.partial/part-00000")] for name in harmed if "/part-" in name}  # parts that are read again
    check_kept(before, snapshot(folder), lambda name: name.endswith("/lock") or name.startswith(tuple(again)))
    return
  source = prepared.PreparedSource(str(folder / "out"), "understanding")
  if (made["accepted"], made["rejected"]) != sound_import() or len(list(source.outlines())) != len(source):
    raise Lost(f"records are gone: {made}")
  if not all(at(source, i) for i in range(len(source))):
    raise Lost("a record cannot be read")


class Kind(NamedTuple):
  """A kind of harm: the thing that is made, and a try to harm it."""

  make: Callable[[pathlib.Path], None]
  attempt: Callable[[pathlib.Path, set[str], random.Random], None]
  share: int  # of the tries, in parts


KINDS = {
  "run": Kind(make_run, try_run, 2),
  "data": Kind(make_data, try_data, 3),
  "import": Kind(make_import, try_import, 2),
}


@functools.cache
def sound(name: str) -> pathlib.Path:
  """A sound one of a kind, made once; it is copied."""
  folder = pathlib.Path(tempfile.mkdtemp()) / name
  folder.mkdir()
  KINDS[name].make(folder)
  return folder


@functools.cache
def sound_data() -> tuple[list[Any], plans.Planned, list[Any]]:
  """Content of the sound data set; copies lie elsewhere and hold the same."""
  return read_data(sound("data"))


@functools.cache
def sound_import() -> tuple[int, dict[str, int]]:
  """Counts of the import."""
  with tempfile.TemporaryDirectory() as folder:
    made = import_again(pathlib.Path(folder), 1.0)
    return made["accepted"], made["rejected"]


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
  """Name -> content of each file, of a link where it leads to."""
  out = {}
  for directory, folders, names in os.walk(folder):
    for name in (*names, *folders):
      path = pathlib.Path(directory, name)
      if path.is_symlink():
        out[str(path.relative_to(folder))] = b"link " + os.fsencode(os.readlink(path))
      elif path.is_file():
        out[str(path.relative_to(folder))] = path.read_bytes()
  return out


def check_kept(before: dict[str, bytes], after: dict[str, bytes], free: Callable[[str], bool]) -> None:
  """Raises Lost where a file is gone or changed, but for those that may go."""
  for name, content in before.items():
    if not free(name) and after.get(name) != content:
      raise Lost(f"{name} is {'changed' if name in after else 'gone'}")


# --- harm ------------------------------------------------------------------------------------------------------

ODD = (
  b"",
  b"null",
  b"42",
  b"[]",
  b"{}",
  b'""',
  b"true",
  b"[" * 100_000,
  b'{"a":' * 3000 + b"1" + b"}" * 3000,
  b"\xff\xfe{",
  b"NaN",
  b"9" * 5000,
  b'{"step": -1}',
  b'{"step": "4"}',
  b'{"step": 1e999}',
  b'{"files": {}}',
  b'{"files": {"a": 1}}',
  b'{"schema": 1}',
  b"\0" * 300,
  b"\x1f\x8b\x08\0",
  b"PK\x03\x04",
  b"\x93NUMPY",
  b"version https://git-lfs\n",
)
VALUES = (None, True, -1, 0, 2**31, 2**70, 1.5, float("nan"), "", "x", "\ud800", [], {}, [None], {"a": 1}, "../../etc")
NAMES = ("007", "٣", "²", "5", "-1", "99999999999", "4.old", "5.tmp", ".x", "a b")


def harm(folder: pathlib.Path, elsewhere: pathlib.Path, rng: random.Random) -> set[str]:
  """Does one to five things to files and folders below a folder; returns the names of what it touched."""
  touched = set()
  for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
    paths = sorted(folder.rglob("*"))
    flat = [p for p in paths if p.parent == folder or p.name.endswith((".json", ".jsonl"))]
    path = rng.choice(flat if flat and rng.random() < 0.6 else paths or [folder / "new"])
    if not os.path.lexists(path):
      continue
    touched.add(str(path.relative_to(folder)))
    if path.is_dir() and not path.is_symlink():
      rng.choice((remove, link_away, dangle, to_file, rename, foreign, foreign, foreign, strip_json))(
        path, elsewhere, rng
      )
    else:
      rng.choice((remove, link_away, dangle, to_folder, to_pipe, *[to_file] * 2, *[spoil] * 4, *[values] * 4))(
        path, elsewhere, rng
      )
  return touched


def remove(path: pathlib.Path, elsewhere: pathlib.Path, rng: random.Random) -> None:
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink()


def link_away(path: pathlib.Path, elsewhere: pathlib.Path, rng: random.Random) -> None:
  target = elsewhere / f"{len(list(elsewhere.iterdir()))}-{path.name}"
  shutil.move(path, target)
  path.symlink_to(target)


def dangle(path: pathlib.Path, elsewhere: pathlib.Path, rng: random.Random) -> None:
  remove(path, elsewhere, rng)
  path.symlink_to(elsewhere / "nowhere" / path.name)


def to_file(path: pathlib.Path, elsewhere: pathlib.Path, rng: random.Random) -> None:
  remove(path, elsewhere, rng)
  path.write_bytes(rng.choice(ODD))


def to_folder(path: pathlib.Path, elsewhere: pathlib.Path, rng: random.Random) -> None:
  remove(path, elsewhere, rng)
  path.mkdir()
  if rng.random() < 0.5:
    (path / "precious").write_text("of the user")


def to_pipe(path: pathlib.Path, elsewhere: pathlib.Path, rng: random.Random) -> None:
  remove(path, elsewhere, rng)
  os.mkfifo(path)


def rename(path: pathlib.Path, elsewhere: pathlib.Path, rng: random.Random) -> None:
  with contextlib.suppress(OSError):
    path.rename(path.with_name(rng.choice(NAMES)))


def foreign(path: pathlib.Path, elsewhere: pathlib.Path, rng: random.Random) -> None:
  new = path / rng.choice(NAMES)
  if os.path.lexists(new):
    return
  if rng.random() < 0.5:
    new.mkdir()
    (new / "precious").write_text("of the user")
  else:
    new.write_bytes(rng.choice(ODD))


def strip_json(path: pathlib.Path, elsewhere: pathlib.Path, rng: random.Random) -> None:
  """As a copy that left out all files of a name."""
  ending = rng.choice((".json", "manifest.json", ".jsonl", ".npz", ".outlines"))
  for file in path.rglob(f"*{ending}"):
    if file.is_file():
      file.unlink()


def spoil(path: pathlib.Path, elsewhere: pathlib.Path, rng: random.Random) -> None:
  """Changes, cuts or adds bytes, or lines."""
  if not path.is_file():
    return
  data = bytearray(path.read_bytes())
  place, change = rng.randrange(len(data) + 1), rng.randrange(8)
  lines = bytes(data).split(b"\n")
  if change <= 1:
    data = data[:place]
  elif change == 2 and data:
    data[place % len(data)] ^= 1 << rng.randrange(8)
  elif change == 3:
    data[place : place + 40] = bytes(len(data[place : place + 40]))
  elif change == 4:
    data[place:place] = rng.choice(ODD)
  elif change == 5:
    data += rng.choice(ODD) + rng.choice((b"", b"\n"))
  elif change == 6:
    number = rng.randrange(len(lines))
    lines.insert(rng.randrange(len(lines) + 1), rng.choice((lines[number], *ODD)))
    data = b"\n".join(lines)
  else:
    data = b"\r\n".join(lines)
  path.unlink()
  path.write_bytes(data)


def values(path: pathlib.Path, elsewhere: pathlib.Path, rng: random.Random) -> None:
  """Puts odd values into JSON, of a file or of one of its lines; spoils what is none."""
  if not path.is_file():
    return
  try:
    lines = path.read_text(encoding="utf-8").split("\n") if path.suffix == ".jsonl" else [path.read_text("utf-8")]
    number = rng.randrange(len(lines))
    value = json.loads(lines[number])
    inside, key = rng.choice(list(places(value)))
  except (OSError, ValueError, IndexError, RecursionError):
    return spoil(path, elsewhere, rng)
  if rng.random() < 0.3 and isinstance(inside, dict):
    del inside[key]
  else:
    inside[key] = rng.choice(VALUES)
  lines[number] = json.dumps(value)
  path.unlink()
  path.write_text("\n".join(lines))


# --- tries -----------------------------------------------------------------------------------------------------


def attempt(name: str, seed: str) -> str:
  """Makes one try; returns "" or what broke, beginning with "escaped", "hung" or "lost"."""
  rng, kind = random.Random(seed), KINDS[name]
  original = sound(name)
  with tempfile.TemporaryDirectory() as root:
    folder, elsewhere = pathlib.Path(root) / name, pathlib.Path(root) / "elsewhere"
    shutil.copytree(original, folder)
    elsewhere.mkdir()
    harmed = harm(folder, elsewhere, rng)
    away = snapshot(elsewhere)

    def stop(*_: Any) -> None:
      raise Hung

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    said = io.StringIO()
    try:
      with contextlib.redirect_stderr(said):
        kind.attempt(folder, harmed, rng)
      # A work folder may lie elsewhere, with the parts that are made again in it.
      check_kept(away, snapshot(elsewhere), lambda name: name.endswith("lock") or "-out.partial/" in name)
    except Lost as error:
      return f"lost: {error}; harmed {harmed}; it said: {said.getvalue()[-500:]}"
    except Hung:
      return f"hung: harmed {harmed}; {traceback.format_exc(limit=-3)}"
    except Exception:
      return f"escaped: harmed {harmed}; {traceback.format_exc(limit=-8)}"
    finally:
      signal.setitimer(signal.ITIMER_REAL, 0)
      signal.signal(signal.SIGALRM, before)
  return ""


def fuzz(seed: int, tries: int, names: tuple[str, ...] = tuple(KINDS), start: int = 0) -> dict[str, int]:
  """Makes tries, the kinds in turn; returns the counts."""
  counts = collections.Counter(tried=0, escaped=0, hung=0, lost=0)
  turn = [name for name in names for _ in range(KINDS[name].share)]
  for number in range(start, start + tries):
    name = turn[number % len(turn)]
    counts["tried"] += 1
    if broken := attempt(name, f"{seed}/{name}/{number}"):
      counts[broken.partition(":")[0]] += 1
      print(f"--seed={seed} --start={number} --tries=1: {name}: {broken}", file=sys.stderr)
  return dict(counts)


def main() -> int:
  """Runs the command line; exit code 1 where anything broke."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--tries", type=int, default=300)
  parser.add_argument("--start", type=int, default=0, help="number of the first try")
  parser.add_argument("--kind", choices=KINDS, action="append", help="repeatable; all by default")
  args = parser.parse_args()
  counts = fuzz(args.seed, args.tries, tuple(args.kind or KINDS), args.start)
  print(json.dumps(counts))
  return int(any(counts[what] for what in ("escaped", "hung", "lost")))


if __name__ == "__main__":
  sys.exit(main())
