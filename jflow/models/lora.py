"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685): y = x W + (alpha / rank) (x A) B beside a frozen W.

An adapter is a property of the parameters, not of a module: three leaves beside a `kernel`, which `layers.Linear` uses
where they are there. So the optimizer, checkpoints and meshes treat adapters as any other parameters. Not by qwix, which
intercepts the products of a module's call and names variables of its own: here the tree of parameters alone says what is adapted,
as what reads, merges and exports a checkpoint without building the model needs it.

  lora_a      f32[in, rank], or f32[L, in, rank] in a stack of L layers; normal with deviation in^-1/2
  lora_b      f32[rank, out]; zeros, so that a fresh adapter changes nothing
  lora_scale  f32[], alpha / rank; never trained

Legend: L layers of a stack.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jflow.errors import UserError
from jflow.models.initial import Normal
from jflow.sharding import Boxed
from jflow.values import path_pattern

TRAINED = ("lora_a", "lora_b")
SCALE = "lora_scale"
NAMES = (*TRAINED, SCALE)


def is_adapter(path: str) -> bool:
  """Whether a parameter's path is that of an adapter's leaf."""
  return path.rpartition("/")[2] in NAMES


def added(boxed: Mapping[str, Any], patterns: Sequence[str], rank: int, alpha: float, seed: int) -> dict[str, Any]:
  """The parameters with fresh adapters beside every matrix that a pattern names.

  Args:
    boxed: nested initial parameters as `sharding.Boxed`, see `build.initial_params`.
    patterns: regular expressions that match the beginning of a path ("language_model/layers/mlp/up/kernel") up to a
      "/" or its end. They may match more than matrices.
    rank: of the adapters, at least 1.
    alpha: the adapter's output is scaled by alpha / rank.
    seed: an adapter depends on it and on its path alone.

  Raises:
    UserError: a pattern that matches no matrix, or a rank above a side of a matrix.
  """
  flat: dict[str, Any] = flatten_dict(dict(boxed), sep="/")
  matrices = [path for path, x in flat.items() if _is_matrix(path, x)]
  chosen: dict[str, None] = {}
  for pattern in patterns:
    compiled = path_pattern(pattern)
    hits = [path for path in matrices if compiled.match(path)]
    if not hits:
      raise UserError(f"config.lora.patterns: {pattern!r} matches no matrix; {_near(pattern, matrices)}")
    chosen |= dict.fromkeys(hits)
  for path in chosen:
    kernel = flat[path]
    *stack, into, out = kernel.value.shape
    if rank > min(into, out):
      raise UserError(f"config.lora.rank={rank} must be at most {min(into, out)}, the smaller side of {path}")
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
    normal, zeros = Normal(into**-0.5), jax.nn.initializers.zeros
    before, (rows, columns) = kernel.names[:-2], kernel.names[-2:]
    place = path.removesuffix("kernel")
    flat[place + "lora_a"] = Boxed(normal(key, (*stack, into, rank), jnp.float32), (*before, rows, None), normal)
    flat[place + "lora_b"] = Boxed(zeros(key, (*stack, rank, out), jnp.float32), (*before, None, columns), zeros)
    flat[place + SCALE] = Boxed(jnp.full(tuple(stack), alpha / rank, jnp.float32), before)
  return unflatten_dict(flat, sep="/")


def _is_matrix(path: str, leaf: Any) -> bool:
  """Whether a parameter is the kernel of a `Linear`, alone or in a stack of layers."""
  layers = len(leaf.names) == 3 and leaf.names[0] == "layers"
  return path.rpartition("/")[2] == "kernel" and (len(leaf.names) == 2 or layers)


def _near(pattern: str, matrices: Sequence[str]) -> str:
  """A hint: the matrices of the part that a pattern begins with, or the parts that there are."""
  inside = [path.removesuffix("/kernel") for path in matrices if path.split("/")[0] == pattern.split("/")[0]]
  parts = sorted({path.split("/")[0] for path in matrices})
  return f"those there are {', '.join(inside[:8])}" if inside else f"parts with matrices are {', '.join(parts)}"


def parts(params: Mapping[str, Any]) -> set[str]:
  """The first parts of the paths of parameters that are no adapters."""
  return {path[0] for path in flatten_dict(dict(params)) if path[-1] not in NAMES}


def low_rank(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
  """scale (x A) B, [..., out] in `dtype`."""
  return jnp.dot(jnp.dot(x.astype(dtype), a.astype(dtype)) * scale.astype(dtype), b.astype(dtype))


def merged(params: Mapping[str, Any]) -> dict[str, Any]:
  """Nested parameters with every adapter added to its matrix, in float32: W + (alpha / rank) A B.

  Matrices without an adapter are those given, not copies. Works on NumPy and JAX arrays.
  """
  flat: dict[str, Any] = flatten_dict(dict(params), sep="/")
  for path in [path for path in flat if path.rpartition("/")[2] == SCALE]:
    place = path.removesuffix(SCALE)
    a, b, scale = (flat.pop(place + name) for name in NAMES)
    xp = np if isinstance(a, np.ndarray) else jnp
    change = xp.matmul(a.astype(np.float32), b.astype(np.float32)) * xp.asarray(scale)[..., None, None]
    flat[place + "kernel"] = flat[place + "kernel"].astype(np.float32) + change
  return unflatten_dict(flat, sep="/")


def check_complete(shapes: Mapping[str, tuple[int, ...]], where: Any) -> None:
  """Checks the adapters of a checkpoint against their matrices.

  Args:
    shapes: path -> shape of all of its parameters.
    where: the checkpoint, for the message.

  Raises:
    UserError: a leaf is missing, or does not fit its matrix.
  """
  for path in filter(is_adapter, shapes):
    place = path.rpartition("/")[0]
    a, b, scale, kernel = (shapes.get(f"{place}/{name}") for name in (*NAMES, "kernel"))
    if a is None or b is None or scale is None or kernel is None:
      raise UserError(f"checkpoint {where}: the adapter {place} must have {', '.join(NAMES)} beside a kernel")
    rank = a[-1]
    if (a, b, scale) != ((*kernel[:-1], rank), (*kernel[:-2], rank, kernel[-1]), kernel[:-2]):
      raise UserError(f"checkpoint {where}: the adapter {place} has shapes {a}, {b}, {scale}, its kernel {kernel}")
