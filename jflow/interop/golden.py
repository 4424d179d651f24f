"""Golden files, read and checked completely before the checkpoint to compare is opened."""

import math
import pathlib
import re
import sys
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from jflow.errors import UserError
from jflow.models.config import ModelConfig
from jflow.strict_json import shown

VARIANT = re.compile(r"_(?:(first|last)(\d{1,9})|(mean))$")
# Input -> (kinds of its type, its axes; None: a scalar or one number per image).
_IDS, _MASK, _REAL = "iu", "iub", "fiu"
INPUTS: dict[str, dict[str, tuple[str, tuple[str, ...] | None]]] = {
  "und": {
    "pixels": (_REAL, ("..", "3", "H", "W")),
    "input_ids": (_IDS, ("B", "S")),
    "attention_mask": (_MASK, ("B", "S")),
  },
  "text": {"input_ids": (_IDS, ("B", "S"))},
  "gen": {
    "prompt_ids": (_IDS, ("S",)),
    "z0": (_REAL, ("N", "C", "h", "w")),
    "t": (_REAL, None),
    "steps": (_IDS, None),
    "cfg_weight": (_REAL, None),
  },
}
_SOLVER = ("steps", "cfg_weight")  # inputs of the outputs of _SOLVED alone
_SOLVED = {"gen/trajectory", "gen/z1"}
_MOST_STEPS = 10_000
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
    reason = " ".join(str(error).split())[:160]
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


def check(path: pathlib.Path, arrays: Mapping[str, np.ndarray], components: Mapping[str, str]) -> dict[str, list[str]]:
  """Checks that a golden file has outputs to compare, and every input that they depend on.

  Args:
    path: of the file, for messages.
    arrays: of the file.
    components: output -> component that computes it.

  Returns:
    Group -> the outputs of it in the file, whole or as a variant.

  Raises:
    UserError: the array is named.
  """
  bases = {VARIANT.sub("", name) for name in arrays}
  groups = {}
  for group, inputs in INPUTS.items():
    outputs = [key for key in components if key.startswith(f"{group}/") and key in bases]
    if not outputs:
      continue
    groups[group] = outputs
    for name, (kinds, axes) in inputs.items():
      key = f"{group}/{name}"
      if name in _SOLVER and not _SOLVED & set(outputs):
        continue
      if key not in arrays:
        raise UserError(f"{path} has {outputs[0]} but not its input {key}")
      _check_input(path, key, arrays[key], kinds, axes)
    _check_group(path, group, {name: x for name, x in arrays.items() if name.startswith(f"{group}/")})
  if not groups:
    raise UserError(f"{path} holds no output to compare with, such as und/logits")
  for name, x in arrays.items():
    if VARIANT.sub("", name) in components and x.size == 0:
      raise UserError(f"{path}: {name} is empty")
  known = {f"{group}/{name}" for group, inputs in INPUTS.items() for name in inputs} | {"und/special_ids"}
  if others := sorted(name for name in arrays if VARIANT.sub("", name) not in components and name not in known):
    print(
      f"jflow: {path}: not compared, since this model has no such output: {shown(others)[1:-1]}",
      file=sys.stderr,
    )
  return groups


def _check_input(path: pathlib.Path, key: str, x: np.ndarray, kinds: str, axes: tuple[str, ...] | None) -> None:
  if x.dtype.kind not in kinds:
    what = "whole numbers" if kinds in (_IDS, _MASK) else "numbers"
    raise UserError(f"{path}: {key} must hold {what}, got {x.dtype}")
  if axes is None:
    if x.ndim > 1 or (x.size != 1 and key != "gen/t") or not x.size:
      raise UserError(f"{path}: {key} must be one number, got the shape {list(x.shape)}")
  elif x.size == 0 or x.ndim < len(axes) or (axes[0] != ".." and x.size != math.prod(x.shape[-len(axes) :])):
    raise UserError(f"{path}: {key} must have the axes [{', '.join(axes)}], got the shape {list(x.shape)}")
  if x.dtype.kind == "f" and not np.isfinite(x).all():
    raise UserError(f"{path}: {key} holds values that are not finite")


