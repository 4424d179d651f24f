"""The report of launch/experiments/ablations.py: results.json, table.md, losses.png and pictures.png."""

import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from jflow import outputs
from jflow.commit import commit
from jflow.config import RunConfig
from jflow.data.pipeline import Pipeline
from jflow.data.tokenizer import Tokenizer
from jflow.evaluation import benchmarks, scores
from jflow.inference.sheet import contact_sheet
from jflow.interop.native import read_config
from jflow.models.config import ModelConfig
from jflow.training import setup
from jflow.training.metrics import read_metrics
from jflow.world import benchmark, judge, questions, references, scenes
from jflow.world import source as world
from jflow.world.references import BLIND, FREQUENT, NEAREST

WHAT = {
  "A": "no alignment",
  "B": "one latent encoder for both",
  "C": "a latent encoder each",
  "D": "reads only",
  "E": "paints only",
  "F": "final",
}
PAPER = {  # table 6 of the paper: 256 x 256, F 50,000 steps
  "POPE": {"A": 82.40, "B": 78.13, "C": 75.30, "D": 85.03, "F": 84.73},
  "VQAv2 val": {"A": 69.62, "B": 53.94, "C": 55.41, "D": 69.10, "F": 69.20},
  "GQA": {"A": 54.43, "B": 44.04, "C": 44.44, "D": 54.23, "F": 54.83},
  "FID": {"A": 19.84, "B": 18.05, "C": 17.53, "E": 16.69, "F": 17.61},
  "CLIP": {"A": 24.94, "B": 26.38, "C": 26.32, "E": 26.89, "F": 26.40},
}


class Row(NamedTuple):
  """A score of the paper and its counterpart here."""

  paper: str
  score: str  # of the benchmark, behind the split
  low_is_good: bool = False


ROWS = (
  Row("POPE", "questions: existence, F1"),
  Row("VQAv2 val", "questions: overall"),
  Row("GQA", "questions: relation"),
  Row("FID", "pictures: FD-tex", True),
  Row("FID", "pictures: FD-state", True),
  Row("CLIP", "pictures: overall"),
)
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
      right = judge.strict(judge.detect(benchmark.read_picture(file)), about)
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


def compare(letters: Mapping[str, Mapping[str, Any] | None]) -> list[dict[str, Any]]:
  """Comparisons of each letter with F on each score of both: the improvement over F, in the paper and here.

  "agrees" is null where 0 is within the 95 % interval of our difference, where the paper has no number, and for an F1
  where neither answers more questions than chance, so that it only measures how often they say yes. The intervals are
  over pictures and questions (of overall scores by pairs of equal prompts, of others as if those were drawn anew for
  each letter) and, where letters were trained more than once, over trainings too: half their widths are the root of the
  sum of squares of both, somewhat too wide, since noise counts in both.
  """
  out = []
  for split in ("seen", "held-out"):
    for row in ROWS:
      name = f"{split} {row.score}"
      for letter in letters:
        ours = [(letters[x] or {}).get("scores", {}).get(name) for x in (letter, "F")]
        if letter == "F" or None in ours or any("low" not in x for x in ours):  # of too few samples
          continue
        theirs = [PAPER[row.paper].get(x) for x in (letter, "F")]
        sign = -1 if row.low_is_good else 1
        difference, low, high = _difference(*ours, sign)
        pairs = [(letters[x] or {}).get("groups", {}).get(name, {}) for x in (letter, "F")]
        if (near := _of_pairs(*pairs)) is not None:
          low, high = difference - near, difference + near
        half = _of_trainings(*ours)
        low, high = difference - math.hypot(difference - low, half), difference + math.hypot(high - difference, half)
        paper = None if None in theirs else round(sign * (theirs[0] - theirs[1]), 2)
        plain = [(letters[x] or {}).get("scores", {}).get(name.removesuffix(", F1"), {}) for x in (letter, "F")]
        learned = not name.endswith(", F1") or any(one.get("low", 0) > 0.5 for one in plain)
        sure = (low > 0 or high < 0) and learned
        out.append(
          {
            "letter": letter,
            "score": name,
            "better_by": difference,
            "low": low,
            "high": high,
            "paper_score": row.paper,
            "paper_better_by": paper,
            "agrees": (difference > 0) == (paper > 0) if sure and paper is not None else None,
          }
        )
  return out


