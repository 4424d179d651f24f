"""How much memory a model may ask for: what this machine, its container and the process's own limit have at most."""

import contextlib
import os
import pathlib
import resource
from typing import Any

from jflow.errors import UserError

_CONTAINERS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory() -> int:
  """Bytes that this process could come to hold, if nothing else ran here."""
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


def check(needed: int, where: Any) -> None:
  """Refuses weights that cannot fit, before any of them is read.

  Args:
    needed: bytes.
    where: they lie.

  Raises:
    UserError: naming the bytes on both sides.
  """
  most = memory()
  if needed > most:
    raise UserError(
      f"{where}: its weights take {needed:,} bytes of memory, and there are {max(most, 0):,} here"
    )
