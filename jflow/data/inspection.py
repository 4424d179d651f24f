"""A picture of packed rows, and of the fill of each type's rows.

Each row is a band of its slots, one colour per sample, and a card per sample: its text with the images in place, and
text that carries loss on yellow. Below, a histogram of fill and of lengths for each source.
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from jflow.batch import NONE, READ, WRITE, Batch, RowShape
from jflow.data.packing import Plan
from jflow.data.tokenizer import Tokenizer
from jflow.generation.base import FAMILIES

WIDTH = 1680
_MARGIN, _GAP, _LINE, PICTURE = 44, 14, 21, 120
_LINES = 11  # of a card, pictures not counted
_COLUMNS = 3
_CARDS = 12  # of a row; the band shows all
_PAPER, _CARD, _INK, _GREY, _RULE = "#f4f2ed", "#ffffff", "#1d1d1f", "#77757a", "#d9d6cf"
_LEARNED, _LOSS, _PADDING = "#ffe28a", "#d8791b", "#e4e1da"
_SAMPLES = ("#8fb8de", "#9dcca3", "#e3a7a1", "#c3b1e1", "#e6c48b", "#8fd0cb", "#d9a7c7", "#b8c48a")


class Row(NamedTuple):
  """A packed row and its source."""

  task: str
  source: str
  arrays: Batch  # without the leading axis


class Histograms(NamedTuple):
  """The fill and lengths of a source's plan."""

  task: str
  source: str
  fill: np.ndarray  # f64[rows]; share of each row's slots that are not padding
  lengths: np.ndarray  # int64[pieces]; tokens of the samples, of documents' pieces where they are cut


_COUNTED = 2**20  # rows of a histogram


class _Run(NamedTuple):
  """A part of a sample: text, or an image where `slot` is not None."""

  text: str
  learned: bool
  slot: int | None


