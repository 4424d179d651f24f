"""Comparison of arrays with golden ones: one line each, and the first that differs."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jflow.outputs import write_json


class Line(NamedTuple):
  """The comparison of one array."""

  name: str
  component: str
  shape: tuple[int, ...]
  relative_l2: float  # |ours - golden| / |golden|
  max_error: float
  compared: int  # of its numbers, those that the mask holds
  passed: bool


def line(
  name: str,
  component: str,
  ours: np.ndarray,
  golden: np.ndarray,
  tolerance: float,
  mask: np.ndarray | None = None,
  within: int = 0,
) -> Line:
  """Compares one array where `mask` holds; shapes must be equal, and integers, but for a difference of `within`.

  An array of which the mask leaves nothing does not pass.
  """
  if ours.shape != golden.shape:
    return Line(name, f"{component} (ours is {list(ours.shape)})", golden.shape, math.inf, math.inf, 0, False)
  a, b = np.asarray(ours, np.float64), np.asarray(golden, np.float64)
  if mask is not None:
    a, b = a[mask], b[mask]
  if mask is not None and not a.size:
    return Line(name, f"{component} (its mask leaves nothing to compare)", golden.shape, math.inf, math.inf, 0, False)
  error = np.abs(a - b)
  relative = math.sqrt(float(np.sum(error * error))) / (math.sqrt(float(np.sum(b * b))) or 1.0)
  most = float(error.max(initial=0.0))
  passed = bool(relative <= tolerance if np.issubdtype(golden.dtype, np.floating) else most <= within)  # no NaN passes
  return Line(name, component, golden.shape, relative, most, a.size, passed)


def report(lines: Sequence[Line], tolerance: float, json_path: pathlib.Path | None) -> int:
  """Prints a line per array and the first diverging component; returns the exit code."""
  width = max(len(line.name) for line in lines)
  for line in lines:
    verdict, size = "ok" if line.passed else "DIFFERS", math.prod(line.shape)
    if line.compared != size:
      verdict += f" ({line.compared} of {size} compared)"
    print(
      f"{line.name:{width}}  {str(list(line.shape)):20}  relative {line.relative_l2:.2e}  "
      f"max {line.max_error:.2e}  {verdict}"
    )
  first = next((line for line in lines if not line.passed), None)
  if first is None:
    print(f"all {len(lines)} arrays agree within {tolerance:g}")
  else:
    print(f"first to diverge: {first.name}, made by {first.component}")
  if json_path is not None:
    value = {
      "passed": first is None,
      "tolerance": tolerance,
      "first_divergence": None if first is None else {"array": first.name, "component": first.component},
      "arrays": {line.name: _finite(line) for line in lines},
    }
    write_json(json_path, value)
  return 0 if first is None else 1


def _finite(line: Line) -> dict[str, Any]:
  """A line as a JSON object; errors that are not finite become null."""
  values = line._asdict()
  values.pop("name")
  return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in values.items()}
