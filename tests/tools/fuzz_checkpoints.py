"""Fuzzes what opens checkpoints: python tests/tools/fuzz_checkpoints.py --seed=0 --tries=2000

Each try spoils one file of a small checkpoint, of a published layout with shards or of jflow's own, and
opens it with `jflow.load`, which what `convert` and `parity` read goes through too. Asked is that nothing but
`UserError` escapes, in one line, that a try ends in time and takes no more memory than a sound one, and that the
sound checkpoints between the tries still open. Prints one line of JSON, {"tried", "escaped", "hung", "lost"}, and on
stderr what broke and how to see it again.
"""

import argparse
import collections
import copy
import json
import pathlib
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

import janus_checkpoint
import numpy as np
import official_checkpoint
import tiny
from safetensors.numpy import save_file
from tools.fuzz_importers import ODD, Hung, Raw, places, spoil_bytes, to_json

import jflow
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.interop import janus, native, processor_config, steps, vae
from jflow.models import weights as names
from jflow.models.autoencoders.kl import AutoencoderKLConfig

SECONDS = 30  # of a try, far beyond what one takes
MEMORY = 2**30  # bytes by which a try may let the process grow
EVERY = 50  # tries from one sound checkpoint to the next
NUMBERS = (
  0,
  -1,
  1,
  2,
  3,
  7,
  16,
  255,
  10**4,
  10**6,
  10**9,
  10**12,
  2**31,
  2**63,
  0.5,
  1e-320,
  1e300,
  1e308,
  1.0,
  Raw("1e999"),
  Raw("NaN"),
  Raw("-Infinity"),
  Raw("9" * 400),
  Raw("9" * 5000),
  "4",
  True,
  None,
  [4],
  {"a": 4},
)
TEXTS = ("a red ring", "  \n\t 12345 <image_placeholder> 颜色", "a" * 200)
PATTERNS = (
  "(a+)+$",
  "(a|a)*b",
  "a{100000}",
  "(?:a{1000}){1000}",
  "[",
  "(?<x>a)\\g<x>",
  "(",
  "\\p{L}+",
  " ?[^\\s]+|\\s+(?!\\S)",
  "",
)


def _write_vae(directory: pathlib.Path) -> None:
  directory.mkdir()
  config = AutoencoderKLConfig("autoencoder_kl", 4, 0.13025, (4, 4, 8, 8), 1, 4)
  rng = np.random.default_rng(7)
  values = {e.name: (0.2 * rng.standard_normal(e.shape)).astype(np.float32) for e in names.autoencoder_kl(config)}
  save_file(values, directory / "diffusion_pytorch_model.safetensors")
  (directory / "config.json").write_text(json.dumps(vae.write_config(config, 64)))


def write_published(directory: pathlib.Path) -> None:
  """The published layout: two shards, a VAE, a tokenizer and the processor's files."""
  official_checkpoint.write(directory, shards=2, tokenizer=True)
  _write_vae(directory / "vae")
  half = [0.5, 0.5, 0.5]
  images = {
    "image_size": 64,
    "image_mean": half,
    "image_std": half,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
  }
  (directory / "preprocessor_config.json").write_text(json.dumps(images | {"min_size": 14}))
  (directory / "processor_config.json").write_text(json.dumps({"num_image_tokens": 16, "sft_format": "deepseek"}))


def write_janus(directory: pathlib.Path, layout: pathlib.Path = janus_checkpoint.OFFICIAL) -> None:
  """Janus: two shards, a tokenizer and the processor's files."""
  janus_checkpoint.write(directory, layout, shards=2, tokenizer=True)
  config = janus.config_from_official(janus_checkpoint.config(), "config.json")
  official = layout == janus_checkpoint.OFFICIAL
  made = processor_config.official_files(config, None) if official else processor_config.transformers_files(config)
  for name, values in made.items():
    (directory / name).write_text(json.dumps(values))


def write_transformers(directory: pathlib.Path) -> None:
  """The same as transformers lays it out."""
  write_janus(directory, janus_checkpoint.TRANSFORMERS)


