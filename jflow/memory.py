"""The memory that is available to this process."""

import contextlib
import os
import pathlib
import resource
from typing import Any

_CONTAINERS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def limit() -> int:
  """Returns the least of the machine's memory, its container's limit and the process's own, in bytes.

  Other processes on the machine are not subtracted.
  """
  limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
  for path in _CONTAINERS:
    with contextlib.suppress(OSError, ValueError):  # none, or "max"
      limits.append(int(pathlib.Path(path).read_text()))
  most = resource.getrlimit(resource.RLIMIT_AS)[0]
  if most != resource.RLIM_INFINITY:
    used = 0
    with contextlib.suppress(OSError, ValueError):
      used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits.append(most - used)
  return min(limits)


def of_device(device: Any, local: int) -> int | None:
  """Returns the bytes of a `jax.Device`; None where it does not say it.

  A CPU's, `local` of them, share the machine's.
  """
  there = (device.memory_stats() or {}).get("bytes_limit")
  return limit() // local if there is None and device.platform == "cpu" else there
