"""Golden files, read and checked completely before the checkpoint to compare is opened."""

import dataclasses
import math
import pathlib
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jflow.errors import UserError, one_line
from jflow.models.config import ModelConfig
from jflow.strict_json import shown

VARIANT = re.compile(r"_(?:(first|last)(\d{1,9})|(mean)|(crop)|(pooled))$")
# Kinds of numpy's types of an input.
IDS, MASK, REAL = "iu", "iub", "fiu"


class Output(NamedTuple):
  """An output of jflow in PyTorch's layout.

  Attributes:
    value: the array; its tokens are axis 1, or the last two of a map [B, C, H, W].
    mask: bool[B, T], the tokens to compare; None: all.
    rows: whether axis 0 counts rows; False: it counts tokens.
    loose: factor of the tolerance.
    within: largest difference of integers.
  """

  value: np.ndarray
  mask: np.ndarray | None = None
  rows: bool = True
  loose: float = 1.0
  within: int = 0


@dataclasses.dataclass(frozen=True)
class Group:
  """Arrays of a golden file that are computed together; names are whole, as "und/logits".

  Attributes:
    inputs: name -> (kinds of its type, its axes; None: a scalar or one number per image).
    outputs: name -> (the component that computes it from those before, the inputs that it needs); a tuple of names
      needs one of them. In the order in which components feed one another.
    check: (file, arrays) checks that the inputs fit one another.
    fits: (arrays, config) checks the inputs against the model's configuration, before its weights are read.
    run: (runner, arrays, whether an output is wanted) -> the outputs.
    besides: names that are neither inputs nor compared.
  """

  inputs: Mapping[str, tuple[str, tuple[str, ...] | None]]
  outputs: Mapping[str, tuple[str, tuple[str | tuple[str, ...], ...]]]
  fits: Callable[[Mapping[str, np.ndarray], ModelConfig], None]
  run: Callable[[Any, Mapping[str, np.ndarray], Callable[[str], bool]], dict[str, Output]]
  check: Callable[[pathlib.Path, Mapping[str, np.ndarray]], None] = lambda path, arrays: None
  besides: tuple[str, ...] = ()


