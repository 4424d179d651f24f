"""The memory that a compiled step takes of a device, by kind, and the refusal of one that does not fit."""

import math
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jflow.errors import UserError
from jflow.models import lora

FEWER = (
  "fewer rows at once (train.batch_size, or more train.accumulation), shorter ones (data.row_tokens, data.row_images), "
  "compute.remat='full', fewer trained parameters (lora.rank above 0, or optimizer.frozen), lora.frozen_dtype='bfloat16', "
  "train.ema=0, or a larger mesh.fsdp"
)


def held(tree: Any) -> int:
  """Bytes of one device that a tree of `ShapeDtypeStruct` with shardings, or of arrays, takes."""
  of = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
  return sum(map(of, jax.tree.leaves(tree)))


def by_kind(state: Any, batch: Any, needed: int) -> dict[str, int]:
  """Returns the bytes of one device by kind; their sum is `needed`, which the compiled step takes in all.

  Gradients are counted once; what accumulation and the compiler hold besides is among the activations, which are those
  of the peak.
  """
  flat = flatten_dict({**state.trained}, sep="/")
  adapters = {path: x for path, x in flat.items() if lora.is_adapter(path)}
  found = {
    "frozen weights": held(state.frozen),
    "trained weights": held(flat) - held(adapters),
    "adapters": held(adapters),
    "averages": held(state.ema),
    "moments": held(state.optimizer),
    "batch": held(batch),
    "gradients": held(state.trained),
  }
  return found | {"activations": max(needed - sum(found.values()), 0)}


def told(kinds: dict[str, int], needed: int, limit: int | None) -> str:
  """Describes the memory of a step in a line; kinds that take none are left out."""
  there = f" that has {size(limit)} for it" if limit is not None else ""
  parts = ", ".join(f"{name} {size(count)}" for name, count in kinds.items() if count)
  return f"a step takes {size(needed)} of a device{there}: {parts}"


def check(kinds: dict[str, int], needed: int, limit: int | None) -> None:
  """Checks that a step fits.

  Raises:
    UserError: it takes more than `limit` bytes of a device.
  """
  if limit is not None and needed > limit:
    raise UserError(f"{told(kinds, needed, limit)}; it must be less: {FEWER}")


def size(count: int) -> str:
  """A number of bytes in GiB, small ones in MiB."""
  return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
