"""True answers of benchmarks, checked when their file is read: one that no prediction can match would score 0."""

import ast
import io
import re
import token
import tokenize
from collections.abc import Mapping

from jflow.evaluation.prompts import choices

LEAST_PEOPLE = 4  # fewer cannot give a VQA score of 1
_LIST = re.compile(r"\[\s*[bru]?['\"]", re.IGNORECASE)  # a list of texts begins so, whole or damaged


def yes_or_no(row: Mapping[str, str]) -> str:
  """The truth of POPE and MME: "Yes" or "No", in any case (POPE's own files have "yes").

  Raises:
    ValueError: it is neither; likewise for all rules.
  """
  answer = row["answer"].strip().capitalize()
  if answer not in ("Yes", "No"):
    raise ValueError("must be Yes or No")
  return answer


def letter(row: Mapping[str, str]) -> str:
  """The letter of the right option, in upper case; the text itself where the question is open."""
  options = choices(row)
  if not options:
    return row["answer"]
  answer = row["answer"].strip().upper()
  if answer not in options:
    raise ValueError(f"must be the letter of one of its options, {', '.join(options)}")
  return answer


def people(row: Mapping[str, str]) -> str:
  """The answers of at least LEAST_PEOPLE people, written as a Python list."""
  if len(people_of(row["answer"])) < LEAST_PEOPLE:
    raise ValueError(f"must be a list of at least {LEAST_PEOPLE} answers: the score leaves one out and asks for three")
  return row["answer"]


def one_or_more(row: Mapping[str, str]) -> str:
  """One answer, or at least one written as a Python list."""
  people_of(row["answer"])
  return row["answer"]


def people_of(answer: str) -> list[str]:
  """The answers of a field: the elements of a Python list, or the field itself if it is plain text.

  Raises:
    ValueError: the list is empty, damaged, or lacks a comma between two strings.
  """
  if not answer.lstrip().startswith("["):
    return [answer]
  try:
    found = ast.literal_eval(answer.strip())
  except (ValueError, SyntaxError, RecursionError, MemoryError):
    if _LIST.match(answer.lstrip()):
      raise ValueError("must be a whole list of texts, such as ['two', '2']") from None
    return [answer]  # a text that begins with a bracket
  if not isinstance(found, list) or not found or not all(isinstance(one, str | int | float) for one in found):
    raise ValueError("must be a list of at least one text or number")
  if _texts(answer) > sum(isinstance(one, str) for one in found):  # NumPy prints ['a' 'b'], which Python reads as 'ab'
    raise ValueError("must have a comma between the texts of its list")
  return [str(one) for one in found]


def _texts(source: str) -> int:
  """The number of string literals in a Python expression."""
  tokens = tokenize.generate_tokens(io.StringIO(source.strip()).readline)
  return sum(one.type == token.STRING for one in tokens)
