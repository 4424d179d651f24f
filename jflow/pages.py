"""Pieces of the HTML pages that jflow writes: one style, tables of samples, pictures inside the page."""

import base64
import html
import io
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #888; --bar: #3b7dd8; --mark: #d8743b; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.verdict { font-size: 1.15rem; } .faint, .what { color: var(--faint); overflow-wrap: anywhere; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .35rem .8rem; align-items: center; }
.track { position: relative; height: 1.1rem; background: var(--line); border-radius: 3px; }
.track * { position: absolute; top: 0; bottom: 0; } .fill { left: 0; background: var(--bar); border-radius: 3px; }
.range { top: 45%; bottom: 45%; background: currentColor; } .mark { width: 3px; background: var(--mark); }
table { border-collapse: collapse; width: 100%; } th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
th { text-align: left; font-weight: 600; } td:first-child { white-space: nowrap; } .wrap { overflow-x: auto; }
td.n, th.n, .n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.s { white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; }
img { max-width: 100%; border: 1px solid var(--line); } code { font-size: .9em; overflow-wrap: anywhere; }
li { white-space: pre-wrap; overflow-wrap: anywhere; } summary { cursor: pointer; margin-top: 1rem; }
"""


class Shown(NamedTuple):
  """A table of samples on the page, as of answers beside the truth."""

  title: str
  heads: Sequence[str]
  rows: Sequence[Sequence[str | Image.Image]]


def samples(shown: Shown) -> str:
  """The HTML table of samples."""
  cell = lambda x: f'<img alt="" src="{data_uri(x)}">' if isinstance(x, Image.Image) else html.escape(x)
  row = lambda cells: "<tr>" + "".join(f'<td class="s">{cell(x)}</td>' for x in cells) + "</tr>"
  head = "<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in shown.heads) + "</tr>"
  return (
    f'<h2>{html.escape(shown.title)}</h2><div class="wrap"><table>{head}{"".join(map(row, shown.rows))}</table></div>'
  )


def data_uri(image: Image.Image) -> str:
  buffer = io.BytesIO()
  image.save(buffer, "PNG", optimize=True)
  return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
