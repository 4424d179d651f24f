"""The report of launch/experiments/ablations.py: results.json, table.md, losses.png and pictures.png."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ablation_table import WHAT, compare, table
from matplotlib.figure import Figure
from PIL import Image

from jflow import outputs
from jflow.commit import commit
from jflow.config import RunConfig
from jflow.data.pipeline import Pipeline
from jflow.data.tokenizer import Tokenizer
from jflow.evaluation import benchmarks
from jflow.inference.sheet import contact_sheet
from jflow.interop.native import read_config
from jflow.models.config import ModelConfig
from jflow.training import setup
from jflow.training.metrics import read_metrics
from jflow.world import benchmark, judge, references
from jflow.world import source as world

LOSSES = ("flow", "text", "alignment")
SHEET = 12  # prompts


def write(
  folder: pathlib.Path, reports: Mapping[str, Mapping[int, pathlib.Path]], ends: Mapping[str, int], command: str
) -> None:
  """Writes the four files; losses and pictures are of the first training of each letter.

  Args:
    folder: holds a workdir seedN/LETTER for each training.
    reports: letter -> seed -> folder of its evaluation, for those that have one.
    ends: letter -> steps of its budget, for all.
    command: that made the scores.
  """
  letters, first, runs = {}, {}, {}
  for letter, end in ends.items():
    entries = {
      seed: _entry(folder / f"seed{seed}" / letter, path, end) for seed, path in reports.get(letter, {}).items()
    }
    letters[letter] = merged(entries) if entries else None
    if entries:
      seed = next(iter(letters[letter]["trainings"]))
      first[letter] = reports[letter][seed]
      rows = read_metrics(folder / f"seed{seed}" / letter)
      runs[letter] = [row for row in rows if row["step"] <= letters[letter]["steps"]]
  body = {"command": command, "commit": commit(), "letters": letters, "comparisons": compare(letters)}
  told = {
    letter: entry and {key: x for key, x in entry.items() if key != "groups"} for letter, entry in letters.items()
  }
  outputs.replace(folder / "results.json", compact(body | {"letters": told}))
  outputs.replace(folder / "table.md", table(body))
  losses(runs).savefig(folder / "losses.png", dpi=110)
  sheet = pictures(first)
  if sheet:
    sheet.save(folder / "pictures.png", optimize=True)
  print((folder / "table.md").read_text(encoding="utf-8"))
  print(f"results: {folder}/results.json, table.md, losses.png, pictures.png")


def merged(entries: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
  """What several trainings of one letter have in common: means of scores, of the ends of intervals and of losses.

  Args:
    entries: seed -> what `_entry` returns. Those with fewer steps than the longest are left out.

  Returns:
    An entry with "trainings": seed -> commit and fingerprint. A score's "each" are its values one by one; its "count"
    is that of one training, as its interval is. A score that a training lacks is left out.
  """
  steps = max(entry["steps"] for entry in entries.values())
  kept = {seed: entry for seed, entry in entries.items() if entry["steps"] == steps}
  every = list(kept.values())
  whole = {key: value for key, value in every[0].items() if key not in ("commit", "settings")}
  told = lambda entry: {"commit": entry.get("commit"), **entry.get("settings", {})}
  whole["trainings"] = {seed: told(entry) for seed, entry in kept.items()}
  mean = lambda dicts, name: float(np.mean([one[name] for one in dicts]))
  common = lambda dicts: [name for name in dicts[0] if all(name in one for one in dicts)]
  every_score = [entry["scores"] for entry in every]
  whole["scores"] = {}
  for name in common(every_score):
    parts = [scores[name] for scores in every_score]
    means = {key: mean(parts, key) for key in ("value", "low", "high", "chance") if key in common(parts)}
    whole["scores"][name] = {**parts[0], **means, "each": [part["value"] for part in parts]}
  groups = [entry["groups"] for entry in every]
  same = [x for x in common(groups) if len({tuple((k, len(v)) for k, v in one[x].items()) for one in groups}) == 1]
  whole["groups"] = {x: {k: np.mean([one[x][k] for one in groups], 0) for k in groups[0][x]} for x in same}
  if (kind := "losses_of_the_last_twentieth") in whole:
    losses_of = [entry[kind] for entry in every]
    whole[kind] = {name: mean(losses_of, name) for name in common(losses_of)}
  return whole


def fingerprint_of(output: pathlib.Path) -> str | None:
  """The fingerprint of the checkpoint of a folder's report; None without a report."""
  path = output / "report.json"
  return json.loads(path.read_text(encoding="utf-8"))["settings"]["fingerprint"] if path.exists() else None