def _of_pairs(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float | None:
  """Half of the 95 % interval of the difference of two overall scores, the mean over kinds, by pairs of equal prompts.

  None where the two have not the same prompts, or too few to tell.
  """
  if not a or a.keys() != b.keys() or any(len(a[kind]) != len(b[kind]) or len(a[kind]) < 2 for kind in a):
    return None
  variance = sum(np.var(a[kind] - b[kind], ddof=1) / len(a[kind]) for kind in a)
  return scores.CONFIDENCE_Z * math.sqrt(variance) / len(a) if variance else None


def _of_trainings(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
  """Half of the 95 % interval of the difference of two letters' means that is due to trainings.

  By Student's t, the variance pooled over the two, not over all letters: those that answer by chance vary most. 0 where
  neither was trained twice.
  """
  each = [np.asarray(one.get("each", (one["value"],))) for one in (a, b)]
  freedom = sum(len(x) - 1 for x in each)
  if not freedom:
    return 0.0
  variance = sum(float(np.square(x - x.mean()).sum()) for x in each) / freedom
  return float(stats.t.ppf(0.975, freedom)) * math.sqrt(variance * sum(1 / len(x) for x in each))


def _difference(a: Mapping[str, float], b: Mapping[str, float], sign: int) -> tuple[float, float, float]:
  """(difference, low, high) of two independent scores, from their intervals (Newcombe's method)."""
  difference = a["value"] - b["value"]
  below = math.hypot(a["value"] - a["low"], b["high"] - b["value"])
  above = math.hypot(a["high"] - a["value"], b["value"] - b["low"])
  low, high = difference - below, difference + above
  return (difference, low, high) if sign > 0 else (-difference, -high, -low)


def table(body: Mapping[str, Any]) -> str:
  """Markdown of the scores beside the paper's table 6, and of each letter against F."""
  letters, names = body["letters"], list(body["letters"])
  head = ["", *(f"{x}: {WHAT[x]}" for x in names)]
  lines = [head, ["---"] + ["---:"] * len(names)]

  def cell(letter: str, get: Any) -> str:
    return "" if letters[letter] is None else get(letters[letter])

  lines.append(["steps", *(cell(x, lambda e: _of(e["steps"], e["budget"])) for x in names)])
  lines.append(
    [
      "pictures read / painted",
      *(cell(x, lambda e: f"{e['pictures']['read']:,} / {e['pictures']['painted']:,}") for x in names),
    ]
  )
  scored = {name for entry in letters.values() if entry for name in entry["scores"]}
  rows = [row for row in ROWS if not scored or any(name.endswith(f" {row.score}") for name in scored)]
  for before, row in zip((None, *rows), rows):
    if before is None or row.paper != before.paper:
      lines.append([f"paper: {row.paper}", *(_number(PAPER[row.paper].get(x)) for x in names)])
    for split in ("seen", "held-out"):
      lines.append([f"{split} {row.score}", *(_with_base(letters[x], f"{split} {row.score}") for x in names)])
  for name in _rest(letters):
    lines.append([name, *(_with_base(letters[x], name) for x in names)])
  missing = [f"{x} ({WHAT[x]})" for x in names if letters[x] is None]
  marks = {True: "agrees", False: "differs", None: "undecided"}
  against = [["against F", "score", "paper", "here", "95 % interval", ""], ["---", "---", "---:", "---:", "---", "---"]]
  for one in body["comparisons"]:
    against.append(
      [
        one["letter"],
        f"{one['paper_score']} / {one['score']}",
        "" if one["paper_better_by"] is None else f"{one['paper_better_by']:+.2f}",
        f"{one['better_by']:+.3f}",
        f"{one['low']:+.3f} to {one['high']:+.3f}",
        "" if one["paper_better_by"] is None else marks[one["agrees"]],
      ]
    )
  join = lambda rows: "\n".join("| " + " | ".join(row) + " |" for row in rows)
  text = f"`{body['command']}`, commit {str(body['commit'])[:12]}.\n\n"
  text += f"Not trained yet: {', '.join(missing)}.\n\n" if missing else ""
  text += "In brackets: the best of three simple answers, the most frequent one, that to the question alone and that "
  text += "for the nearest picture of training (questions), pictures for other prompts (pictures), other "
  text += f"renders (distances).\n\n{join(lines)}\n\n"
  trainings = {len(entry.get("trainings", (0,))) for entry in letters.values() if entry}
  many = " or ".join(map(str, sorted(trainings)))
  leaves = "leaves out" if trainings <= {1} else f"includes, by {many} trainings of a letter,"
  text += "Above 0 the letter is better than F (a distance that is less counts as better). Undecided: 0 is within the "
  text += (
    f"interval, which {leaves} how much trainings of one letter differ; or an F1 of two that answer by chance.\n\n"
  )
  text += f"{join(against)}\n"
  return text


def _rest(letters: Mapping[str, Any]) -> list[str]:
  """Lines of the categories and kinds of questions that the comparison leaves out."""
  names = dict.fromkeys(name for entry in letters.values() if entry for name in entry["scores"])
  taken = {f"{split} {row.score}" for split in ("seen", "held-out") for row in ROWS}
  return [
    name
    for name in names
    if name not in taken and name.split(": ")[-1].split(" (")[0] in (*scenes.TAGS, *questions.KINDS, "overall")
  ]


def _of(steps: int, budget: int) -> str:
  return f"{steps:,}" if steps >= budget else f"{steps:,} of {budget:,}"


def _number(value: float | None) -> str:
  return "" if value is None else f"{value:.2f}"


def _with_base(entry: Mapping[str, Any] | None, name: str) -> str:
  """A score and, in brackets, its baseline: the best of three simple answers, other pictures, or a distance's floor."""
  scores = entry["scores"] if entry else {}
  if name not in scores:
    return ""
  value = scores[name]["value"]
  simple = max((scores[name].get("beside", {}).get(x) for x in (FREQUENT, BLIND, NEAREST)), key=lambda v: v or 0)
  base = scores[name].get("chance", scores.get(f"{name}, floor", {}).get("value", simple))
  text = f"{value:.3f}" if value < 10 else f"{value:.1f}"
  return text if base is None else f"{text} ({base:.2f})"


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
