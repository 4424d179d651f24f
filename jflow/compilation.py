"""Compilation by XLA: one cache of programs for all commands, and a line where it takes long."""

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator

import jax

from jflow import progress

CACHE = "~/.cache/jflow"
_PATIENCE = 5.0  # seconds before there is a line


def cache_directory(wanted: str) -> str | None:
  """The directory to keep compiled programs in; None where jax is left as it is.

  That is where none is wanted, where JAX_COMPILATION_CACHE_DIR names another one, which jax reads by itself, and where
  the directory cannot be written.

  Args:
    wanted: a path, whose "~" is the home directory, or an address as gs://...; empty: none.
  """
  if not wanted or "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return None
  path = os.path.expanduser(wanted)
  if "://" in path:
    return path
  try:
    if path.startswith("~"):  # nobody's home
      return None
    os.makedirs(path, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()
  except OSError:
    return None
  return path


def use_cache(wanted: str = CACHE) -> None:
  """Takes compiled programs from a directory and keeps new ones there, see `cache_directory`. Before the first one."""
  if path := cache_directory(wanted):
    jax.config.update("jax_compilation_cache_dir", path)


@contextlib.contextmanager
def said(what: str, patience: float = _PATIENCE) -> Iterator[None]:
  """Around the first call of a jitted function: says on stderr that it compiles, and in the end how long that took.

  Nothing is said of what takes less than `patience` seconds, nor on other processes than the first.

  Args:
    what: is compiled, as in "compiling the training step".
    patience: seconds.
  """
  started, begun, lock = time.monotonic(), False, threading.Lock()

  def begin() -> None:
    nonlocal begun
    with lock:
      if not timer.finished.is_set():
        begun = True
        progress.say(f"compiling {what} ...")

  timer = threading.Timer(patience, begin)
  timer.daemon = True
  if jax.process_index() == 0:
    timer.start()
  try:
    yield
    done = "compiled"
  except BaseException:
    done = "stopped compiling"
    raise
  finally:
    with lock:
      timer.cancel()
    if begun:
      progress.say(f"{done} {what} after {time.monotonic() - started:.0f} s")
