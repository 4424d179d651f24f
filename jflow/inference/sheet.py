"""A contact sheet: images in a grid, each with its text below."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def contact_sheet(
  images: Sequence[Image.Image], captions: Sequence[str], columns: int, side: int = 192, lines: int = 3
) -> Image.Image:
  """Returns the sheet.

  Args:
    images: shown at `side` x `side` pixels.
    captions: one text per image, wrapped to `lines` lines at most; a longer one ends in …
    columns: images per row of the grid.
  """
  font = ImageFont.load_default(size=13)
  margin, line = 10, 17
  cell_width, cell_height = side + margin, side + margin + lines * line
  rows = -(-len(images) // columns)
  sheet = Image.new("RGB", (columns * cell_width + margin, rows * cell_height + margin), "white")
  draw = ImageDraw.Draw(sheet)
  for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
    x, y = margin + (i % columns) * cell_width, margin + (i // columns) * cell_height
    resample = Image.Resampling.BICUBIC if image.width >= side else Image.Resampling.NEAREST
    sheet.paste(image.resize((side, side), resample), (x, y))
    text = textwrap.wrap(caption, width=max(8, side // 7), max_lines=lines, placeholder=" …")
    for n, words in enumerate(text):
      draw.text((x, y + side + 2 + n * line), words, fill="black", font=font)
  return sheet
