"""Peak numbers of accelerators, as their vendors publish them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """The published peaks of one chip."""

  platform: str  # "tpu" or "gpu"
  peak_flops: float  # dense bf16, per second
  memory_bytes: float
  memory_bandwidth: float  # bytes per second
  link_bandwidth: float  # bytes per second and direction, to the other chips of the slice or of the host
  rank: int  # dimensions of a topology: TPU X x Y or X x Y x Z, GPU hosts x gpus


_GB, _GIB = 1e9, 2.0**30
CHIPS = {
  "v4": Chip("tpu", 275e12, 32 * _GIB, 1228 * _GB, 300 * _GB, 3),
  "v5e": Chip("tpu", 197e12, 16 * _GIB, 819 * _GB, 200 * _GB, 2),
  "v5p": Chip("tpu", 459e12, 95 * _GIB, 2765 * _GB, 600 * _GB, 3),
  "v6e": Chip("tpu", 918e12, 32 * _GIB, 1640 * _GB, 400 * _GB, 2),
  "a100": Chip("gpu", 312e12, 80 * _GB, 2039 * _GB, 300 * _GB, 2),
  "h100": Chip("gpu", 989e12, 80 * _GB, 3352 * _GB, 450 * _GB, 2),
  "h200": Chip("gpu", 989e12, 141 * _GB, 4800 * _GB, 450 * _GB, 2),
}
BETWEEN_HOSTS = 50 * _GB  # bytes per second, GPU and direction, between hosts: one 400 Gb/s adapter per GPU

# `device.device_kind` of a chip -> its name here.
_KINDS = {
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "A100": "a100",
  "H100": "h100",
  "H200": "h200",
}


def of(device_kind: str) -> Chip | None:
  """The chip of a device by its kind; None where no table has it (a CPU)."""
  if device_kind in _KINDS:
    return CHIPS[_KINDS[device_kind]]
  return next((CHIPS[n] for part, n in _KINDS.items() if n[0] in "ah" and part in device_kind), None)


def peak_flops(device_kind: str) -> float | None:
  """Dense bf16 FLOP/s of a device by its kind; None where no table has it (a CPU)."""
  chip = of(device_kind)
  return chip and chip.peak_flops