def write_own(directory: pathlib.Path) -> None:
  """jflow's own layout."""
  config = {"model": tiny.CONFIG.to_dict(), "data": {"template": "plain"}, "has_vae": True}
  native.save_params(directory, tiny.params(), config, Tokenizer.load(str(tiny.TOKENIZER)))


def spoil_json(rng: random.Random, value: Any) -> Any:
  """A value with one to three of its places replaced, removed, renamed or added to."""
  value = copy.deepcopy(value)
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    if not (found := list(places(value))):
      return value
    inside, key = rng.choice(found)
    if len(found) > 2000:  # in a vocabulary, the few places around it
      inside, key = rng.choice([x for x in found if x[1] != "vocab" and len(x[0]) < 60] or found)
    change = rng.randrange(8)
    if change <= 3:
      inside[key] = copy.deepcopy(rng.choice(NUMBERS if type(inside[key]) in (int, float) else ODD + NUMBERS))
    elif change == 4:
      del inside[key]
    elif change == 5 and isinstance(inside, dict):
      inside[rng.choice(("rope_scaling", "extra", "latents_mean", "auto_map", "", "a\nb"))] = rng.choice(ODD + NUMBERS)
    elif change == 6:
      other, place = rng.choice(found)
      inside[key] = (
        copy.deepcopy(other[place]) if place in other or isinstance(other, list) and place < len(other) else 0
      )
    elif type(inside[key]) is int:
      inside[key] += rng.choice((-1, 1, 2**20))
  return value


