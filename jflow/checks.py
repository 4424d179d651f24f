"""Checks of arguments that come from users: one line names the argument and what it may be."""

import math
import numbers
from typing import Any

from jflow.errors import UserError

SEEDS = 2**32  # a key keeps 32 bits of its seed


def whole(name: str, value: Any, least: int = 1) -> None:
  """Raises UserError unless `value` is a whole number (Python's or NumPy's, not a bool) of at least `least`."""
  if not isinstance(value, numbers.Integral) or isinstance(value, bool):
    raise UserError(f"{name}={_shown(value)} must be a whole number")
  if value < least:
    raise UserError(f"{name}={value} must be at least {least}")


def seed(value: Any, last: int = 0) -> None:
  """Raises UserError unless `value` and `value + last` are whole numbers in [0, 2**32)."""
  whole("seed", value, 0)
  if int(value) + int(last) >= SEEDS:
    raise UserError(f"seed={value} must be less than 2**32{f' - {last}' if last else ''}")


def number(name: str, value: Any) -> None:
  """Raises UserError unless `value` is a finite number and not a bool."""
  if not isinstance(value, numbers.Real) or isinstance(value, bool) or not _is_finite(value):
    raise UserError(f"{name}={_shown(value)} must be a finite number")


def answer(max_tokens: Any, temperature: Any, top_p: Any, seed_: Any) -> None:
  """Checks the sampling settings of an answer; raises UserError."""
  whole("max_tokens", max_tokens)
  seed(seed_)
  number("temperature", temperature)
  number("top_p", top_p)
  if temperature < 0:
    raise UserError(f"temperature={temperature} must be at least 0")
  if not 0 < top_p <= 1:
    raise UserError(f"top_p={top_p} must be in (0, 1]")


def _is_finite(value: Any) -> bool:
  try:
    return math.isfinite(value)
  except OverflowError:  # a whole number beyond any float
    return False


def _shown(value: Any) -> str:
  return " ".join(repr(value).split())[:60]