def histograms(task: str, source: str, plan: Plan, row_tokens: int) -> Histograms:
  """Counts the fill and the lengths of a plan's rows, of more than `_COUNTED` evenly chosen ones."""
  rows = np.arange(0, plan.rows, -(-plan.rows // _COUNTED) or 1)
  begins, counts = plan.row_offsets[rows], plan.row_offsets[rows + 1] - plan.row_offsets[rows]
  firsts = np.cumsum(counts) - counts
  pieces = np.repeat(begins - firsts, counts) + np.arange(counts.sum())
  lengths = plan.stops[pieces].astype(np.int64) - plan.starts[pieces] + (plan.starts[pieces] > 0)
  totals = np.add.reduceat(lengths, firsts)
  return Histograms(task, source, totals / row_tokens, lengths)


def draw(
  rows: Sequence[Row], counted: Sequence[Histograms], shape: RowShape, tokenizer: Tokenizer, title: str
) -> Image.Image:
  """Draws the picture.

  Args:
    rows: to show.
    counted: one per source.
    shape: the row's budgets.
    tokenizer: turns the ids back into text.
    title: first line.
  """
  sheet = _Sheet()
  sheet.head(title, shape)
  for number, row in enumerate(rows, start=1):
    sheet.row(number, row, shape, tokenizer)
  sheet.charts(counted)
  return sheet.finish()


def is_dropped(arrays: Batch, segment: int, pad: int) -> bool:
  """Whether a sample writes an image without its prompt, which leaves a gap of positions, or pads after BOS."""
  where = np.flatnonzero(arrays.segment_ids == segment)
  writes = np.any(arrays.segment_ids[arrays.image_start[arrays.image_kind == WRITE]] == segment)
  gap = np.any(np.diff(arrays.positions[where]) != 1)
  return bool(writes and (gap or arrays.tokens[where[1]] == pad))


class _Sheet:
  """A canvas that grows from top to bottom and is cut to length at the end."""

  def __init__(self) -> None:
    self._paper = Image.new("RGB", (WIDTH, 2000), _PAPER)
    self._pen = ImageDraw.Draw(self._paper)
    self._y = _MARGIN
    regular, bold = (_font_file(name) for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"))
    self._text, self._small = ImageFont.truetype(regular, 15), ImageFont.truetype(regular, 13)
    self._bold, self._title = ImageFont.truetype(bold, 16), ImageFont.truetype(bold, 27)

  def head(self, title: str, shape: RowShape) -> None:
    self._room(120)
    self._pen.text((_MARGIN, self._y), title, _INK, self._title)
    self._y += 42
    says = (
      f"rows of {shape.tokens:,} tokens and {shape.images} images of {shape.image_size} x {shape.image_size} pixels"
    )
    self._pen.text((_MARGIN, self._y), says, _GREY, self._text)
    x = WIDTH - _MARGIN
    for colour, name in reversed(
      (
        (_LEARNED, "text to learn"),
        (_LOSS, "positions with loss: next token, or image"),
        (_PADDING, "padding"),
      )
    ):
      x -= int(self._text.getlength(name)) + 46
      self._pen.rounded_rectangle((x, self._y + 1, x + 18, self._y + 17), 4, colour)
      self._pen.text((x + 25, self._y), name, _INK, self._text)
    self._y += 40

  def row(self, number: int, row: Row, shape: RowShape, tokenizer: Tokenizer) -> None:
    arrays = row.arrays
    used, samples = int((arrays.segment_ids > 0).sum()), int(arrays.segment_ids.max())
    pictures, written = (int(found.sum()) for found in (arrays.image_kind != NONE, arrays.image_kind == WRITE))
    learned = f"{written} pictures to write" if written else f"{int(arrays.loss_mask.sum()):,} tokens to learn"
    self._room(110)
    self._pen.text((_MARGIN, self._y), f"{number}  {row.task}", _INK, self._bold)
    says = (
      f"{_short(row.source)}   ·   {samples} sample{'s' * (samples != 1)}   ·   {used:,} of {shape.tokens:,} tokens, {used / shape.tokens:.1%}"
      f"   ·   {pictures} of {shape.images} images   ·   {learned}"
    )
    self._pen.text((_MARGIN + 190, self._y + 2), says, _GREY, self._text)
    self._y += 30
    self._band(arrays, shape)
    self._y += 50
    shown = min(samples, _CARDS)
    cards = [runs_of(arrays, segment, tokenizer, shape.image_slots) for segment in range(1, shown + 1)]
    for first in range(0, shown, _COLUMNS):
      self._cards(first, cards[first : first + _COLUMNS], arrays, tokenizer.pad)
    if samples > shown:
      self._room(60)
      self._pen.text((_MARGIN, self._y), f"... and {samples - shown} samples more", _GREY, self._text)
      self._y += 24
    self._y += 26

  def _band(self, arrays: Batch, shape: RowShape) -> None:
    """Draws the slots of a row, those of images darker, and below them the positions that carry a loss."""
    span, top = WIDTH - 2 * _MARGIN, self._y
    at = lambda position: _MARGIN + position * span / shape.tokens
    self._pen.rectangle((_MARGIN, top, _MARGIN + span, top + 28), _PADDING)
    for segment in range(1, int(arrays.segment_ids.max()) + 1):
      where = np.flatnonzero(arrays.segment_ids == segment)
      box = (at(where[0]), top, at(where[-1] + 1) - 1, top + 28)
      self._pen.rectangle(box, _SAMPLES[(segment - 1) % len(_SAMPLES)])
    loss, first = arrays.loss_mask.copy(), FAMILIES.get(shape.writer).layout.loss_from
    for slot in np.flatnonzero(arrays.image_kind != NONE):
      start = int(arrays.image_start[slot])
      left, right = at(start), at(start + shape.slots_of(int(arrays.image_kind[slot])))
      edge = min(24, int(right - left) - 2)
      colour = _SAMPLES[(int(arrays.segment_ids[start]) - 1) % len(_SAMPLES)]
      self._pen.rectangle((left, top, right - 1, top + 28), _darker(colour))
      if edge > 6:
        small = Image.fromarray(arrays.images[slot]).resize((edge, edge))
        self._paper.paste(small, (int(left + (right - left - edge) / 2), top + 14 - edge // 2))
      carried = slice(start + first, start + first + shape.patches_of("generation"))
      loss[carried] |= arrays.image_kind[slot] == WRITE
    begins = np.flatnonzero(np.diff(np.concatenate([[0], loss.astype(np.int8), [0]])))
    for begin, end in zip(begins[::2], begins[1::2]):
      self._pen.rectangle((at(begin), top + 31, max(at(end) - 1, at(begin) + 1), top + 36), _LOSS)

  def _cards(self, first: int, cards: Sequence[list[_Run]], arrays: Batch, pad: int) -> None:
    """Draws a line of cards, all as high as the highest."""
    width = (WIDTH - 2 * _MARGIN - (_COLUMNS - 1) * _GAP) // _COLUMNS
    laid = [self._lay(runs, width - 28) for runs in cards]
    height = 46 + max(end for _, end in laid)
    self._room(height + _GAP)
    for column, (items, _) in enumerate(laid):
      left, top, segment = _MARGIN + column * (width + _GAP), self._y, first + column + 1
      colour = _SAMPLES[(segment - 1) % len(_SAMPLES)]
      self._pen.rounded_rectangle((left, top, left + width, top + height), 8, _CARD, _RULE)
      self._pen.rounded_rectangle((left, top, left + width, top + 26), 8, colour, corners=(True, True, False, False))
      where = np.flatnonzero(arrays.segment_ids == segment)
      dropped = "   prompt dropped" if is_dropped(arrays, segment, pad) else ""
      says = f"sample {segment}   {len(where):,} tokens from {where[0]:,}{dropped}"
      self._pen.text((left + 14, top + 5), says, _INK, self._small)
      for x, y, item in items:
        if item.learned:  # before any text, which may extend beyond its edges
          x, y = left + 14 + x, top + 38 + y
          self._pen.rectangle((x - 1, y - 1, x + self._text.getlength(item.text), y + 18), _LEARNED)
      for x, y, item in items:
        x, y = left + 14 + x, top + 38 + y
        if item.slot is None:
          self._pen.text((x, y), item.text, _INK if item.learned else _GREY, self._text)
        else:
          written = arrays.image_kind[item.slot] != READ
          picture = Image.fromarray(arrays.images[item.slot]).resize((PICTURE, PICTURE))
          self._paper.paste(picture, (int(x), int(y)))
          edge = (x - 2, y - 2, x + PICTURE + 1, y + PICTURE + 1)
          self._pen.rectangle(edge, outline=_LOSS if written else _INK, width=2)
          says = "to write" if written else "to read"
          self._pen.text((x + PICTURE + 10, y + PICTURE - 18), says, _GREY, self._small)
    self._y += height + _GAP

  def _lay(self, runs: Sequence[_Run], width: int) -> tuple[list[tuple[float, int, _Run]], int]:
    """Breaks a sample into lines; returns (x, y, piece) of each piece, and the height."""
    items: list[tuple[float, int, _Run]] = []
    x, y, lines = 0.0, 0, 1
    for run in runs:
      if run.slot is not None:
        if x:
          y += _LINE + 4
        items.append((0, y, run))
        x, y = 0.0, y + PICTURE + 10
        continue
      if lines > _LINES:  # cut; the card says so
        continue
      for word in split_words(run.text):
        length = self._text.getlength(word.rstrip("\n"))
        if "\n" in word or (x and x + length > width):
          x, y, lines = 0.0, y + _LINE, lines + 1
          word = word.strip()
          length = self._text.getlength(word)
          if lines > _LINES:
            items.append((0, y, _Run("... and more", False, None)))
            x = 1.0
            break
        while length > width and len(word) > 1:  # one word longer than the card
          word = word[: len(word) * 9 // 10]
          length = self._text.getlength(word)
        if word:
          items.append((x, y, run._replace(text=word)))
        x += length
    return items, y + (_LINE if x else 0)

  def charts(self, counted: Sequence[Histograms]) -> None:
    """Draws a histogram of fill and of lengths per source."""
    columns = min(_COLUMNS, len(counted)) or 1
    width = (WIDTH - 2 * _MARGIN - (columns - 1) * _GAP) // columns
    for first in range(0, len(counted), _COLUMNS):
      self._room(420)
      for column, found in enumerate(counted[first : first + _COLUMNS]):
        left = _MARGIN + column * (width + _GAP)
        self._pen.rounded_rectangle((left, self._y, left + width, self._y + 390), 8, _CARD, _RULE)
        self._pen.text((left + 14, self._y + 12), found.task, _INK, self._bold)
        self._pen.text((left + 160, self._y + 13), _short(found.source, 36), _GREY, self._text)
        edges = np.linspace(min(0.8, float(np.floor(found.fill.min() * 20) / 20)), 1, 25)
        percent = [f"{edge:.0%}" for edge in edges[[0, 12, 24]]]
        mean = f"{found.fill.mean():.1%} full on average"
        self._bars(left + 14, self._y + 48, width - 28, found.fill, edges, percent, f"{len(found.fill):,} rows, {mean}")
        edges = np.linspace(0, float(found.lengths.max()) + 1, 33)
        labels = [f"{edge:,.0f}" for edge in edges[[0, 16, 32]]]
        says = f"{len(found.lengths):,} samples, {np.median(found.lengths):,.0f} tokens in the middle"
        self._bars(left + 14, self._y + 218, width - 28, found.lengths, edges, labels, says)
      self._y += 390 + _GAP

  def _bars(
    self,
    left: int,
    top: int,
    width: int,
    values: np.ndarray,
    edges: np.ndarray,
    labels: Sequence[str],
    says: str,
  ) -> None:
    counts = np.histogram(values, edges)[0]
    self._pen.text((left, top), says, _INK, self._small)
    base, step = top + 128, width / len(counts)
    for number, count in enumerate(counts):
      high = 96 * count / max(counts.max(), 1)
      if count:
        x = left + number * step
        self._pen.rectangle((x, base - max(high, 1), x + step - 2, base), _SAMPLES[0])
    self._pen.line((left, base + 1, left + width, base + 1), _GREY)
    for label, share in zip(labels, (0, 0.5, 1)):
      length = self._small.getlength(label)
      self._pen.text((left + share * (width - length), base + 6), label, _GREY, self._small)

  def finish(self) -> Image.Image:
    return self._paper.crop((0, 0, WIDTH, self._y + _MARGIN - _GAP))

  def _room(self, height: int) -> None:
    """Extends the canvas by at least `height` pixels."""
    if self._y + height + _MARGIN > self._paper.height:
      longer = Image.new("RGB", (WIDTH, self._y + height + 2000), _PAPER)
      longer.paste(self._paper, (0, 0))
      self._paper, self._pen = longer, ImageDraw.Draw(longer)


def runs_of(arrays: Batch, segment: int, tokenizer: Tokenizer, image_slots: int) -> list[_Run]:
  """Cuts a sample into images, text with loss, and text without."""
  names = {tokenizer.bos: "‹bos›", tokenizer.eos: "‹eos›", tokenizer.image_end: ""}
  runs: list[_Run] = []
  ids: list[int] = []
  state: Any = None

  def flush() -> None:
    if ids:
      runs.append(_Run(tokenizer.decode(ids), bool(state), None))
      ids.clear()

  for position in np.flatnonzero(arrays.segment_ids == segment):
    slot = int(arrays.image_index[position])
    if slot >= 0:
      flush()
      number = slot // image_slots
      if not runs or runs[-1].slot != number:
        runs.append(_Run("", False, number))
      continue
    learned = bool(position and arrays.segment_ids[position - 1] == segment and arrays.loss_mask[position - 1])
    if learned != state:
      flush()
      state = learned
    token = int(arrays.tokens[position])
    if token in names:
      flush()
      if names[token]:
        runs.append(_Run(names[token], learned, None))
    else:
      ids.append(token)
  flush()
  return runs


def split_words(text: str) -> list[str]:
  """Cuts text before its spaces; each line break is a word of its own."""
  return re.findall(r"\n| [^ \n]*|[^ \n]+", text.replace("\r", "").replace("\t", " "))


def _darker(colour: str) -> tuple[int, ...]:
  return tuple(value * 5 // 8 for value in ImageColor.getrgb(colour))


def _short(path: str, letters: int = 60) -> str:
  return path if len(path) <= letters else "..." + path[3 - letters :]


def _font_file(name: str) -> str:
  """Returns the path of a font that matplotlib ships, without importing it."""
  spec = importlib.util.find_spec("matplotlib")
  return os.path.join(os.path.dirname(spec.origin), "mpl-data", "fonts", "ttf", name)
