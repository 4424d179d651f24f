"""The file that names the best step of a run which stops early: WORKDIR/best.json, {"step", "val_loss"}."""

import pathlib
import sys
from typing import Any

from jflow import files
from jflow.interop import steps
from jflow.strict_json import Malformed, parse, shown

FILE = "best.json"


def best_step(workdir: pathlib.Path) -> int | None:
  """Returns the best step of a run; None where it has none, or the file or that step is damaged, which stderr says."""
  path = workdir / FILE
  try:
    found: dict[str, Any] = files.read_object(path)
  except FileNotFoundError:
    return None
  except (OSError, Malformed) as error:
    print(f"jflow: {path} is not used: {error}", file=sys.stderr)
    return None
  step = _step(found)
  if step is None:
    print(f"jflow: {path} is not used: step must be a step, got {shown(found.get('step'))}", file=sys.stderr)
    return None
  why = steps.damage(workdir / "checkpoints" / str(step))
  if why is not None:
    print(f"jflow: step {step}, the best of {workdir}, is not used: {why}", file=sys.stderr)
    return None
  return step


def named_in(content: bytes) -> int | None:
  """Returns the step that the bytes of a best.json name; None where they are damaged."""
  try:
    found = parse(content)
  except Malformed:
    return None
  return _step(found) if isinstance(found, dict) else None


def _step(found: dict[str, Any]) -> int | None:
  step = found.get("step")
  return step if type(step) is int and steps.number(str(step)) is not None else None
