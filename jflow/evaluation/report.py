"""report.json and report.html: scores beside the paper's, with all settings needed to reproduce them."""

import datetime
import hashlib
import json
import pathlib
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

from PIL import Image

from jflow import files, outputs
from jflow.commit import commit
from jflow.errors import UserError
from jflow.evaluation.page import Shown, digits, page
from jflow.evaluation.samples import object_in
from jflow.evaluation.scores import Score

_PACKAGES = ("jax", "flax", "numpy", "pillow", "scipy")


class Result(NamedTuple):
  """The result of scoring a benchmark."""

  scores: Mapping[str, Score]
  notes: Sequence[str] = ()  # sentences that a reader of the scores needs
  pictures: Sequence[tuple[str, Image.Image]] = ()  # (title, sheet)
  files: Mapping[str, Any] = {}  # name -> JSON value: what is handed in elsewhere, each a file of its own
  shown: Sequence[Shown] = ()  # on the page alone


def write(
  directory: pathlib.Path,
  benchmark: str,
  what: str,
  result: Result,
  paper: Mapping[str, Mapping[str, float]],
  settings: Mapping[str, Any],
  goals: Mapping[str, float] = {},
) -> dict[str, Any]:
  """Writes report.json, report.html and the sheets, and returns the content of report.json.

  Args:
    directory: of the evaluation.
    benchmark: its name.
    what: one-line description of the benchmark.
    result: scores and pictures.
    paper: score -> {size or model: value}, where the paper has it.
    settings: of the predictions, the checkpoint's fingerprint among them.
    goals: score -> value to reach, where the benchmark has one.

  Raises:
    Stopped: the directory cannot be written.
  """
  scores = {}
  for name, score in result.scores.items():
    scores[name] = {key: value for key, value in score._asdict().items() if value is not None}
    if name in paper:
      scores[name]["paper"] = dict(paper[name])
    if name in goals:
      scores[name]["goal"] = goals[name]
  body = {
    "benchmark": benchmark,
    "scores": scores,
    "notes": list(result.notes),
    "settings": dict(settings),
    "commit": commit(),
    "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES},
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }
  for name, value in result.files.items():
    outputs.replace(directory / name, json.dumps(value, ensure_ascii=False) + "\n")
  for title, sheet in result.pictures:
    with outputs.new_file(directory / f"{_file_name(title)}.png") as new:
      sheet.save(new, "PNG")
  outputs.replace(directory / "report.json", json.dumps(body, indent=1, ensure_ascii=False) + "\n")
  outputs.replace(directory / "report.html", page(body, what, result.pictures, result.shown))
  return body


def scored_before(directory: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
  """The content of report.json if it has an external scorer's results for the same predictions, else None."""
  body = read(directory)
  if body is None:
    return None
  same = all(body["settings"].get(name) == value for name, value in json.loads(json.dumps(settings)).items())
  return body if body["scores"] and same else None


def read(directory: pathlib.Path) -> dict[str, Any] | None:
  """The content of a directory's report.json; None where there is none.

  Raises:
    UserError: the file is damaged.
  """
  path = directory / "report.json"
  hint = "delete it, and give the command again, with --results or --features where it had them"
  body = object_in(path, hint)
  if body is None:
    return None
  scores, settings = body.get("scores"), body.get("settings")
  whole = isinstance(scores, dict) and isinstance(settings, dict) and isinstance(body.get("notes"), list)
  if not whole or not all(isinstance(one, dict) and _is_number(one.get("value")) for one in scores.values()):
    raise UserError(f"{path} is damaged, no report: {hint}")
  return body


def table(body: Mapping[str, Any]) -> str:
  """The scores of a report as text for a terminal."""
  names = list(body["scores"])
  width = max(map(len, names), default=0)
  lines = []
  for name in names:
    score = body["scores"][name]
    cells = [f"{name:{width}}  {digits(score['value']):>9}"]
    if "low" in score:
      cells.append(f"[{digits(score['low'])}, {digits(score['high'])}]")
    if "chance" in score:
      cells.append(f"chance {digits(score['chance'])}")
    cells += [f"goal {digits(score['goal'])}"] if "goal" in score else []
    cells += [f"{label} {digits(value)}" for label, value in score.get("beside", {}).items()]
    if "paper" in score:
      cells.append("paper " + ", ".join(f"{size}: {digits(value)}" for size, value in score["paper"].items()))
    lines.append("  ".join(cells))
  return "\n".join(lines)


def fingerprint(
  directory: pathlib.Path,
  weights: str,
  vae: str | pathlib.Path | None = None,
  adapter: str | pathlib.Path | None = None,
) -> str:
  """The sha256 over a checkpoint's configuration, tokenizer, weights, choice of weights, VAE, and adapter.

  Args:
    directory: from `checkpoints.locate`, which has verified its bytes, so that the weights of a jflow checkpoint are
      not hashed again.
    weights: "ema" or "raw".
    vae: directory of the SDXL-VAE, if one is given beside the checkpoint.
    adapter: folder of an adapter, if one is.

  Raises:
    UserError: `vae` is not the directory of an AutoencoderKL.
  """
  from jflow.interop import layouts, remote
  from jflow.interop.checkpoints import workdir_of
  from jflow.interop.packed import is_packed
  from jflow.interop.steps import MANIFEST

  if layouts.found(directory) is not None or is_packed(directory):
    paths = [*directory.glob("*.json"), *directory.glob("vae/*.json"), *directory.rglob("*.safetensors")]
  else:
    workdir = workdir_of(directory)
    paths = [workdir / "config.json", *(workdir / "tokenizer").glob("*"), directory / MANIFEST]  # it holds all hashes
  total = _add(hashlib.sha256(weights.encode()), paths)
  if vae:
    weights_of_vae, config = list(pathlib.Path(vae).glob("*.safetensors")), pathlib.Path(vae) / "config.json"
    if not weights_of_vae or not config.is_file():
      raise UserError(f"--vae={vae} holds no config.json and *.safetensors: name the directory of sdxl-vae")
    total.update(f"vae {hash_of([config, *weights_of_vae])}\n".encode())
  if adapter:
    folder = remote.local(adapter)
    total.update(f"adapter {hash_of([*folder.glob('*.json'), *folder.glob('*.safetensors')])}\n".encode())
  return total.hexdigest()


def hash_of(paths: Sequence[pathlib.Path]) -> str:
  """The sha256 over the names and contents of files, in the order of their names."""
  return _add(hashlib.sha256(), paths).hexdigest()


def _add(total: Any, paths: Sequence[pathlib.Path]) -> Any:
  """Adds names and contents of files to a hash, in the order of their names, and returns it."""
  for path in sorted(paths):
    total.update(f"{path.name} {files.sha256(path)}\n".encode())
  return total


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _file_name(title: str) -> str:
  return "".join(c if c.isalnum() else "_" for c in title.lower())