def _entry(workdir: pathlib.Path, output: pathlib.Path, budget: int) -> dict[str, Any]:
  body = json.loads((output / "report.json").read_text(encoding="utf-8"))
  rows = read_metrics(workdir)
  steps = int(output.name.split("-")[1])
  rows = [row for row in rows if row["step"] <= steps]
  last = rows[-max(1, len(rows) // 20) :]
  kept = ("fingerprint", "guidance", "steps", "pictures", "limit", "seed", "only")
  return {
    "steps": steps,
    "budget": budget,
    "pictures": pictures_seen(workdir, steps),
    "losses_of_the_last_twentieth": {
      name: float(np.mean(values))
      for name in LOSSES
      if (values := [row[f"loss_{name}"] for row in last if row.get(f"loss_{name}") is not None])
    },
    "commit": body["commit"],
    "settings": {name: body["settings"][name] for name in kept if body["settings"].get(name) is not None},
    "scores": body["scores"],
    "groups": judged(output, body),
  }


def judged(output: pathlib.Path, report: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
  """Score -> kind -> the share that is right of each prompt, or of each group of questions, as `compare` pairs them.

  Of what was painted and answered for the overall scores; all letters have the same prompts, noise and questions, which
  the benchmark draws with seed 0.
  """
  scope, out = benchmarks.get(report["benchmark"]).scope, {}
  lines = (json.loads(line) for line in (output / "records.jsonl").read_text(encoding="utf-8").splitlines())
  said = {line["key"]: line["answer"] for line in lines if line["key"].startswith("ask/")}
  for split, name in benchmark.SPLITS.items():
    groups: dict[str, dict[int, list[bool]]] = {}
    for number, about, file in benchmark.painted(output, split, scope):
      right = judge.strict(judge.detect(benchmark.judged_picture(file)), about)
      groups.setdefault(about["tag"], {}).setdefault(number, []).append(right)
    if groups:
      out[f"{name} pictures: overall"] = _means(groups)
    answers, groups = [text for key, text in sorted(said.items()) if key.startswith(f"ask/{split}/")], {}
    if answers:
      asked = benchmark.grouped(references.asked_of(scope, split, len(answers), 0))
      for (number, (_, question)), answer in zip(asked, answers, strict=True):
        groups.setdefault(question.kind, {}).setdefault(number, []).append(benchmark.right(question, answer))
      out[f"{name} questions: overall"] = _means(groups)
  return out


def _means(groups: Mapping[str, Mapping[int, Sequence[bool]]]) -> dict[str, np.ndarray]:
  return {kind: np.array([np.mean(group) for group in one.values()]) for kind, one in groups.items()}


def pictures_seen(workdir: pathlib.Path, steps: int) -> dict[str, int]:
  """The number of pictures read and generated in a run's first steps, with repetitions."""
  config = RunConfig.from_dict(read_config(workdir), ModelConfig.from_dict)
  tokenizer, shape = Tokenizer.load(str(workdir / "tokenizer")), setup.row_shape(config, config.model)
  pipeline = Pipeline(config.data, tokenizer, shape, config.train.batch_size, config.train.seed)
  seen = {"read": 0, "painted": 0}
  names = {"understanding": "read", "generation": "painted"}  # of the built-in world's records each has one picture
  for step in range(steps):
    for task, _, pieces in pipeline.pieces(step):
      if task in names:
        seen[names[task]] += len(pieces)
  return seen


def losses(runs: Mapping[str, list[dict[str, Any]]]) -> Figure:
  """A figure with a panel per loss, a line per letter, each point the mean of about a fiftieth of the run."""
  fig = Figure(figsize=(4.4 * len(LOSSES), 3.4), layout="constrained")
  for panel, name in zip(fig.subplots(1, len(LOSSES)), LOSSES):
    for letter, rows in runs.items():
      points = [(row["step"], row[f"loss_{name}"]) for row in rows if row.get(f"loss_{name}") is not None]
      if not points:
        continue
      width = max(1, len(points) // 50)
      points = np.array(points[: len(points) // width * width]).reshape(-1, width, 2).mean(1)
      if np.ptp(points[:, 1]) == 0:  # a loss without weight
        continue
      panel.plot(*points.T, color=f"C{list(WHAT).index(letter)}", label=f"{letter}: {WHAT[letter]}", linewidth=1.2)
    panel.set(xlabel="step", title=f"{name} loss")
    panel.grid(alpha=0.3)
  handles = {h.get_label(): h for panel in fig.axes for h in panel.get_legend_handles_labels()[0]}
  if handles:
    fig.axes[0].legend(handles.values(), handles.keys(), frameon=False, fontsize=7)
  return fig


def pictures(reports: Mapping[str, pathlib.Path]) -> Image.Image | None:
  """A sheet with a row per letter that generates, the same prompt and noise in a column; None if no letter does."""
  named = {json.loads((output / "report.json").read_text(encoding="utf-8"))["benchmark"] for output in reports.values()}
  if not named:
    return None
  prompts = [text for text, _ in world.evaluation_prompts("val", SHEET, 0, benchmarks.get(named.pop()).scope.prompts)]
  files = {
    letter: [output / f"pictures/val/{i:04d}_0.png" for i in range(SHEET)]
    for letter, output in reports.items()
    if letter != "D"
  }
  count = min((sum(path.exists() for path in row) for row in files.values()), default=0)
  images, captions = [], []
  for letter, row in files.items():
    images += [Image.open(path).convert("RGB") for path in row[:count]]
    captions += [f"{letter}: {text.removeprefix('a picture of ')}" for text in prompts[:count]]
  return contact_sheet(images, captions, count, side=96, lines=3) if images else None


def compact(body: Mapping[str, Any]) -> str:
  """JSON with a line per innermost object, to be read and compared easily."""
  text = json.dumps(_rounded(body), indent=1, ensure_ascii=False)
  return re.sub(r"\{[^{}]*\}", lambda inner: " ".join(inner[0].split()), text) + "\n"


def _rounded(value: Any) -> Any:
  if isinstance(value, float):
    return round(value, 4)
  if isinstance(value, Mapping):
    return {key: _rounded(one) for key, one in value.items()}
  return [_rounded(one) for one in value] if isinstance(value, list) else value
