"""Constraints of config fields: functions value -> what it must be, or "" where it fits."""

import math
import re
import sys
from collections.abc import Callable
from typing import Any

Check = Callable[[Any], str]

MOST = 2**31 - 1  # of steps and records: jax counts in int32


def whole(least: int, most: float = MOST, note: str = "") -> Check:
  """A whole number from `least` to `most`."""

  def check(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
      return "must be a whole number"
    if value < least:
      return ("must not be negative" if least == 0 else f"must be at least {least}") + note
    return f"must be at most {most}" if value > most else ""

  return check


def number(
  least: float = -math.inf, most: float = math.inf, above: float = -math.inf, below: float = math.inf, note: str = ""
) -> Check:
  """A finite number, at least and at most, above and below something."""

  def check(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
      return "must be a finite number"
    if above == 0 and most == math.inf == below and value <= 0:
      return "must be positive" + note
    if least == 0 and below == math.inf == most and value < 0:
      return "must not be negative" + note
    if not (least <= value <= most and above < value < below):
      low, high = (
        (f"[{least:g}" if math.isfinite(least) else f"({above:g}"),
        (f"{most:g}]" if most < math.inf else f"{below:g})"),
      )
      return f"must be in {low}, {high}"
    return ""

  return check


def text(value: Any) -> str:
  """Text of one line."""
  return "" if isinstance(value, str) and not re.search(r"[\x00-\x1f\x7f]", value) else "must be text of one line"


def setting(value: Any) -> str:
  """A number, a text of one line, or a tuple of numbers."""
  parts = value if isinstance(value, tuple) else (value,)
  fine = parts and all(not number()(one) for one in parts) or isinstance(value, str) and not text(value)
  return "" if fine else "must be a number, a text of one line, or a tuple of numbers"


def truth(value: Any) -> str:
  """True or false."""
  return "" if isinstance(value, bool) else "must be true or false"


def words(value: Any) -> str:
  """A tuple of names, none of them empty."""
  fine = isinstance(value, tuple) and all(isinstance(one, str) and one and not text(one) for one in value)
  return "" if fine else "must be a tuple of texts, as ('a', 'b')"


def patterns(value: Any) -> str:
  """A tuple of regular expressions."""
  if words(value):
    return "must be a tuple of patterns, as ('language_model/layers',)"
  for one in value:
    try:
      re.compile(one)
    except (re.error, RecursionError, OverflowError) as error:
      return f"must hold regular expressions ({one[:60]!r} is none: {error})"
  return ""


def factors(value: Any) -> str:
  """((pattern, factor), ...) with factors above 0."""
  fine = isinstance(value, tuple) and all(isinstance(one, tuple) and len(one) == 2 for one in value)
  if not fine or patterns(tuple(one[0] for one in value)) or any(number(above=0.0)(one[1]) for one in value):
    return "must be a tuple of (pattern, factor above 0), as (('understanding_encoder', 0.1),)"
  return ""


def path_pattern(pattern: str) -> re.Pattern[str]:
  """Matches the beginning of a parameter's path ("language_model/layers/mlp/up/kernel") up to a "/" or its end."""
  return re.compile(f"(?:{pattern})(?:/|$)")


def one_of(*choices: str) -> Check:
  """One of some words."""
  told = " or ".join(map(repr, choices))
  return lambda value: "" if isinstance(value, str) and value in choices else f"must be {told}"


def pairs(value: Any) -> str:
  """((part, checkpoint), ...)."""
  fine = isinstance(value, tuple) and all(isinstance(one, tuple) and len(one) == 2 and not words(one) for one in value)
  return "" if fine else "must be a tuple of (part, checkpoint), as (('understanding_encoder', 'DIR'),)"


def weighted(example: str) -> Check:
  """((name, weight), ...) with weights that are not negative."""

  def check(value: Any) -> str:
    fine = isinstance(value, tuple) and all(
      isinstance(one, tuple) and len(one) == 2 and not text(one[0]) and one[0] and not number(0)(one[1])
      for one in value
    )
    return "" if fine else f"must be a tuple of {example}"

  return check


def phases(*tasks: str) -> Check:
  """((first step, (weight per task)), ...), from step 0 on and rising; or ()."""
  what = f"must be a tuple of (from step, ({', '.join(tasks)})), as ((0, (30, 50, 20)),), or ()"

  def check(value: Any) -> str:
    if not isinstance(value, tuple):
      return what
    if not value:
      return ""
    for one in value:
      if not isinstance(one, tuple) or len(one) != 2 or whole(0)(one[0]):
        return what
      if not isinstance(one[1], tuple) or len(one[1]) != len(tasks) or any(map(number(0), one[1])):
        return what
      if not 0 < sum(one[1]) < math.inf:
        return "must give some task a weight above 0 from each step on"
    starts = [one[0] for one in value]
    return "" if starts[0] == 0 and starts == sorted(set(starts)) else "must start at step 0 and rise"

  return check


def prompts(value: Any) -> str:
  """A tuple of texts, none of them blank."""
  fine = isinstance(value, tuple) and all(isinstance(one, str) and one.strip() for one in value)
  return "" if fine else "must be a tuple of texts"


def guidance(value: Any) -> str:
  """w of eq. 5."""
  return "must be at least 1, or 0" if number(0)(value) or 0 < value < 1 else ""


def address(value: Any) -> str:
  """HOST:PORT, or nothing."""
  found = re.fullmatch(r"(\S+:([0-9]{1,5}))?", value) if isinstance(value, str) else None
  return "" if found and int(found[2] or 0) < 2**16 else "must be HOST:PORT of process 0"
