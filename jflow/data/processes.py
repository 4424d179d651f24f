"""Loader processes, and a way for every process that jflow starts to end with its parent.

Each of n loaders makes every n-th batch and sends it through a pipe of its own. There is no shared memory, semaphore or
lock: nothing with a name can outlive a run, and /dev/shm may be small.
"""

import concurrent.futures
import contextlib
import fcntl
import itertools
import multiprocessing
import os
import queue
import select
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker, util
from typing import Any

import numpy as np

from jflow.errors import Stopped, UserError

_PIPE_BYTES = 2**20  # bytes of a pipe's buffer, Linux's limit for every user; the default is 64 KiB
_ENDED = None  # sent by a loader after its last batch


def end_with_parent() -> None:
  """Ends this process when its `multiprocessing` parent ends, however that ends.

  On Linux the kernel does it, also for a process that is stopped or busy in C; elsewhere a thread does, which is late
  where C code holds the interpreter.
  """
  parent = multiprocessing.parent_process()
  if parent is None:
    return
  lifeline = parent.sentinel  # a pipe: it can be read when the parent's end is closed
  with contextlib.suppress(OSError, AttributeError):
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
  if select.select([lifeline], [], [], 0)[0]:
    os._exit(1)
  threading.Thread(target=_end_after, args=(parent,), name="end with parent", daemon=True).start()


def _end_after(parent: Any) -> None:
  parent.join()
  os._exit(1)


class Loaders:
  """Processes that make batches. Iterating yields the batches in order, as one process would; `close` ends them.

  The yielded values are tuples that begin with a named tuple of arrays.
  """

  def __init__(self, work: Callable[[int, int], Iterator[tuple[Any, ...]]], count: int):
    """Starts the processes.

    Args:
      work: (index, count) -> every `count`-th batch from number `index` on; picklable.
      count: number of processes.
    """
    context = multiprocessing.get_context("spawn")  # threads of the parent would not survive a fork
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    self._readers = [reader for reader, _ in pipes]
    self._processes = [
      context.Process(target=_serve, args=(writer, work, i, count), name=f"loader {i}", daemon=True)
      for i, (_, writer) in enumerate(pipes)
    ]
    self._turn, self._closed = 0, threading.Event()
    self._ready: queue.Queue = queue.Queue(maxsize=count)
    # Before multiprocessing sends them SIGTERM at exit: they ignore it, as they do Ctrl-C, and follow their parent.
    self._kill = util.Finalize(self, _kill, (self._processes,), exitpriority=10)
    resource_tracker.ensure_running()  # it would unblock the signals again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # processes inherit it
    try:
      with concurrent.futures.ThreadPoolExecutor(count) as pool:
        list(pool.map(_start, self._processes, (writer for _, writer in pipes)))
    except BaseException:
      self._kill()
      raise
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)
    self._thread = threading.Thread(target=self._receive, name="loaders", daemon=True)
    self._thread.start()

  def __iter__(self) -> Iterator[tuple[Any, ...]]:
    while (item := self._ready.get()) is not _ENDED:
      if isinstance(item, Exception):
        raise item
      yield item

  def waiting_for(self) -> str:
    """Returns the process that has to deliver next, if no batch is ready, or ""."""
    return self._name(self._turn) if self._ready.empty() and not self._closed.is_set() else ""

  def close(self) -> None:
    """Ends the processes at once."""
    self._closed.set()
    self._kill()
    self._thread.join()
    for reader in self._readers:
      reader.close()

  def _receive(self) -> None:
    """Receives the batches in order, one of each process ahead of the run."""
    for number in itertools.count():
      self._turn = number % len(self._processes)
      item = self._take(self._turn)
      while not self._closed.is_set():
        with contextlib.suppress(queue.Full):
          self._ready.put(item, timeout=0.2)
          break
      if self._closed.is_set() or not isinstance(item, tuple):
        return

  def _take(self, index: int) -> tuple[Any, ...] | Exception | None:
    """Returns the next batch of a process, its exception, or `_ENDED`."""
    reader = self._readers[index]
    try:
      sent = reader.recv()
      if not isinstance(sent, tuple):
        return sent
      kind, kinds, rest = sent
      arrays = [np.empty(shape, dtype) for shape, dtype in kinds]
      for array in arrays:
        _read(reader.fileno(), _bytes_of(array))
      return kind(*arrays), *rest
    except (EOFError, OSError):
      return Stopped(
        f"{self._name(index)} {self._end_of(index)}; the same command goes on from the last checkpoint, where memory "
        "was short with fewer data.workers or a smaller data.prefetch"
      )
    except Exception as error:  # no memory for the batch, or damaged bytes
      return Stopped(f"{self._name(index)}: its batch cannot be read ({type(error).__name__}: {error})")

  def _name(self, index: int) -> str:
    return f"loader process {index + 1} of {len(self._processes)} (pid {self._processes[index].pid})"

  def _end_of(self, index: int) -> str:
    process = self._processes[index]
    process.join(5)
    code = process.exitcode
    if code is None:
      return "sends nothing more"
    if code >= 0:
      return f"ended with exit code {code}"
    memory = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{memory}"


def _start(process: Any, writer: Any) -> None:
  with contextlib.suppress(BrokenPipeError):  # it ended while it was starting, which its own pipe reports as well
    process.start()
  writer.close()


def _kill(processes: Sequence[Any]) -> None:
  for process in processes:
    if process.pid is not None:
      process.kill()
  for process in processes:
    if process.pid is not None:
      process.join(5)


def _serve(writer: Any, work: Callable[[int, int], Iterator[tuple[Any, ...]]], index: int, count: int) -> None:
  """The main function of a loader: makes its batches and sends them through the pipe."""
  end_with_parent()
  try:
    with contextlib.suppress(OSError, AttributeError):
      fcntl.fcntl(writer.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    try:
      for arrays, *rest in work(index, count):
        arrays = type(arrays)(*map(np.ascontiguousarray, arrays))
        writer.send((type(arrays), [(array.shape, array.dtype) for array in arrays], rest))
        for array in arrays:
          _write(writer.fileno(), _bytes_of(array))
      writer.send(_ENDED)
    except (UserError, Stopped) as error:
      writer.send(error)
    except MemoryError:
      writer.send(Stopped("a loader process has no memory left: use fewer data.workers or a smaller data.prefetch"))
    except BrokenPipeError:
      raise
    except Exception:
      writer.send(RuntimeError(f"in loader process {index + 1}: {traceback.format_exc()}"))
  except BrokenPipeError:  # the parent has ended, or has closed the pipe
    os._exit(1)


def _bytes_of(array: np.ndarray) -> memoryview:
  return memoryview(array.reshape(-1).view(np.uint8)) if array.size else memoryview(b"")


def _write(descriptor: int, data: memoryview) -> None:
  while data:
    data = data[os.write(descriptor, data) :]


def _read(descriptor: int, data: memoryview) -> None:
  while data:
    count = os.readv(descriptor, [data])
    if not count:
      raise EOFError
    data = data[count:]
