"""Table 6 of the paper beside our scores: what each letter of the ablations gains or loses against F, there and here."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from jflow.evaluation import scores
from jflow.world import questions, scenes
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