MOST_STEPS = 10_000
_DENSEST, _SMALL = 200, 2**28  # largest expansion of a file in memory, and bytes that are allowed in any case


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads an npz file of plain numeric arrays; never a pickle.

  Raises:
    UserError: the file is missing or damaged, would unpack to too many bytes, or holds arrays of another kind.
  """
  try:
    if path.exists() and not path.is_file():
      raise UserError(f"{path} must be a file")
    with np.load(path, allow_pickle=False) as file:
      if not hasattr(file, "files"):
        raise ValueError("a single array")
      _check_members(path, file.zip.infolist())
      arrays = {name: file[name] for name in file.files}
  except FileNotFoundError:
    raise UserError(f"{path} not found") from None
  except UserError:
    raise
  except Exception as error:  # zip, npy and pickle errors of many types
    reason = one_line(error)
    raise UserError(f"{path} is not a readable npz file of plain arrays ({reason})") from None
  for name, x in arrays.items():
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "fiub":
      kind = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
      raise UserError(f"{path}: {shown(name)[1:-1]} must be an array of numbers, got {kind}")
  return arrays


def _check_members(path: pathlib.Path, members: list[zipfile.ZipInfo]) -> None:
  size, names = path.stat().st_size, [member.filename for member in members]
  total = sum(member.file_size for member in members)
  if total > _SMALL + _DENSEST * size:
    raise UserError(f"{path} has {size:,} bytes and would unpack to {total:,}: damaged")
  if len(set(names)) != len(names):
    raise UserError(f"{path} holds {shown(next(n for n in names if names.count(n) > 1))} twice")


def without_ones(arrays: Mapping[str, np.ndarray], groups: Iterable[Group]) -> dict[str, np.ndarray]:
  """The arrays of a file, inputs without leading axes of 1 beyond their own: codes of one picture may be [1, N]."""
  axes = {name: own for group in groups for name, (_, own) in group.inputs.items() if own and own[0] != ".."}
  out = {}
  for name, x in arrays.items():
    whole = x.shape[-len(axes[name]) :] if name in axes else x.shape
    out[name] = x.reshape(whole) if x.size == math.prod(whole) else x
  return out


def base(name: str) -> str:
  """The name of an array without the ending of a variant."""
  return VARIANT.sub("", name)


def check(path: pathlib.Path, arrays: Mapping[str, np.ndarray], groups: Iterable[Group]) -> list[Group]:
  """Checks that a golden file has outputs to compare, and every input that they depend on.

  Args:
    path: of the file, for messages.
    arrays: of the file.
    groups: those that may be in it.

  Returns:
    The groups with outputs in the file, whole or as a variant.

  Raises:
    UserError: the array is named.
  """
  found = []
  for group in groups:
    outputs = [name for name in arrays if base(name) in group.outputs and not _only_input(name, arrays, group)]
    if not outputs:
      continue
    found.append(group)
    for output in outputs:
      if missing := _missing(base(output), arrays, group):
        raise UserError(f"{path} has {output} but not its input {missing}")
    for name in group.inputs:
      if name in arrays:
        _check_input(path, name, arrays[name], *group.inputs[name])
    group.check(path, arrays)
    for name, x in arrays.items():
      if base(name) in group.outputs and x.size == 0:
        raise UserError(f"{path}: {name} is empty")
  if not found:
    raise UserError(f"{path} holds no output to compare with, such as und/logits")
  return found


def _missing(output: str, arrays: Mapping[str, np.ndarray], group: Group) -> str:
  """The first input that a file lacks for an output; empty where it has all."""
  needs = ((need,) if isinstance(need, str) else need for need in group.outputs[output][1])
  return next((" or ".join(names) for names in needs if not any(name in arrays for name in names)), "")


def _only_input(name: str, arrays: Mapping[str, np.ndarray], group: Group) -> bool:
  """Whether an array is an input of others and cannot be compared itself, as codes without pixels."""
  return name in group.inputs and bool(_missing(name, arrays, group))


def say_others(path: pathlib.Path, arrays: Mapping[str, np.ndarray], groups: Iterable[Group]) -> None:
  """Names the arrays of a file on stderr that none of the groups compares or reads."""
  known = {name for group in groups for name in (*group.inputs, *group.besides)}
  compared = {name for group in groups for name in group.outputs}
  if others := sorted(name for name in arrays if base(name) not in compared and name not in known):
    print(f"jflow: {path}: not compared, since this model has no such output: {shown(others)[1:-1]}", file=sys.stderr)


def _check_input(path: pathlib.Path, key: str, x: np.ndarray, kinds: str, axes: tuple[str, ...] | None) -> None:
  if x.dtype.kind not in kinds:
    what = "whole numbers" if kinds in (IDS, MASK) else "numbers"
    raise UserError(f"{path}: {key} must hold {what}, got {x.dtype}")
  if axes is None:
    if x.ndim > 1 or (x.size != 1 and key != "gen/t") or not x.size:
      raise UserError(f"{path}: {key} must be one number, got the shape {list(x.shape)}")
  elif x.size == 0 or x.ndim < len(axes) or (axes[0] != ".." and x.size != math.prod(x.shape[-len(axes) :])):
    raise UserError(f"{path}: {key} must have the axes [{', '.join(axes)}], got the shape {list(x.shape)}")
  if x.dtype.kind == "f" and not np.isfinite(x).all():
    raise UserError(f"{path}: {key} holds values that are not finite")


def check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
  """Raises a UserError if an input's shape does not fit the model; `found` may be its last axes only."""
  if found != wanted:
    raise UserError(f"{name} is {list(found)} where this model takes {list(wanted)}: another model's golden file?")


def check_margin(name: str, margin: np.ndarray, wanted: tuple[int, ...]) -> None:
  """Raises a UserError unless there is a margin, the best minus the second best, for each of the choices."""
  check_shape(name, margin.shape, wanted)
  if margin.min() < 0:
    raise UserError(f"{name} must not be negative, got {margin.min():g}: the best minus the second best")


def check_ids(name: str, ids: np.ndarray, known: int) -> None:
  """Raises a UserError if a model with so many ids has not all of these."""
  if ids.min() < 0 or ids.max() >= known:
    raise UserError(f"{name} has ids in {ids.min()}..{ids.max()}, this model {known} of them")
