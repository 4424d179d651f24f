"""A bounded cache of compiled programs: the least recently used go, so that ever new shapes do not fill the memory."""

import collections
import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jflow import compilation


class Programs:
  """A function of a model, compiled for each of its shapes; called like the function.

  Its first two arguments are the model and its params. One program belongs to the model, the keyword arguments, and
  the shapes of the other arguments. May be called from several threads. `function` is what it compiles, for who
  compiles it within something larger.
  """

  def __init__(self, function: Callable[..., Any], most: int, donate: Sequence[str] = ()):
    """Args: the pure `function`, how many programs are kept at `most`, names of arguments to `donate`."""
    self.function, self._most = function, most
    code = function.__code__
    self._donate = tuple(code.co_varnames[: code.co_argcount].index(name) - 1 for name in donate)
    self._kept: collections.OrderedDict[Hashable, _Program] = collections.OrderedDict()
    self._lock = threading.Lock()
    functools.update_wrapper(self, function)

  def __call__(self, model: Any, params: Any, *args: Any, **static: Hashable) -> Any:
    """Runs the program for these shapes; compiles it first where it is not in the cache."""
    program = self._program(model, args, static)
    if program.results is not None:
      return program.run(params, *args)
    with compilation.said(self.__name__):
      out = program.run(params, *args)
    program.results = shapes(out)
    return out

  def compile(self, model: Any, params: Any, *args: Any, **static: Hashable) -> Any:
    """Compiles the program without running it and returns its results as shapes; only the arguments' shapes matter."""
    program = self._program(model, args, static)
    if program.results is None:
      with compilation.said(self.__name__):
        lowered = program.run.lower(shapes(params), *shapes(args))
        lowered.compile()
      program.results = shapes(lowered.out_info)
    return program.results

  def kept(self, model: Any, *args: Any, **static: Hashable) -> Any:
    """Returns the results of the program for these shapes, as shapes; None where it is not compiled yet."""
    with self._lock:
      program = self._kept.get(_key(model, args, static))
    return program and program.results

  def prepare(self, compile: bool, model: Any, params: Any, *args: Any, **static: Hashable) -> Any:
    """The results as shapes, from `compile` or, where that is False, from `kept`."""
    return self.compile(model, params, *args, **static) if compile else self.kept(model, *args, **static)

  def jitted(self, model: Any, **static: Hashable) -> Any:
    """The jitted function of the params and the arguments, which is not kept, to lower it for another device."""
    function = functools.partial(self.function, model, **static)
    function.__name__ = self.function.__name__  # in profiles
    return jax.jit(function, donate_argnums=self._donate)

  def __len__(self) -> int:
    return len(self._kept)

  def _program(self, model: Any, args: tuple, static: dict[str, Hashable]) -> "_Program":
    key = _key(model, args, static)
    with self._lock:
      if key not in self._kept:
        self._kept[key] = _Program(self.jitted(model, **static))
      self._kept.move_to_end(key)
      if len(self._kept) > self._most:
        self._kept.popitem(last=False)
      return self._kept[key]


class _Program:
  """One program, with a jitted function of its own, so that dropping it frees all that was compiled."""

  def __init__(self, run: Any):
    self.run, self.results = run, None


def bounded(most: int, donate: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Programs]:
  """Decorator: see `Programs`."""
  return lambda function: Programs(function, most, donate)


def shapes(tree: Any) -> Any:
  """The arrays of a tree as shapes and dtypes."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), tree)


def _key(model: Any, args: tuple, static: dict[str, Hashable]) -> Hashable:
  leaves, structure = jax.tree.flatten(args)
  return model, structure, tuple((x.shape, x.dtype) for x in leaves), tuple(sorted(static.items()))
