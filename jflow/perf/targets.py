"""Hardware that a step can be compiled for without having it, with the vendors' figures."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from jflow.chips import BETWEEN_HOSTS, CHIPS, Chip
from jflow.errors import UserError, install_line


@dataclasses.dataclass(frozen=True)
class Topology:
  """A topology KIND:DIMS, for example v5e:4x4, v5p:2x2x4, h100:4x8 (4 hosts of 8)."""

  name: str
  kind: str
  shape: tuple[int, ...]

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]

  @property
  def chips(self) -> int:
    return math.prod(self.shape)

  @property
  def mesh(self) -> tuple[int, int, int]:
    """The default mesh: fsdp inside a host of GPUs or over up to 16 TPU chips, data beyond."""
    inner = self.shape[-1] if self.chip.platform == "gpu" else math.gcd(self.chips, 16)
    return self.chips // inner, inner, 1

  @classmethod
  def parse(cls, name: str) -> "Topology":
    """Reads KIND:DIMS.

    Raises:
      UserError: the kind is unknown, or the number of dimensions is wrong.
    """
    kind, _, text = name.partition(":")
    if kind not in CHIPS:
      raise UserError(f"--topology={name}: unknown chip {kind!r}; known: {', '.join(CHIPS)}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text) or text.count("x") + 1 != CHIPS[kind].rank:
      example = {"tpu2": "4x4", "tpu3": "2x2x4", "gpu2": "1x8 (hosts x GPUs)"}
      like = example[f"{CHIPS[kind].platform}{CHIPS[kind].rank}"]
      raise UserError(f"--topology={name}: {kind} takes {CHIPS[kind].rank} dimensions, as {kind}:{like}")
    return cls(name, kind, tuple(int(x) for x in text.split("x")))

  def link(self, axes: str, mesh: dict[str, int]) -> float:
    """Bandwidth of a collective over these mesh axes ("data+fsdp"), in bytes per second and direction."""
    if self.chip.platform == "tpu":
      return self.chip.link_bandwidth
    inside, within = self.shape[-1], 1
    for axis in reversed(mesh):  # the last axes lie inside a host
      within *= mesh[axis]
      if axis in axes.split("+") and within > inside:
        return BETWEEN_HOSTS
    return self.chip.link_bandwidth


def quiet_environment() -> None:
  """Sets the environment, before jax starts, so that no device is opened and libtpu does not query its host."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def devices(topology: Topology) -> list[Any]:
  """Compile-only devices of a topology.

  Raises:
    UserError: the compiler for it is not installed, or the topology does not exist.
  """
  from jax.experimental import topologies

  gpu = topology.chip.platform == "gpu"
  if not gpu and importlib.util.find_spec("libtpu") is None:
    raise UserError(f"compiling for TPU needs libtpu, which runs anywhere: {install_line('compile')}")
  if gpu and not any(map(_is_installed, ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"))):
    raise UserError(
      "compiling for GPU needs jax's CUDA plugin, without a GPU: pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt"
    )
  try:
    if gpu:
      found = topologies.get_topology_desc(
        platform="cuda",
        topology_name=topology.kind,
        target_config=_gpu(topology.kind),
        topology="x".join(map(str, (1, *topology.shape))),
      )
    else:
      found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
  except Exception as error:  # jax raises several kinds
    first = str(error).strip().splitlines()[0]
    raise UserError(f"--topology={topology.name} does not exist, says its compiler: {first}") from error
  return list(found.devices)


def _is_installed(module: str) -> bool:
  """Whether there is a module; `find_spec` itself raises where the package around it is missing."""
  package = module.partition(".")[0]
  return importlib.util.find_spec(package) is not None and importlib.util.find_spec(module) is not None


def make_mesh(topology: Topology, sizes: tuple[int, int, int]) -> Any:
  """The mesh over a topology; neighbours on `model` and `fsdp` are neighbours in the machine.

  Raises:
    UserError: the sizes do not multiply to the number of chips.
  """
  from jax.experimental import mesh_utils
  from jax.sharding import AxisType, Mesh

  from jflow.sharding import MESH_AXES

  if math.prod(sizes) != topology.chips:
    raise UserError(
      f"mesh.data x mesh.fsdp x mesh.model = {' x '.join(map(str, sizes))} is not the {topology.chips} chips of "
      f"{topology.name}"
    )
  found = devices(topology)
  if topology.chip.platform == "tpu":
    array = mesh_utils.create_device_mesh(sizes, found, allow_split_physical_axes=True)
  else:
    array = np.array(found).reshape(sizes)
  return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@contextlib.contextmanager
def absent_gpu(topology: Topology) -> Iterator[None]:
  """Patches jax so that its kernels query the topology's GPU and not the one present."""
  if topology.chip.platform != "gpu":
    yield
    return
  from jax._src.cudnn import fused_attention_stablehlo as fused

  major = 8.0 if topology.kind == "a100" else 9.0
  replaced = {
    (fused, "check_compute_capability"): lambda needed: major >= float(needed),
    (fused, "is_cuda_compute_capability_equal"): lambda other: major == float(other),
    (fused, "check_cudnn_version"): lambda: 91000,
  }
  if importlib.util.find_spec("jax._src.pallas.triton.gpu_info"):  # from jax 0.11 on
    from jax._src.pallas.triton import gpu_info

    found = gpu_info.get_gpu_info_from_version(gpu_info.GpuVersion[topology.kind.upper()])
    replaced[gpu_info, "get_gpu_info"] = lambda: found
  kept = {key: getattr(*key) for key in replaced}
  try:
    for key, function in replaced.items():
      setattr(*key, function)
    yield
  finally:
    for key, function in kept.items():
      setattr(*key, function)


def _gpu(kind: str) -> str:
  """XLA's description of a GPU as text, from public data sheets."""
  hopper, chip = kind != "a100", CHIPS[kind]
  return f"""gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: {233472 if hopper else 167936} threads_per_core_limit: 2048
 core_count: {132 if hopper else 108} fpus_per_core: {128 if hopper else 64}
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
 memory_bandwidth: {int(chip.memory_bandwidth)} l2_cache_size: {52428800 if hopper else 41943040}
 clock_rate_ghz: {1.98 if hopper else 1.41} device_memory_size: {int(chip.memory_bytes)}
 shared_memory_per_block_optin: {232448 if hopper else 166912}
 cuda_compute_capability {{ major: {9 if hopper else 8} minor: 0 {"feature_extension: ACCELERATED_FEATURES" if hopper else ""} }}
 registers_per_core_limit: 65536 registers_per_block_limit: 65536 thread_dim_limit_x: 1024
 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation" device_address_bits: 64
 ecc_enabled: true platform_version: "Compute Capability {"9.0a" if hopper else "8.0"}" name: "{kind}"
 driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0" }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{kind}" """
