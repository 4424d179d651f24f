"""report.json and report.html: scores beside the paper's, with all settings needed to reproduce them."""

import base64
import datetime
import hashlib
import html
import io
import json
import pathlib
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

from PIL import Image

from jflow import outputs
from jflow.commit import commit
from jflow.errors import UserError
from jflow.evaluation.samples import object_in
from jflow.evaluation.scores import Score

_PACKAGES = ("jax", "flax", "numpy", "pillow", "scipy")
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #888; --bar: #3b7dd8; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.what, .faint, footer { color: var(--faint); }
table { border-collapse: collapse; width: 100%; } th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
th { text-align: left; font-weight: 600; } td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
img { max-width: 100%; border: 1px solid var(--line); } code { font-size: .9em; overflow-wrap: anywhere; }
li { white-space: pre-wrap; overflow-wrap: anywhere; } td:first-child { white-space: nowrap; } td.s { white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; } .wrap { overflow-x: auto; }
"""


class Shown(NamedTuple):
  """A table of samples on the page, as of answers beside the truth."""

  title: str
  heads: Sequence[str]
  rows: Sequence[Sequence[str | Image.Image]]


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
) -> dict[str, Any]:
  """Writes report.json, report.html and the sheets, and returns the content of report.json.

  Args:
    directory: of the evaluation.
    benchmark: its name.
    what: one-line description of the benchmark.
    result: scores and pictures.
    paper: score -> {size or model: value}, where the paper has it.
    settings: of the predictions, the checkpoint's fingerprint among them.

  Raises:
    Stopped: the directory cannot be written.
  """
  scores = {}
  for name, score in result.scores.items():
    scores[name] = {key: value for key, value in score._asdict().items() if value is not None}
    if name in paper:
      scores[name]["paper"] = dict(paper[name])
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
  outputs.replace(directory / "report.html", _page(body, what, result.pictures, result.shown))
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
    cells = [f"{name:{width}}  {_digits(score['value']):>9}"]
    if "low" in score:
      cells.append(f"[{_digits(score['low'])}, {_digits(score['high'])}]")
    if "chance" in score:
      cells.append(f"chance {_digits(score['chance'])}")
    cells += [f"{label} {_digits(value)}" for label, value in score.get("beside", {}).items()]
    if "paper" in score:
      cells.append("paper " + ", ".join(f"{size}: {_digits(value)}" for size, value in score["paper"].items()))
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
    files = [*directory.glob("*.json"), *directory.glob("vae/*.json"), *directory.rglob("*.safetensors")]
  else:
    workdir = workdir_of(directory)
    files = [workdir / "config.json", *(workdir / "tokenizer").glob("*"), directory / MANIFEST]  # it holds all hashes
  total = _add(hashlib.sha256(weights.encode()), files)
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
    with open(path, "rb") as file:
      total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
  return total


def _page(
  body: Mapping[str, Any], what: str, pictures: Sequence[tuple[str, Image.Image]], shown: Sequence[Shown]
) -> str:
  groups: dict[str, dict[str, Any]] = {}
  for name, score in body["scores"].items():
    group, _, label = name.rpartition(": ")
    groups.setdefault(group, {})[label] = score
  tables = "".join(_table(group, scores) for group, scores in groups.items())
  settings = "".join(
    f"<tr><td>{html.escape(name)}</td><td><code>{html.escape(_plain(value))}</code></td></tr>"
    for name, value in {
      **body["settings"],
      "commit": body["commit"],
      **body["versions"],
      "date": body["date"],
    }.items()
  )
  sheets = "".join(
    f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="{_data_uri(sheet)}">'
    for title, sheet in pictures
  )
  notes = "".join(f"<li>{html.escape(note)}</li>" for note in body["notes"])
  return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>jflow: {html.escape(body["benchmark"])}</title><style>{_STYLE}</style>
<h1>{html.escape(body["benchmark"])}</h1><p class="what">{html.escape(what)}</p>
{tables}
{f"<h2>Notes</h2><ul>{notes}</ul>" if notes else ""}{"".join(map(_samples, shown))}{sheets}
<h2>Settings</h2><div class="wrap"><table>{settings}</table></div>
</html>
"""


def _samples(shown: Shown) -> str:
  """The HTML table of samples."""
  cell = lambda x: f'<img alt="" src="{_data_uri(x)}">' if isinstance(x, Image.Image) else html.escape(x)
  row = lambda cells: "<tr>" + "".join(f'<td class="s">{cell(x)}</td>' for x in cells) + "</tr>"
  head = "<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in shown.heads) + "</tr>"
  return (
    f'<h2>{html.escape(shown.title)}</h2><div class="wrap"><table>{head}{"".join(map(row, shown.rows))}</table></div>'
  )


def _table(group: str, scores: Mapping[str, Mapping[str, Any]]) -> str:
  """The HTML table of one group of scores, with the columns that any of them fills."""
  sizes = list(dict.fromkeys(size for score in scores.values() for size in score.get("paper", {})))
  beside = list(dict.fromkeys(label for score in scores.values() for label in score.get("beside", {})))
  chance = any("chance" in score for score in scores.values())
  head = ["Score", "Value", "95 % interval", *(["Chance"] if chance else [])]
  head += [label[0].upper() + label[1:] for label in beside] + [f"Paper, {size}" for size in sizes] + ["Samples"]
  rows = [head]
  for label, score in scores.items():
    interval = f"{_digits(score['low'])} to {_digits(score['high'])}" if "low" in score else ""
    cells = [html.escape(label), f"<b>{_digits(score['value'])}</b>", interval]
    cells += [_digits(score.get("chance"))] if chance else []
    cells += [_digits(score.get("beside", {}).get(name)) for name in beside]
    rows.append(cells + [_digits(score.get("paper", {}).get(size)) for size in sizes] + [str(score.get("count", ""))])
  lines = []
  for tag, cells in zip(["th"] + ["td"] * len(scores), rows):
    first, *others = cells
    lines.append(f"<tr><{tag}>{first}</{tag}>" + "".join(f'<{tag} class="n">{x}</{tag}>' for x in others) + "</tr>")
  title = f"<h2>{html.escape(group[0].upper() + group[1:])}</h2>" if group else ""
  return f'{title}<div class="wrap"><table>{"".join(lines)}</table></div>'


def _digits(value: float | None) -> str:
  """A number as text: three decimals below 2 (shares), else two."""
  if value is None:
    return ""
  return f"{round(value, 3) + 0.0:.3f}" if abs(value) < 2 else f"{value:.2f}"  # + 0.0: no minus before a zero


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _file_name(title: str) -> str:
  return "".join(c if c.isalnum() else "_" for c in title.lower())


def _data_uri(image: Image.Image) -> str:
  buffer = io.BytesIO()
  image.save(buffer, "PNG", optimize=True)
  return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
