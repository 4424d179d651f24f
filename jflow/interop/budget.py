"""How much memory a model may ask for: what this machine, its container and the process's own limit have at most."""

from typing import Any

from jflow import memory
from jflow.errors import UserError


def check(needed: int, where: Any) -> None:
  """Refuses weights that cannot fit, before any of them is read.

  Args:
    needed: bytes.
    where: they lie.

  Raises:
    UserError: naming the bytes on both sides.
  """
  most = memory.limit()
  if needed > most:
    raise UserError(f"{where}: its weights take {needed:,} bytes of memory, and there are {max(most, 0):,} here")
