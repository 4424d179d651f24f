"""Checks of arguments that come from users, by the constraints of `jflow.values`: one line names argument and value."""

import math
import numbers
from typing import Any

from jflow import values
from jflow.errors import UserError

SEEDS = 2**32  # a key keeps 32 bits of its seed


def need(name: str, value: Any, check: values.Check) -> None:
  """Raises UserError unless `value`, Python's or NumPy's, fits."""
  if what := check(_plain(value)):
    raise UserError(f"{name}={' '.join(repr(_plain(value)).split())[:60]} {what}")


def whole(name: str, value: Any, least: int = 1) -> None:
  """Raises UserError unless `value` is a whole number of at least `least`."""
  need(name, value, values.whole(least, math.inf))


def seed(value: Any, last: int = 0) -> None:
  """Raises UserError unless `value` and `value + last` are whole numbers in [0, 2**32)."""
  need("seed", value, values.whole(0, SEEDS - 1 - int(last)))


def number(name: str, value: Any) -> None:
  """Raises UserError unless `value` is a finite number and not a bool."""
  need(name, value, values.number())


def answer(max_tokens: Any, temperature: Any, top_p: Any, seed_: Any) -> None:
  """Checks the sampling settings of an answer; raises UserError."""
  whole("max_tokens", max_tokens)
  seed(seed_)
  need("temperature", temperature, values.number(least=0))
  need("top_p", top_p, values.number(above=0, most=1))


def _plain(value: Any) -> Any:
  """Python's number in place of NumPy's."""
  if isinstance(value, numbers.Integral) and not isinstance(value, bool):
    return int(value)
  return float(value) if isinstance(value, numbers.Real) and not isinstance(value, (bool, int)) else value
