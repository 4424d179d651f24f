"""Compilation by XLA: one cache of programs for all commands, and a line where it takes long."""

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jflow import progress

CACHE = "~/.cache/jflow"
_PATIENCE = 5.0  # seconds before there is a line


def cache_directory(wanted: str) -> str | None:
  """Returns the directory for compiled programs, or None to leave jax's own setting.

  None means that no cache is wanted, that JAX_COMPILATION_CACHE_DIR names one (jax reads it by itself), or that the
  directory cannot be written.

  Args:
    wanted: a path, in which "~" is the home directory, or an address such as gs://...; empty: no cache.
  """
  if not wanted or "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return None
  path = os.path.expanduser(wanted)
  if "://" in path:
    return path
  try:
    if path.startswith("~"):  # of an unknown user
      return None
    os.makedirs(path, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()
  except OSError:
    return None
  return path


def use_cache(wanted: str = CACHE) -> None:
  """Turns on the cache of compiled programs, see `cache_directory`; call it before the first compilation."""
  if path := cache_directory(wanted):
    jax.config.update("jax_compilation_cache_dir", path)


@contextlib.contextmanager
def said(what: str, patience: float = _PATIENCE) -> Iterator[None]:
  """Context manager around the first call of a jitted function: reports a compilation, and its time, on stderr.

  A compilation shorter than `patience` seconds is not reported, and only process 0 reports.

  Args:
    what: the object of "compiling ...", such as "the training step".
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


def told(what: str, program: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a jitted function of one shape whose first call, which compiles it, is reported as by `said`."""
  called = False

  def run(*args: Any) -> Any:
    nonlocal called
    with contextlib.nullcontext() if called else said(what):
      called = True
      return program(*args)

  return run
