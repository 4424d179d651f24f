"""VLMEvalKit's prompts for Janus, which JanusFlow's published scores use.

Each takes a row of a table: "question", "hint", and the options "A" to "Z".
"""

import string
from collections.abc import Mapping

from jflow.data.sequences import IMAGE_MARK

_YES_OR_NO = " Please answer yes or no."
_SHORT = "\nAnswer the question using a single word or phrase."
_LETTER = "\n\nAnswer with the option's letter from the given choices directly."
_OPEN = "\nAnswer the question directly. "


def choices(row: Mapping[str, str]) -> dict[str, str]:
  """The options of a row by letter."""
  return {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter) not in (None, "")}


def yes_no(row: Mapping[str, str]) -> str:
  """The prompt of MME."""
  return f"{IMAGE_MARK}\n{row['question']}{_SHORT}"


def pope(row: Mapping[str, str]) -> str:
  """The prompt of POPE, without the yes/no hint."""
  return yes_no({"question": row["question"].replace(_YES_OR_NO, "")})


def short(row: Mapping[str, str]) -> str:
  """The prompt of GQA, ChartQA and TextVQA: VLMEvalKit's default, without a line break after the image."""
  return f"{IMAGE_MARK}{row['question']}{_SHORT}"


def choice(row: Mapping[str, str]) -> str:
  """The prompt of MMBench, SEED and MMMU."""
  hint = f"Hint: {row['hint']}\n" if row.get("hint") else ""
  options = "".join(f"\n{letter}. {text}" for letter, text in choices(row).items())
  return f"{IMAGE_MARK}\n{hint}{row['question']}{options}{_LETTER if options else _OPEN}"


def plain(row: Mapping[str, str]) -> str:
  """The prompt of MM-Vet: the question alone."""
  return f"{IMAGE_MARK}\n{row['question']}"