def _check_group(path: pathlib.Path, group: str, g: Mapping[str, np.ndarray]) -> None:
  """Checks that the inputs of a group are consistent."""
  if group == "und":
    tokens, mask = g["und/input_ids"], g["und/attention_mask"]
    if tokens.shape != mask.shape:
      raise UserError(f"{path}: und/attention_mask is {list(mask.shape)}, und/input_ids {list(tokens.shape)}")
    if not mask.astype(bool).any(axis=1).all():
      raise UserError(f"{path}: und/attention_mask hides all of row {int(np.argmin(mask.astype(bool).any(axis=1)))}")
    greedy_count(g)
  if group == "gen":
    count = len(g["gen/z0"])
    if g["gen/t"].ndim and g["gen/t"].shape not in ((1,), (count,)):
      raise UserError(f"{path}: gen/t is {list(g['gen/t'].shape)}, gen/z0 has {count} pictures")
    if (g["gen/t"] < 0).any() or (g["gen/t"] > 1).any():
      raise UserError(f"{path}: gen/t must be in [0, 1]")
    if "gen/steps" in g and not 1 <= int(g["gen/steps"].item()) <= _MOST_STEPS:
      raise UserError(f"{path}: gen/steps={g['gen/steps'].item()} must be in 1..{_MOST_STEPS}")


def greedy_count(g: Mapping[str, np.ndarray]) -> int:
  """The number of tokens to decode for und/greedy_tokens, or for its first ones where the file holds only those.

  Raises:
    UserError: the file holds only the last tokens, or the array has other axes.
  """
  names = [name for name in g if VARIANT.sub("", name) == "und/greedy_tokens"]
  for name in names:
    if g[name].ndim != 2 or len(g[name]) != len(g["und/input_ids"]) or g[name].shape[1] > _MOST_STEPS:
      raise UserError(f"{name} must have the axes [B, tokens], got the shape {list(g[name].shape)}")
  if "und/greedy_tokens" in g:
    return g["und/greedy_tokens"].shape[1]
  for name in names:
    if VARIANT.search(name)[1] != "first":
      raise UserError(f"{name} needs und/greedy_tokens beside it, which says how many tokens there are")
  return max((g[name].shape[1] for name in names), default=0)


def special_ids(g: Mapping[str, np.ndarray], vocabulary: int) -> tuple[int, int]:
  """The ids of <begin_of_image> and <image_placeholder> in the rows of `und/`."""
  special = g.get("und/special_ids", np.array([vocabulary - 4, vocabulary - 3]))
  check_shape("und/special_ids", special.shape, (2,))
  return int(special[0]), int(special[1])


def image_starts(tokens: np.ndarray, images: int, patches: int, boi: int, image: int) -> list[np.ndarray]:
  """The positions at which each row's images begin.

  Raises:
    UserError: the rows do not match the images.
  """
  starts = [np.flatnonzero(row == boi) for row in tokens]
  if sum(map(len, starts)) != images:
    raise UserError(f"und/input_ids has {sum(map(len, starts))} images, und/pixels {images}")
  for b, row in enumerate(starts):
    for start in row:
      if start + patches >= tokens.shape[1] or not (tokens[b, start + 1 : start + 1 + patches] == image).all():
        raise UserError(f"und/input_ids row {b}: {patches} image ids should follow position {start}")
  return starts


def check_fits(arrays: Mapping[str, np.ndarray], groups: Mapping[str, Any], c: ModelConfig) -> None:
  """Checks the inputs against the model's configuration, before its weights are read.

  Raises:
    UserError: the golden file is of another model.
  """
  vocabulary = c.language_model.vocab_size
  ids = {"und": "und/input_ids", "text": "text/input_ids", "gen": "gen/prompt_ids"}
  for group in groups:
    x = arrays[ids[group]]
    shown_ids = x[arrays["und/attention_mask"].astype(bool)] if group == "und" else x
    if shown_ids.min() < 0 or shown_ids.max() >= vocabulary:
      raise UserError(f"{ids[group]} has ids in {shown_ids.min()}..{shown_ids.max()}, this model {vocabulary} of them")
  if "und" in groups:
    pixels = arrays["und/pixels"]
    check_shape("und/pixels", pixels.shape[-3:], (3, c.image_size, c.image_size))
    boi, image = special_ids(arrays, vocabulary)
    image_starts(arrays["und/input_ids"], math.prod(pixels.shape[:-3]), c.patches, boi, image)
  if "gen" in groups:
    check_shape("gen/z0", arrays["gen/z0"].shape[-3:], (c.autoencoder.latent_channels, c.latent_size, c.latent_size))


def check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
  """Raises a UserError if an input's shape does not fit the model; `found` may be its last axes only."""
  if found != wanted:
    raise UserError(f"{name} is {list(found)} where this model takes {list(wanted)}: another model's golden file?")
