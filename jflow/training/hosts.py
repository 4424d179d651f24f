"""The processes of a run: their start, their agreement, and their common end.

The processes start with the same command; only process 0 writes, except for checkpoints. A single process needs none
of this.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jflow.config import DistributedConfig
from jflow.errors import Stopped, UserError

# Error messages of a collective whose peer is gone.
_LOST = re.compile("closed by peer|reset by peer|connection refused|heartbeat|UNAVAILABLE", re.IGNORECASE)

# Seconds that processes wait for each other at the end: process 0 may still finish a checkpoint or sample images.
_FAREWELL = 1800


def start(config: DistributedConfig) -> None:
  """Joins the processes of the run. `config` is the section `distributed`.

  Raises:
    UserError: fields that do not fit, a cluster that was not found, processes that did not connect.
  """
  detect, processes = config.cluster == "auto", config.processes
  if not detect and processes == 1:
    tasks, task = os.environ.get("SLURM_STEP_NUM_TASKS", "1"), os.environ.get("SLURM_PROCID", "0")
    if tasks != "1":
      raise UserError(
        f"this is task {task} of {tasks} of a Slurm step; add --config.distributed.cluster=auto, so that they "
        "train one model together"
      )
    return
  jax.config.update("jax_enable_preemption_service", False)  # its handler would replace the loop's for SIGTERM
  try:
    jax.distributed.initialize(
      coordinator_address=None if detect else config.coordinator,
      num_processes=None if detect else processes,
      process_id=None if detect else config.process_id,
      cluster_detection_method=None if detect else "deactivate",
      initialization_timeout=config.start_seconds,
      heartbeat_timeout_seconds=config.heartbeat_seconds,
      shutdown_timeout_seconds=_FAREWELL,
    )
  except (ValueError, RuntimeError) as error:  # the second is jax's own error too
    reason = str(error).splitlines()[0]
    if detect and isinstance(error, ValueError):
      reason = "jax knows no cluster by this environment (Slurm, TPU, Open MPI); set distributed.coordinator"
    raise UserError(f"config.distributed: the processes of the run did not come together: {reason}") from error


def is_first() -> bool:
  """Whether this is process 0, which alone writes files besides checkpoints and prints messages besides errors."""
  return jax.process_index() == 0


def say(message: str) -> None:
  """Prints one line on stderr, once for all processes."""
  if is_first():
    print(f"jflow: {message}", file=sys.stderr, flush=True)


def any_of(flag: bool) -> bool:
  """Whether `flag` holds on at least one process. Waits for all of them."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def total(number: int) -> int:
  """The sum of a number over all processes. Waits for all of them."""
  if jax.process_count() == 1:
    return number
  return int(np.sum(multihost_utils.process_allgather(np.asarray(number, np.int32))))


def from_first(numbers: list[int]) -> list[int]:
  """Returns process 0's list. Waits for all processes."""
  if jax.process_count() == 1:
    return numbers
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
  own = np.zeros(length, np.int32)
  if is_first():
    own[:] = numbers
  return multihost_utils.broadcast_one_to_all(own).tolist()


def tree_of_first(tree: Any) -> Any:
  """Returns process 0's tree of numpy arrays; the others pass one of the same shapes. Waits for all processes."""
  return tree if jax.process_count() == 1 else jax.device_get(multihost_utils.broadcast_one_to_all(tree))


def on_host(tree: Any) -> Any:
  """Gathers a sharded tree into numpy arrays. All processes call it."""
  return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def first_alone(action: Callable[[], Any]) -> Any:
  """Runs `action` on process 0 while the others wait; returns its result there and None elsewhere.

  If it raises, the run ends everywhere: process 0 raises the error, the others end without a message.
  """
  if jax.process_count() == 1:
    return action()
  result, error = None, None
  if is_first():
    try:
      result = action()
    except Exception as caught:
      error = caught
  if any_of(error is not None):
    jax.distributed.shutdown()  # all processes are here, so none waits for another
    raise error or SystemExit(2)
  return result


def leave(error: BaseException) -> None:
  """Ends this process at once, if it is one of several: the others only notice its end.

  Python's own exit would first wait for the others.
  """
  if not jax.distributed.is_initialized() or jax.process_count() == 1:
    return
  code = 2 if isinstance(error, UserError) else 1
  own = f"jflow: process {jax.process_index()}"
  if isinstance(error, (UserError, Stopped)):
    print(f"{own}: {error}", file=sys.stderr)
  elif isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error)):
    reason = str(error).splitlines()[0]
    print(f"{own} ends because another one has ended, whose message says why ({reason})", file=sys.stderr)
  else:
    print(f"{own} ends by this error:", file=sys.stderr)
    sys.excepthook(type(error), error, error.__traceback__)
  for stream in filter(None, (sys.stdout, sys.stderr)):
    with contextlib.suppress(OSError):  # the others wait, even if this cannot be printed
      stream.flush()
  os._exit(code)


class Exchange:
  """An all-gather of a few numbers per process, once a step, as a small asynchronous collective beside the step."""

  def __init__(self) -> None:
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    mesh = Mesh(np.array(devices).reshape(jax.process_count(), -1), ("process", "device"))
    self._where = NamedSharding(mesh, PartitionSpec("process"))
    whole = NamedSharding(mesh, PartitionSpec())
    self._gather = jax.jit(lambda x: x, out_shardings=whole)
    self._alone = jax.process_count() == 1

  def __call__(self, *values: float) -> Any:
    """Returns f32[processes, len(values)], still being computed; `jax.device_get` waits for it."""
    row = np.asarray([values], np.float32)
    if self._alone:
      return row
    return self._gather(jax.make_array_from_process_local_data(self._where, row))