def spoil_tokenizer(rng: random.Random, value: Any) -> Any:
  """A tokenizer.json with another part, or spoiled as any JSON."""
  value = copy.deepcopy(value)
  pattern = {"Regex": rng.choice(PATTERNS)}
  split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
  replace = {
    "type": "Replace",
    "pattern": rng.choice(({"String": "a"}, pattern)),
    "content": "x" * rng.choice((0, 1, 50, 10**5)),
  }
  change = rng.randrange(8)
  if change == 0:
    value["pre_tokenizer"] = {
      "type": "Sequence",
      "pretokenizers": [split, *[value["pre_tokenizer"]] * rng.choice((1, 3, 80))],
    }
  elif change == 1:
    value["normalizer"] = {"type": "Sequence", "normalizers": [replace] * rng.choice((1, 2, 12))}
  elif change == 2:
    value["normalizer"] = rng.choice(
      ({"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "Prepend", "prepend": "x" * 10**6})
    )
  elif change == 3:
    value["decoder"] = {
      "type": "Strip",
      "content": "a",
      "start": rng.choice(NUMBERS),
      "stop": rng.choice((0, 3, 2**40)),
    }
  elif change == 4:
    value["model"] = rng.choice(
      (
        {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7},
        value["model"] | {"dropout": 0.5},
        {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"},
      )
    )
  elif change == 5:
    rng.choice(value["added_tokens"])["id"] = rng.choice((0, 1, 10**6, 2**32, -1, 1003))
  elif change == 6:
    value["truncation"] = {
      "direction": "Right",
      "max_length": rng.choice((1, 0, 3)),
      "strategy": "LongestFirst",
      "stride": 0,
    }
  else:
    value = spoil_json(rng, value)
  return value


def _spoil_header(rng: random.Random, data: bytes) -> bytes:
  (length,) = struct.unpack("<Q", data[:8])
  header = to_json(spoil_json(rng, json.loads(data[8 : 8 + length])))
  return struct.pack("<Q", rng.choice((len(header),) * 9 + (length, 2**40))) + header + data[8 + length :]


def _spoil_file(rng: random.Random, path: pathlib.Path) -> None:
  """Spoils a file by what it is, or its bytes, or puts something else in its place."""
  data, change = path.read_bytes(), rng.random()
  if change < 0.05:
    path.unlink()
    if change < 0.02:
      path.mkdir()
  elif change < 0.1:
    path.write_bytes(
      rng.choice((b"", b"[" * 10**5, b"\xef\xbb\xbf" + data, data.decode("latin-1").encode("utf-16"), b"{}", b"null"))
    )
  elif change < 0.25:
    path.write_bytes(spoil_bytes(rng, data))
  elif path.suffix == ".safetensors":
    path.write_bytes(_spoil_header(rng, data))
  elif path.name == "tokenizer.json":
    path.write_bytes(to_json(spoil_tokenizer(rng, json.loads(data))))
  else:
    try:
      value = json.loads(data)
    except ValueError:  # arrays on disk
      path.write_bytes(spoil_bytes(rng, data))
    else:
      path.write_bytes(to_json(spoil_json(rng, value)))


def spoil(rng: random.Random, directory: pathlib.Path) -> str:
  """Spoils one file of a checkpoint; returns its name. A step of jflow's own is sealed anew, as its author would."""
  files = sorted(path for path in directory.rglob("*") if path.is_file())
  kind = rng.choice(("config", "tokenizer", "any"))
  wanted = {
    "config": [path for path in files if path.suffix == ".json" and "token" not in path.name],
    "tokenizer": [path for path in files if "token" in path.name],
    "any": files,
  }
  path = rng.choice(wanted[kind])
  _spoil_file(rng, path)
  step = next((parent for parent in path.parents if parent.parent.name == "checkpoints"), None)
  if step is not None and path.name != steps.MANIFEST:
    (step / steps.MANIFEST).unlink()
    native.seal(step, {"step": int(step.name)})
  elif rng.random() < 0.05:
    shutil.copyfile(
      next(p for p in files if p.is_file()),
      directory / rng.choice(("model.safetensors", "added_tokens.json")),
    )
  return str(path.relative_to(directory))


def _grown() -> int:
  """Bytes that the process has held at most."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def open_checkpoint(directory: pathlib.Path) -> str:
  """Opens a checkpoint and reads and writes a few texts; returns what broke, "refused" or ""."""

  def stop(*_: Any) -> None:
    raise Hung

  before, held = signal.signal(signal.SIGALRM, stop), _grown()
  signal.setitimer(signal.ITIMER_REAL, SECONDS)
  try:
    model = jflow.load(directory)
    for text in TEXTS:
      model.tokenizer.decode(model.tokenizer.encode(text))
    said = ""
  except UserError as error:
    said = "refused" if "\n" not in str(error) and len(str(error)) < 2000 else f"escaped: no line: {str(error)[:500]!r}"
  except Hung:
    said = f"hung: {traceback.format_exc(limit=-3)}"
  except BaseException as error:
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
      raise
    said = f"escaped: {traceback.format_exc(limit=-6)}"
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
  if _grown() - held > MEMORY:
    return f"escaped: {(_grown() - held) / 2**20:.0f} MiB of memory"
  return said


WRITERS: dict[str, Callable[[pathlib.Path], None]] = {
  "published": write_published,
  "own": write_own,
  "janus": write_janus,
  "transformers": write_transformers,
}


def fuzz(seed: int, tries: int) -> dict[str, int]:
  """Spoils and opens; returns the counts, and among them how many of the spoiled ones opened."""
  counts = collections.Counter(tried=0, escaped=0, hung=0, lost=0, opened=0)
  with tempfile.TemporaryDirectory() as root:
    folder = pathlib.Path(root)
    for name, write in WRITERS.items():
      write(folder / name)
    for number in range(tries):
      name = list(WRITERS)[number % len(WRITERS)]
      if number % EVERY < len(WRITERS) and open_checkpoint(folder / name):
        counts["lost"] += 1
      shutil.copytree(folder / name, folder / "try")
      rng = random.Random(f"{seed}/{number}")
      spoiled = spoil(rng, folder / "try")
      said = open_checkpoint(folder / "try")
      if said.startswith("hung"):  # once more: the machine may have stood still
        said = open_checkpoint(folder / "try")
      counts["tried"] += 1
      counts["opened"] += not said
      if said and said != "refused":
        counts[said.partition(":")[0]] += 1
        print(f"seed {seed}, try {number}, {name}/{spoiled}: {said}", file=sys.stderr)
      shutil.rmtree(folder / "try")
  return dict(counts)


def main() -> int:
  """Runs the command line; exit code 1 where anything broke."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--tries", type=int, default=2000)
  args = parser.parse_args()
  counts = fuzz(args.seed, args.tries)
  print(json.dumps(counts))
  return int(any(counts[what] for what in ("escaped", "hung", "lost")))


if __name__ == "__main__":
  sys.exit(main())
