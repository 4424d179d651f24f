"""Initialisers, and fresh parameters on their shards.

XLA needs 0.1 s to compile one draw of an array, whatever its size, and a model of a megabyte has a hundred. The small
arrays are therefore drawn by one program over all of their elements, with the bits that `jax.random` gives each of
them; those that are worth a program of their own, and those of other initialisers, are drawn where they stay.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jflow import sharding

_LARGE = 1 << 18  # elements
_UNKNOWN = object()


@dataclasses.dataclass(frozen=True)
class Normal:
  """The initialiser stddev * N(0, 1); without `stddev` LeCun's: N(0, 1) cut at two sigmas, of variance 1 / inputs."""

  stddev: float | None = None

  def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    flax = nn.initializers.lecun_normal() if self.stddev is None else nn.initializers.normal(self.stddev)
    return flax(key, shape, dtype)

  def scale(self, shape: tuple[int, ...]) -> np.float32:
    """The factor of the draws of an array of a layer."""
    if self.stddev is not None:
      return np.float32(self.stddev)
    return np.sqrt(np.float32(1.0 / math.prod(shape[:-1]))) / np.float32(0.87962566103423978)  # sigma of N cut at 2


def create(make: Callable[[], Any], mesh: jax.sharding.Mesh) -> Any:
  """Creates the leaves of `make()`, which may be `sharding.Boxed`, each on its shards.

  The values are those of `jax.jit(make)`: on the same kind of device they are a function of nothing else.
  """
  program, boxed = jax.make_jaxpr(make, return_shape=True)()
  boxes, tree = jax.tree.flatten(boxed, is_leaf=lambda x: isinstance(x, sharding.Boxed))
  places = jax.tree.leaves(sharding.shardings(mesh, boxed))
  keys = _origins(program.jaxpr, program.consts, [])
  small = [i for i, box in enumerate(boxes) if _is_small(box, keys[i])]
  # An initialiser runs once: on a CPU, compiling it with full optimisation costs more than it saves.
  quick = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
  normal = jax.jit(_normal, static_argnames="cut", compiler_options=quick)
  with jax.default_device(mesh.local_devices[0]):
    drawn = _draw([boxes[i] for i in small], [keys[i] for i in small], normal)
  made: dict[int, Any] = dict(zip(small, drawn, strict=True))
  for i, x in made.items():
    made[i] = jax.make_array_from_callback(x.shape, places[i], x.__getitem__)
  large = [i for i in range(len(boxes)) if i not in made]
  if large:

    def leaves() -> list[jax.Array]:  # what is not returned is not computed
      all_of_them = jax.tree.leaves(make())
      return [all_of_them[i] for i in large]

    there = [places[i] for i in large]
    made |= zip(large, jax.jit(leaves, out_shardings=there, compiler_options=quick)(), strict=True)
  return tree.unflatten([made[i] for i in range(len(boxes))])


def _is_small(box: Any, key: Any) -> bool:
  """Whether `_draw` can make an array, and a program of its own would not pay."""
  if not isinstance(box, sharding.Boxed) or box.value.size >= _LARGE or key is _UNKNOWN:
    return False
  if key is None:
    return box.init in (nn.initializers.zeros, nn.initializers.ones)
  counts = str(jax.random.key_impl(key)) == "threefry2x32" and jax.config.jax_threefry_partitionable  # type: ignore
  return counts and isinstance(box.init, Normal)


def _is_key(x: Any) -> bool:
  return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _origins(jaxpr: Any, consts: list[Any], values: list[Any]) -> list[Any]:
  """The key that each result of a program was drawn with; of a scan's, one for each iteration.

  None for a constant, `_UNKNOWN` where a key is not made from literals and keys alone: only these are computed.
  """
  found = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))
  read = lambda v: v.val if hasattr(v, "val") else found[v]
  for e in jaxpr.eqns:
    given = [read(v) for v in e.invars]
    keys = [x for x in given if x is _UNKNOWN or _is_key(x)]
    if e.primitive.name == "scan":
      made = _origins_of_scan(e.params, given)
    elif not any(_is_key(v.aval) for v in e.outvars):
      made = [keys[0] if keys else None] * len(e.outvars)
    elif any(x is None or x is _UNKNOWN for x in given):
      made = [_UNKNOWN] * len(e.outvars)
    else:
      made = e.primitive.bind(*given, **e.params)
      made = made if e.primitive.multiple_results else [made]
    found |= zip(e.outvars, made, strict=True)
  return [x if x is _UNKNOWN or _is_key(x) else None for x in map(read, jaxpr.outvars)]


