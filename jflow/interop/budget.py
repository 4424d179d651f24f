"""The memory limit of a model: the least of this machine's, its container's and the process's own."""

from typing import Any

from jflow import memory
from jflow.errors import UserError


def check(needed: int, where: Any) -> None:
  """Refuses weights that cannot fit into memory, before any is read.

  Args:
    needed: bytes.
    where: file or directory of the weights, for the message.

  Raises:
    UserError: `needed` exceeds the limit; both are named.
  """
  most = memory.limit()
  if needed > most:
    raise UserError(f"{where}: its weights take {needed:,} bytes of memory, and there are {max(most, 0):,} here")
