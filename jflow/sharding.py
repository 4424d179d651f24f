"""The mesh, the table from logical axes to mesh axes, and sharded creation.

The mesh axes are always ("data", "fsdp", "model"); a size of 1 means off. Logical axis names are beside
each weight's shape in `jflow/models/`. A batch is cut over data x fsdp, a weight over fsdp x model.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import struct
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jflow.errors import UserError

MESH_AXES = ("data", "fsdp", "model")

# Logical axis -> mesh axis. A name that is missing here is an error, never "replicated".
RULES: dict[str, str | tuple[str, ...] | None] = {
  "batch": ("data", "fsdp"),
  "group": "data",  # rows of all devices that hold a weight together
  "sequence": None,
  "layers": None,
  "vocab": "model",
  "embed": "fsdp",  # width of the residual stream of the LLM and of SigLIP
  "heads": "model",
  "kv_heads": "model",
  "mlp": "model",
  "channels": "fsdp",  # width of the ConvNeXt stacks
  "replicated": None,
}


class Boxed(struct.PyTreeNode, nn.meta.AxisMetadata):
  """A value with its logical axis names and its initialiser; lives only while initialisers are traced.

  A value with an `init` is what that made, at most cast to another type.
  """

  value: Any
  names: tuple[str | None, ...] = struct.field(pytree_node=False)
  init: Any = struct.field(pytree_node=False, default=None)

  def unbox(self) -> Any:
    return self.value

  def replace_boxed(self, val: Any) -> "Boxed":
    return self.replace(value=val)

  def add_axis(self, index: int, params: dict[Any, Any]) -> "Boxed":
    names = list(self.names)
    names.insert(index, "layers")
    return self.replace(names=tuple(names))

  def remove_axis(self, index: int, params: dict[Any, Any]) -> "Boxed":
    names = list(self.names)
    names.pop(index)
    return self.replace(names=tuple(names))


def boxed(init: Callable[..., jax.Array], names: tuple[str | None, ...]) -> Callable[..., Any]:
  """Returns `init` with its result boxed with one logical axis name (or None) per dimension."""
  for name in names:
    if name is not None and name not in RULES:
      raise ValueError(f"unknown logical axis {name!r}; known: {sorted(RULES)}")
  return lambda *args, **kwargs: Boxed(init(*args, **kwargs), names, init)


def make_mesh(data: int, fsdp: int, model: int, devices: list[jax.Device] | None = None) -> Mesh:
  """Returns the mesh [data, fsdp, model] over `devices` (default: all).

  Raises:
    UserError: a size below 1, sizes whose product is not the number of devices, slices of a TPU cluster that
      mesh.data cannot be spread over.
  """
  devices = jax.devices() if devices is None else devices
  sizes = (data, fsdp, model)
  if min(sizes) < 1 or int(np.prod(sizes)) != len(devices):
    raise UserError(
      f"mesh.data x mesh.fsdp x mesh.model = {data} x {fsdp} x {model} does not equal the {len(devices)} "
      f"{devices[0].platform} device(s); choose sizes of at least 1 whose product is {len(devices)}"
    )
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if data % slices and devices[0].platform == "tpu":
    raise UserError(f"mesh.data={data} must be a multiple of the {slices} slices that the devices lie in")
  if slices == 1 or data % slices:  # GPUs count each node as a slice, and a group may span several
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  else:  # only gradients may cross the slow network between slices, once per step
    grid = mesh_utils.create_hybrid_device_mesh(
      (data // slices, fsdp, model), (slices, 1, 1), devices, allow_split_physical_axes=True
    )
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def named(mesh: Mesh | AbstractMesh, names: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
  """Translates logical names into a sharding; a dimension that the mesh axis does not divide stays whole."""
  spec, used = [], set()
  for name, size in zip(names, shape, strict=True):
    axis = RULES[name] if name is not None else None
    axes = (axis,) if isinstance(axis, str) else (axis or ())
    axes = tuple(a for a in axes if a not in used)
    parts = int(np.prod([mesh.shape[a] for a in axes], dtype=int))
    if parts > 1 and size % parts == 0:
      used.update(axes)
      spec.append(axes if len(axes) > 1 else axes[0])
    else:
      spec.append(None)
  return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of every array of a `Batch`: axis 0 over data x fsdp."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def local_rows(mesh: Mesh, rows: int) -> list[int]:
  """Returns the indices of the rows, of a batch of `rows`, that this process's devices hold, in their order there."""
  slices = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
  return sorted({place for (part,) in filter(None, slices) for place in range(*part.indices(rows))})


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of scalars and of arrays that every device holds in full."""
  return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Pins an activation to the table's axes under the ambient mesh (`jax.set_mesh`); without one, `x` itself."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, named(mesh, names, x.shape))


def whole(weight: jax.Array, *names: str | None) -> jax.Array:
  """All-gathers a weight over `fsdp`, still cut over `model`, for a matmul; its gradient is cut like the weight.

  Otherwise the compiler cuts activations by channels, as the weight is: it then moves all of them between all devices,
  and each device receives more, the more devices there are.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return weight
  used = tuple(name if name is not None and RULES[name] == "model" else None for name in names)
  return _gathered(weight, named(mesh, used, weight.shape), named(mesh, names, weight.shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(weight: jax.Array, used: NamedSharding, kept: NamedSharding) -> jax.Array:
  return jax.lax.with_sharding_constraint(weight, used)


_gathered.defvjp(
  lambda weight, used, kept: (_gathered(weight, used, kept), None),
  lambda used, kept, _, gradient: (jax.lax.with_sharding_constraint(gradient, kept),),
)


def shardings(mesh: Mesh, abstract: Any) -> Any:
  """Returns the tree of shardings for a tree of `Boxed` or plain `ShapeDtypeStruct` leaves (plain: replicated).

  A box may be empty: the moments of a parameter that another optimizer updates (`optax.MaskedNode`).
  """

  def leaf(x: Any) -> Any:
    if not isinstance(x, Boxed):
      return replicated(mesh)
    return jax.tree.map(lambda value: named(mesh, x.names, value.shape), x.value)

  return jax.tree.map(leaf, abstract, is_leaf=lambda x: isinstance(x, Boxed))


def unbox(tree: Any) -> Any:
  """Drops the boxes of a tree."""
  return nn.meta.unbox(tree)