def _origins_of_scan(params: dict[str, Any], given: list[Any]) -> list[Any]:
  """`_origins` of a scan's results; keys do not travel in its carry."""
  body, fixed = params["jaxpr"], params["num_consts"] + params["num_carry"]
  at = lambda x, i: x[i] if _is_key(x) and x.ndim else x  # a loop over what one key has made
  consts = getattr(body, "consts", [])
  layers = [
    _origins(body.jaxpr, consts, given[:fixed] + [at(x, i) for x in given[fixed:]]) for i in range(params["length"])
  ]
  return [jnp.stack(same) if _is_key(same[0]) else same[0] for same in zip(*layers, strict=True)]


def _draw(boxes: list[sharding.Boxed], keys: list[Any], normal: Callable[..., jax.Array]) -> list[np.ndarray]:
  """The arrays of boxes that `_is_small` lets pass, each drawn by `_normal` with its key, or with one for each
  layer."""
  made = [np.full(b.value.shape, b.init is nn.initializers.ones, b.value.dtype) for b in boxes]
  for cut in (True, False):
    chosen = [i for i, b in enumerate(boxes) if isinstance(b.init, Normal) and (b.init.stddev is None) == cut]
    if not chosen:
      continue
    words, index, scale = [], [], []
    for i in chosen:
      own = np.asarray(jax.random.key_data(keys[i])).reshape(-1, 2)
      size = made[i].size // len(own)
      words.append(np.repeat(own, size, 0))
      index.append(np.tile(np.arange(size, dtype=np.uint32), len(own)))
      shape = made[i].shape[1:] if keys[i].ndim else made[i].shape
      scale.append(np.full(made[i].size, boxes[i].init.scale(shape)))
    flat = normal(*map(np.concatenate, (words, index, scale)), cut=cut)
    ends = np.cumsum([made[i].size for i in chosen])
    for i, x in zip(chosen, np.split(np.asarray(flat), ends[:-1]), strict=True):
      made[i] = x.reshape(made[i].shape).astype(made[i].dtype)
  return made


def _normal(words: jax.Array, index: jax.Array, scale: jax.Array, cut: bool) -> jax.Array:
  """Elements of normal draws times `scale`: element `index` of what a key draws, as jax.random computes them.

  Args:
    words: uint32[N, 2], the data of the keys.
    index: uint32[N].
    scale: f32[N].
    cut: at two sigmas, as `jax.random.truncated_normal(key, -2, 2)`; False: `jax.random.normal`.
  """
  drawn = jax.random.key_data(jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(words), index))
  bits = drawn[:, 0] ^ drawn[:, 1]  # as jax_threefry_partitionable makes them
  uniform = jax.lax.bitcast_convert_type((bits >> 9) | np.float32(1).view(np.uint32), jnp.float32) - 1.0
  root = np.float32(np.sqrt(2))
  if not cut:
    low = np.nextafter(np.float32(-1), np.float32(0))
    # XLA merges the two factors of what flax multiplies, and so do we.
    return jax.lax.erf_inv(jnp.maximum(uniform * (1 - low) + low, low)) * (root * scale)
  low, high = jax.lax.erf(-2 / root), jax.lax.erf(2 / root)
  x = root * jax.lax.erf_inv(jnp.maximum(uniform * (high - low) + low, low))
  return jnp.clip(x, np.nextafter(np.float32(-2), np.float32(0)), np.nextafter(np.float32(2), np.float32(0))) * scale
