"""Counts and samples of prepared data sets, and the page that shows them: what is in a corpus, and what was left
out."""

import contextlib
import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jflow.data import images
from jflow.data.records import Record, RecordError
from jflow.data.store.cache import Cache
from jflow.data.store.prepared import PreparedSource, read_summary
from jflow.pages import STYLE, Shown, samples
from jflow.progress import Progress

_MOST_TEXTS = 200_000  # records whose texts are counted, from whole shards spread over the set
_MOST_PICTURES = 2_000  # records whose images are read
_BINS = 24
_SIDE = 128  # pixels of a picture on the page
_CHARACTERS = 400  # of a text on the page


class Corpus(NamedTuple):
  """The counts of one data set."""

  directory: str
  summary: Mapping[str, Any]
  words: np.ndarray  # int[n] of each record's texts
  turns: np.ndarray  # int[n]
  pictures: np.ndarray  # int[n]
  sizes: np.ndarray  # int[m, 2], width and height
  bytes: np.ndarray  # int[m] of an image as it is stored
  damaged: int  # of the records whose images were read
  shown: tuple[Record, ...]


def measured(directory: str, cache: Cache | None, count: int) -> Corpus:
  """Counts a data set; of a large one, records that are evenly spread.

  Args:
    directory: of this machine or, with a cache, of a store.
    cache: of the copies of a store's shards.
    count: of the records to show.

  Raises:
    UserError: it is no data set, or is damaged.
  """
  summary = read_summary(directory)
  source = PreparedSource(directory, summary["task"], cache)
  words, turns, pictures = [], [], []
  for shard in _spread(len(source.shard_lengths), max(1, round(_MOST_TEXTS / np.mean(source.shard_lengths)))):
    for record in source.outlines(slice(shard, shard + 1)):
      words.append(sum(len(text.split()) for text in (record.text, *(turn.text for turn in record.turns))))
      turns.append(len(record.turns))
      pictures.append(len(record.images))
  sizes, stored, damaged, shown = [], [], 0, []
  wanted = set(_spread(len(source), count))
  pictured = _spread(len(source), _MOST_PICTURES) if summary["images"] else []
  indices = sorted(wanted.union(pictured))
  with Progress(len(indices), 0, "report", delay=2) as bar:
    for index in indices:
      bar.count(1)
      try:
        record = source[index]
        sizes += [images.size(image) for image in record.images]
        stored += [len(image) for image in record.images]
        if index in wanted:
          shown.append(record)
      except RecordError:
        damaged += 1
  made = (np.array(words), np.array(turns), np.array(pictures), np.array(sizes, int).reshape(-1, 2), np.array(stored))
  return Corpus(directory, summary, *made, damaged, tuple(shown))


def _spread(total: int, count: int) -> list[int]:
  """At most `count` of the numbers below `total`, evenly spread."""
  return sorted(set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist())) if count else []


def page(corpora: Sequence[Corpus]) -> str:
  """The HTML page of a corpus, without any file beside it."""
  total = sum(one.summary["accepted"] for one in corpora)
  lost = sum(sum(one.summary[kind].values()) for one in corpora for kind in ("rejected", "filtered"))
  pictures = sum(one.summary["images"] for one in corpora)
  said = f"{total:,} records with {pictures:,} pictures in {len(corpora)} data set{'s' * (len(corpora) != 1)}"
  left = f"; {lost:,} of the {total + lost:,} that were read were left out" if lost else "; none was left out"
  return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>jflow: a corpus</title><style>{STYLE}</style>
