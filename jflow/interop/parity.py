"""Comparison of a checkpoint with golden outputs of the PyTorch code, component by component, in float32.

`python -m jflow parity --help` describes the golden file. The groups of arrays that every model has are in
parity_reading.py, those of a way to write images in parity_flow.py and parity_codes.py.
"""

import itertools
import pathlib
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jflow import registry
from jflow.generation.base import FAMILIES, Family, family
from jflow.interop import golden, parity_reading
from jflow.interop.checkpoints import describe
from jflow.interop.comparison import Line, line
from jflow.interop.golden import Group, Output
from jflow.interop.parity_reading import Runner
from jflow.models.unified import UnifiedModel, for_inference

TOLERANCE = 1e-5  # default relative L2 error
CROP = (slice(100, 164), slice(200, 264))  # rows and columns of a large picture
POOL = 8  # pixels along a side that are one mean


def groups(families: Iterable[Family]) -> list[Group]:
  """The groups of arrays that models of these families have, those of reading first."""
  own = itertools.chain.from_iterable(registry.load(each.parity) for each in families if each.parity)
  return [*parity_reading.GROUPS, *own]


def compare_model(checkpoint: str, path: pathlib.Path, tolerance: float) -> list[Line]:
  """Runs a checkpoint on the inputs of a golden file and compares.

  Raises:
    UserError: the file is unreadable, lacks an input or any output, or is of another model.
  """
  every = groups(FAMILIES.all().values())
  arrays = golden.without_ones(golden.read(path), every)
  golden.check(path, arrays, every)
  found = describe(checkpoint)
  known = groups([family(found.config.generation)])
  present = golden.check(path, arrays, known)
  golden.say_others(path, arrays, known)
  for group in present:
    group.fits(arrays, found.config)
  model, params = for_inference(
    UnifiedModel(found.config, jnp.dtype("float32"), remat="none", unroll=1, attention="xla"),
    found.read_params(),
  )
  bases = {golden.base(name) for name in arrays}
  ours: dict[str, Output] = {}
  with jax.default_matmul_precision("highest"):
    runner = Runner(model, jax.device_put(params))
    del params
    for group in present:
      ours |= group.run(runner, arrays, bases.__contains__)
  return compare(arrays, ours, present, tolerance)


def compare(
  arrays: Mapping[str, np.ndarray], ours: Mapping[str, Output], present: Iterable[Group], tolerance: float
) -> list[Line]:
  """Compares every output in the golden file, whole or as a variant (`_last4`, `_first8`, `_mean`, `_crop`,
  `_pooled`)."""
  lines = []
  for key, (component, _) in itertools.chain.from_iterable(group.outputs.items() for group in present):
    for name in arrays:
      if golden.base(name) == key and key in ours:  # else it is an input alone
        made = variant(ours[key], name, arrays[name].shape)
        limit = tolerance * made.loose
        lines.append(line(name, component, made.value, arrays[name], limit, _over_maps(made), made.within))
  return lines


def _over_maps(output: Output) -> np.ndarray | None:
  """The mask of an output; over a map [B, C, H, W], the mask of its tokens for every channel."""
  value, mask = output.value, output.mask
  if mask is None or value.ndim != 4 or mask.ndim != 2:
    return mask
  return np.broadcast_to(mask.reshape(len(mask), 1, *value.shape[2:]), value.shape)


def variant(output: Output, name: str, shape: tuple[int, ...]) -> Output:
  """The first or last tokens of an array, its mean over tokens, or a part of a picture, as the golden array has it.

  A map [B, C, H, W] has H * W tokens in raster order. Where that does not give `shape`, axis 1 is sliced instead, or
  the mean taken over all but the rows, or over all.
  """
  found = golden.VARIANT.search(name)
  if found is None:
    return output
  stored, mask = output.value, output.mask
  if not output.rows:  # tokens alone
    stored, mask = stored[None], None if mask is None else mask[None]
  side, count, mean, crop, _ = found.groups()
  tokens = stored if stored.ndim != 4 else stored.reshape(*stored.shape[:2], -1).swapaxes(1, 2)
  if mean:
    weight = np.ones(tokens.shape[:2]) if mask is None else mask
    weight = weight / weight.sum(axis=1, keepdims=True)
    first = np.einsum("bt...,bt->b...", tokens.astype(np.float64), weight)
    whole = stored.mean(axis=tuple(range(1, stored.ndim)), dtype=np.float64)
    options = [first, first[:, None], stored.mean(axis=1, dtype=np.float64), whole, whole.mean()]
    mask = None
  elif side:
    cut = slice(0, int(count)) if side == "first" else slice(-int(count), None)
    options = [tokens[:, cut], tokens[:, cut].swapaxes(1, -1), stored[:, cut]]
    mask = None if mask is None else mask[:, cut]
  elif stored.ndim != 4:
    options = [stored]  # no picture: its shape differs
  elif crop:
    options = [stored[..., *CROP]]
  else:
    b, c, h, w = stored.shape
    options = [stored.reshape(b, c, h // POOL, POOL, w // POOL, POOL).mean(axis=(3, 5), dtype=np.float64)]
  if not output.rows:
    options, mask = [x[0] if x.ndim else x for x in options], None if mask is None else mask[0]
  value = next((x for x in options if x.shape == shape), options[0])
  return output._replace(value=value, mask=mask)
