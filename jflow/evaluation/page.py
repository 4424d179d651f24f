"""report.html: a verdict and bars first, then pictures and samples, then all numbers, folded."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from jflow.pages import STYLE, Shown, data_uri, samples

_MOST_BARS = 24


def page(
  body: Mapping[str, Any], what: str, pictures: Sequence[tuple[str, Image.Image]], shown: Sequence[Shown]
) -> str:
  """The HTML page of a report, without any file beside it.

  Args:
    body: content of report.json.
    what: one-line description of the benchmark.
    pictures: (title, sheet).
    shown: tables of samples.
  """
  groups: dict[str, dict[str, Any]] = {}
  for name, score in body["scores"].items():
    group, _, label = name.rpartition(": ")
    groups.setdefault(group, {})[label] = score
  tables = "".join(_table(group, scores) for group, scores in groups.items())
  told = {**body["settings"], "commit": body["commit"], **body["versions"], "date": body["date"]}
  settings = "".join(
    f"<tr><td>{html.escape(name)}</td><td><code>{html.escape(_plain(value))}</code></td></tr>"
    for name, value in told.items()
  )
  sheets = "".join(
    f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="{data_uri(sheet)}">'
    for title, sheet in pictures
  )
  notes = "".join(f"<li>{html.escape(note)}</li>" for note in body["notes"])
  of = body["settings"].get("checkpoint")
  where = [str(of)] if of else []
  where += [body["date"].replace("T", " ").replace("+00:00", " UTC"), f"commit {body['commit'] or 'unknown'}"]
  return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>jflow: {html.escape(body["benchmark"])}{f" of {html.escape(str(of))}" if of else ""}</title><style>{STYLE}</style>
<h1>{html.escape(body["benchmark"])}</h1><p class="what">{html.escape(what)}<br>{html.escape(" · ".join(where))}</p>
<p class="verdict">{html.escape(verdict(body["scores"]))}</p>
{_bars(body["scores"])}
{sheets}{"".join(map(samples, shown))}
{f"<details><summary>All {len(body['scores'])} scores</summary>{tables}</details>" if tables else ""}
{f"<details><summary>How they are counted</summary><ul>{notes}</ul></details>" if notes else ""}
<details><summary>Settings</summary><div class="wrap"><table>{settings}</table></div></details>
</html>
"""


def verdict(scores: Mapping[str, Mapping[str, Any]]) -> str:
  """One sentence about the scores of a report: its goals, else the paper's values, else the overall score."""
  if not scores:
    return "No scores yet: the notes say what is left to do."
  if aimed := {name: score for name, score in scores.items() if "goal" in score}:
    short = {name: score["goal"] - score["value"] for name, score in aimed.items() if score["value"] < score["goal"]}
    reached = len(aimed) - len(short)
    if not short:
      return f"All {reached} goals are reached." if reached > 1 else "The goal is reached."
    worst = max(short, key=short.__getitem__)
    far = f"{worst}, {digits(aimed[worst]['value'])} of {digits(aimed[worst]['goal'])}"
    return f"{reached} of {len(aimed)} goals are reached; furthest from its goal is {far}."
  said = [
    f"{name} {digits(score['value'])}, in the paper "
    + ", ".join(f"{digits(value)} ({size})" for size, value in score["paper"].items())
    for name, score in scores.items()
    if "paper" in score
  ]
  if not said:
    said = [f"{name} {digits(scores[name]['value'])}{_interval(scores[name])}" for name in _main(scores)[:3]]
  return "; ".join(said) + "."


def digits(value: float | None) -> str:
  """A number as text: three decimals below 2 (shares), else two."""
  if value is None:
    return ""
  return f"{round(value, 3) + 0.0:.3f}" if abs(value) < 2 else f"{value:.2f}"  # + 0.0: no minus before a zero


def _main(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """The scores that are drawn: those with a goal or the paper's value, else the overall ones, else all."""
  compared = [name for name, score in scores.items() if "goal" in score or "paper" in score]
  return compared or [name for name in scores if name.endswith("overall")] or list(scores)


def _interval(score: Mapping[str, Any]) -> str:
  return f" [{digits(score['low'])}, {digits(score['high'])}]" if "low" in score else ""


def _bars(scores: Mapping[str, Mapping[str, Any]]) -> str:
  """A bar for each main score, its interval as a line and goals or the paper's values as marks."""
  rows = []
  for name in _main(scores)[:_MOST_BARS]:
    score = scores[name]
    marks = {"goal": score["goal"]} if "goal" in score else {}
    marks |= {f"paper, {size}": value for size, value in score.get("paper", {}).items()}
    most = max(score["value"], score.get("high", 0), *marks.values(), 0)
    scale = 1 if most <= 1 else 100 if most <= 100 else 1.05 * most
    at = lambda x, scale=scale: f"{100 * min(max(x, 0) / scale, 1):.2f}%"
    parts = f'<span class="fill" style="width:{at(score["value"])}"></span>'
    if "low" in score:
      left, right = max(score["low"], 0), max(score["high"], 0)
      parts += f'<span class="range" style="left:{at(left)};width:{at(right - left)}"></span>'
    for label, value in marks.items():
      title = html.escape(f"{label} {digits(value)}")
      parts += f'<span class="mark" title="{title}" style="left:{at(value)}"></span>'
    beside = "".join(f" · {html.escape(label)} {digits(value)}" for label, value in marks.items())
    text = f"<b>{digits(score['value'])}</b>{_interval(score)}{beside}"
    rows.append(f'<span>{html.escape(name)}</span><span class="track">{parts}</span><span class="n">{text}</span>')
  return f'<div class="bars">{"".join(rows)}</div>' if rows else ""


def _table(group: str, scores: Mapping[str, Mapping[str, Any]]) -> str:
  """The HTML table of one group of scores, with the columns that any of them fills."""
  sizes = list(dict.fromkeys(size for score in scores.values() for size in score.get("paper", {})))
  beside = list(dict.fromkeys(label for score in scores.values() for label in score.get("beside", {})))
  filled = [name for name in ("chance", "goal") if any(name in score for score in scores.values())]
  head = ["Score", "Value", "95 % interval", *(name.capitalize() for name in filled)]
  head += [label[0].upper() + label[1:] for label in beside] + [f"Paper, {size}" for size in sizes] + ["Samples"]
  rows = [head]
  for label, score in scores.items():
    interval = f"{digits(score['low'])} to {digits(score['high'])}" if "low" in score else ""
    cells = [html.escape(label), f"<b>{digits(score['value'])}</b>", interval]
    cells += [digits(score.get(name)) for name in filled]
    cells += [digits(score.get("beside", {}).get(name)) for name in beside]
    rows.append(cells + [digits(score.get("paper", {}).get(size)) for size in sizes] + [str(score.get("count", ""))])
  lines = []
  for tag, cells in zip(["th"] + ["td"] * len(scores), rows):
    first, *others = cells
    lines.append(f"<tr><{tag}>{first}</{tag}>" + "".join(f'<{tag} class="n">{x}</{tag}>' for x in others) + "</tr>")
  title = f"<h2>{html.escape(group[0].upper() + group[1:])}</h2>" if group else ""
  return f'{title}<div class="wrap"><table>{"".join(lines)}</table></div>'


def _plain(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
