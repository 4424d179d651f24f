"""The release's tokenizer, and its ids as text that a test can compare."""

import pathlib

from jflow.data.tokenizer import Tokenizer

GOLDEN = pathlib.Path(__file__).parent / "golden" / "processor"
TOKENIZER = Tokenizer.load(GOLDEN)


def show(ids) -> str:
  """Returns the text of ids, the special ones as short marks."""
  names = {
    TOKENIZER.bos: "[BOS]",
    TOKENIZER.eos: "[EOS]",
    TOKENIZER.image: "#",
    TOKENIZER.image_start: "[",
    TOKENIZER.image_end: "]",
    TOKENIZER.generation_start: "[T]",
  }
  text, plain = "", []
  for i in [*map(int, ids), TOKENIZER.pad]:
    if i in names or i == TOKENIZER.pad:
      text += TOKENIZER.decode(plain) + names.get(i, "")
      plain = []
    else:
      plain.append(i)
  return text