<h1>Corpus</h1><p class="verdict">{html.escape(said + left)}.</p>
{_overview(corpora, total)}{"".join(map(_section, corpora))}
</html>
"""


def _overview(corpora: Sequence[Corpus], total: int) -> str:
  rows = []
  for one in corpora:
    share = one.summary["accepted"] / total
    bar = f'<span class="fill" style="width:{100 * share:.1f}%"></span>'
    told = f"<b>{one.summary['accepted']:,}</b> {one.summary['task']}, {share:.1%}"
    name = html.escape(one.directory)
    rows.append(f'<span>{name}</span><span class="track">{bar}</span><span class="n">{told}</span>')
  return f'<div class="bars">{"".join(rows)}</div>'


def _section(one: Corpus) -> str:
  """The HTML of one data set."""
  summary = one.summary
  facts = [
    f"task {summary['task']}",
    f"from {summary['format']} {summary['input']}",
    f"shards {len(summary['shard_lengths']):,}",
    f"{sum(summary['shard_bytes']) / 2**30:.3g} GiB",
    f"fingerprint {summary['fingerprint'][:16]}",
  ]
  listed = lambda value: " ".join(map(str, value)) if isinstance(value, list) else value
  facts += [f"{name} {listed(value)}" for name, value in summary.get("filters", {}).items()]
  read = summary["accepted"] if len(one.words) == summary["accepted"] else len(one.words)
  charts = [_chart("words of a record", one.words, True)]
  if one.turns.any():
    charts.append(_chart("turns of a record", one.turns, False))
  if one.pictures.any():
    charts += [
      _chart("pictures of a record", one.pictures, False),
      _chart("shorter side, pixels", one.sizes.min(axis=1), True),
      _chart("longer side over shorter", one.sizes.max(axis=1) / one.sizes.min(axis=1), True),
      _chart("KB of a picture", one.bytes / 1000, True),
    ]
  counted = f"texts of {read:,} records, pictures of {len(one.sizes):,}"
  counted += f"; {one.damaged:,} records could not be read" if one.damaged else ""
  title = f'<h2>{html.escape(one.directory)}</h2><p class="what">{html.escape(" · ".join(facts))}</p>'
  return f"{title}{_left_out(summary)}<p class='what'>{counted}</p>{''.join(charts)}{_shown(one)}"


def _left_out(summary: Mapping[str, Any]) -> str:
  """The HTML table of what is not in a data set, and why."""
  read = summary["accepted"] + sum(sum(summary[kind].values()) for kind in ("rejected", "filtered"))
  kinds = {
    "rejected": "cannot be used",
    "filtered": "dropped",
    "notes": "note of a record that is in",
    "left_out": "file or folder not read",
  }
  rows = []
  for kind, what in kinds.items():
    for reason, count in sorted(summary.get(kind, {}).items(), key=lambda item: -item[1]):
      share = f"{count / read:.2%}" if kind in ("rejected", "filtered") else ""
      first = summary.get("first_rejected", {}).get(reason, {}) if kind == "rejected" else {}
      example = f"{first['where']}: {first['message']}" if first else ""
      cells = [what, reason, f"{count:,}", share, example]
      rows.append(
        "".join(f'<td class="{"n" if i in (2, 3) else "s"}">{html.escape(x)}</td>' for i, x in enumerate(cells))
      )
  if not rows:
    return "<p>Every record that was read is in.</p>"
  head = "".join(f"<th>{name}</th>" for name in ("", "Why", "Records", "Share", "First"))
  return f'<div class="wrap"><table><tr>{head}</tr>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


def _chart(title: str, values: np.ndarray, logarithmic: bool) -> str:
  """A histogram as SVG, with its median and the ends of its middle 90 %."""
  if not len(values):
    return ""
  low, high = float(values.min()), float(values.max())
  if low == high:
    return f'<p><b>{title}</b> <span class="faint">{low:,.4g} of all {len(values):,}</span></p>'
  if logarithmic and high > 4 * max(low, 1):
    edges = np.geomspace(max(low, 1), high, _BINS + 1)
    counts = np.histogram(np.maximum(values, edges[0]), edges)[0]
  else:
    bins = min(_BINS, int(high - low) + 1) if np.issubdtype(values.dtype, np.integer) else _BINS
    counts, edges = np.histogram(
      values, bins, (low - 0.5, high + 0.5) if bins == high - low + 1 else (low, high + 1e-9)
    )
  width, tall = 560 / len(counts), 90
  bars = "".join(
    f'<rect x="{i * width:.1f}" y="{tall - tall * count / counts.max():.1f}" width="{max(1, width - 1):.1f}" '
    f'height="{tall * count / counts.max():.1f}"><title>{edges[i]:.4g} to {edges[i + 1]:.4g}: {count:,}</title></rect>'
    for i, count in enumerate(counts.tolist())
  )
  five, median, most = (f"{value:,.4g}" for value in np.percentile(values, (5, 50, 95)))
  told = f"median {median}, 90 % from {five} to {most}, all from {low:,.4g} to {high:,.4g}"
  return (
    f'<p><b>{title}</b> <span class="faint">{told}</span><br>'
    f'<svg width="560" height="{tall}" style="fill:var(--bar)" role="img" aria-label="{title}: {told}">{bars}</svg></p>'
  )


def _shown(one: Corpus) -> str:
  rows: list[list[str | Image.Image]] = []
  for record in one.shown:
    picture: str | Image.Image = ""
    with contextlib.suppress(RecordError):
      if record.images:
        picture = Image.fromarray(images.decode(record.images[0]))
        picture.thumbnail((_SIDE, _SIDE))
    text = "\n".join([record.text] * bool(record.text) + [f"{turn.role}: {turn.text}" for turn in record.turns])
    rows.append([record.id, picture, text[:_CHARACTERS] + "…" * (len(text) > _CHARACTERS)])
  return samples(Shown("Records", ("Id", "Picture", "Text"), rows)) if rows else ""
