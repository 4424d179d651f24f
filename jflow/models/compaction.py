"""Compaction: the parts of a model run over the images that need them, up to a static capacity.

Each shard of a batch moves its chosen images together, so that nothing travels between devices.

Legend: B rows, M images of a row, S tokens of a row, Z shards of the batch, C places of a shard, I = Z * C places.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import sharding
from jflow.sharding import constrain


class Capacity(NamedTuple):
  """The most images that the rows of one device hold at once, at least 1 each; None: as many as there are slots."""

  read: int | None
  written: int | None
  all: int | None  # read or written
  segments: int | None = None  # of one row


def shards(rows: int) -> int:
  """Z: the number of parts that the ambient mesh cuts so many rows into."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return 1
  cut = sharding.named(mesh, ("batch",), (rows,)).spec[0]
  axes = () if cut is None else (cut,) if isinstance(cut, str) else cut
  return int(np.prod([mesh.shape[axis] for axis in axes], dtype=int))


class Chosen:
  """The images of a batch that a part runs over, each shard's in their order, behind them empty places.

  Attributes:
    real_I: bool[Z * C]; False at an empty place.
    fits: bool[]; whether no shard holds more than `most` images. Where it is False, images are missing.
  """

  def __init__(self, mask_BM: jax.Array, most: int | None = None):
    """Chooses the images of a mask; `most` per shard (C), None: as many as there are."""
    (self._rows, self._images), self._shards = mask_BM.shape, shards(mask_BM.shape[0])
    mask = mask_BM.reshape(self._shards, -1)
    self._slots = mask.shape[1]
    self.places = self._slots if most is None else min(most, self._slots)
    place = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    count = place[:, -1:] + 1
    self.fits = jnp.all(count <= self.places)
    self._place = jnp.where(mask, place, self.places)
    # The nth chosen one is at the first slot with n + 1 of them up to it; indices past the end are all different, so
    # that gradients are scattered without atomics.
    nth = jnp.arange(self.places)
    found = jax.vmap(lambda x: jnp.searchsorted(x, nth + 1))(place + 1)
    self._order = jnp.where(nth < count, found, self._slots + nth)
    self.real_I = (nth < count).reshape(-1)

  def take(self, x_BM: Any) -> jax.Array:
    """[B, M, ...] -> [I, ...]; zeros at empty places."""
    x = jnp.asarray(x_BM)
    return self._flat(_pick(x.reshape(self._shards, self._slots, *x.shape[2:]), self._order))

  def of(self, other: "Chosen", x: jax.Array) -> jax.Array:
    """The values at these images of an array over the images of `other`; zeros where it does not hold one."""
    if other is self:
      return x
    place, real = _pick(other._place, self._order), self.real_I.reshape(self._shards, -1)
    where = jnp.where(real & (place < other.places), place, other.places + jnp.arange(self.places))
    return self._flat(_pick(x.reshape(self._shards, other.places, *x.shape[1:]), where))

  def at(self, x_BSD: jax.Array, start_BM: Any, first: int, count: int) -> jax.Array:
    """[I, count, D], at the positions first, first + 1, ... counted from each image's first slot; zeros where empty."""
    b, s, d = x_BSD.shape
    row = (jnp.arange(b) % (b // self._shards))[:, None]
    start = _pick((row * s + jnp.asarray(start_BM)).reshape(self._shards, -1), self._order)
    inside, n = jnp.arange(count), b // self._shards * s
    empty = n + jnp.arange(self.places * count).reshape(self.places, count)
    real = self.real_I.reshape(self._shards, self.places, 1)
    where = jnp.where(real, start[..., None] + first + inside, empty).reshape(self._shards, -1)
    return self._flat(_pick(x_BSD.reshape(self._shards, n, d), where).reshape(self._shards, self.places, count, d))

  def spread(self, x_IKD: jax.Array, slot_BS: jax.Array, inside_BS: jax.Array) -> jax.Array:
    """[B, S, D]: what `at` takes, put back.

    Args:
      x_IKD: of the chosen images.
      slot_BS: int32, image of the row (0 to M - 1) that a position belongs to; -1: none of these, which gives zeros.
      inside_BS: int32, its number among the K of that image.
    """
    (b, s), k = slot_BS.shape, x_IKD.shape[1]
    row = (jnp.arange(b) % (b // self._shards))[:, None]
    slot = jnp.maximum(row * self._images + slot_BS, 0).reshape(self._shards, -1)
    place = jnp.take_along_axis(self._place, slot, axis=1)
    there = (slot_BS.reshape(self._shards, -1) >= 0) & (place < self.places)
    nowhere = self.places * k + jnp.arange(slot.shape[1])
    where = jnp.where(there, place * k + inside_BS.reshape(self._shards, -1), nowhere)
    table = x_IKD.reshape(self._shards, self.places * k, -1)
    return constrain(_pick(table, where).reshape(b, s, -1), "batch", None, None)

  def _flat(self, x: jax.Array) -> jax.Array:
    """[Z, C, ...] -> [I, ...]."""
    return constrain(x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), "batch", *[None] * (x.ndim - 2))


def _pick(x_ZN: jax.Array, index_ZQ: jax.Array) -> jax.Array:
  """x[z, index[z, q]]; zeros for an index past the end. The indices of a z differ from each other."""
  one = lambda x, i: jnp.take(x, i, axis=0, mode="fill", fill_value=0, unique_indices=True)
  return jax.vmap(one)(x_ZN, index_ZQ)
