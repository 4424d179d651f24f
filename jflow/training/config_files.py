"""Config files: a Python file with get_config(size), and the typed config that it becomes.

The folder of a config is not added to the import path: a file beside it never replaces an installed module. A config
imports its siblings by the name of their folder (`from mine import base` in a folder "mine"), as long as no installed
module has that name, or relatively (`from . import base`), and the configs of jflow as `from configs import base`.
"""

import contextlib
import copy
import importlib.abc
import importlib.util
import inspect
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType
from typing import Any, cast

from ml_collections import ConfigDict, FrozenConfigDict

from jflow.config import RunConfig
from jflow.errors import UserError, one_line
from jflow.models.config import ModelConfig
from jflow.sections import refusal
from jflow.training import overrides

SHIPPED = (pathlib.Path(__file__).parents[1] / "configs").resolve()  # a link in the source tree, a folder in a wheel
Start = Callable[[RunConfig, Collection[str]], dict[str, Any]]
_PACKAGE = "jflow_config"  # the package that a config file is loaded in, for what it imports relatively
_ROW_TOKENS = 4096  # of a row, at most, where it is as long as the model's context (paper section 4.1)
_BESIDE = 9  # tokens beside an image that a row has room for where its image slots are as many as fit
_INSTALLED = {"site-packages", "dist-packages"}


def load(named: str, arguments: Sequence[str] = (), start: Start | None = None) -> RunConfig:
  """Reads the config that a command line names, with the fields that it sets.

  Args:
    named: FILE or FILE:SIZE, or the name of a config that comes with jflow in place of its file: stage2:tiny.
    arguments: --config.FIELD=VALUE, see `overrides.apply`.
    start: (config, names of the fields that `arguments` set) -> the sections `model` and `sampling`, for a run with
      `train.init_from`; the config's model is still plain values.

  Raises:
    UserError: the file is missing or fails, or a field is unknown, missing or out of its constraint.
  """
  file, values = _run(named)
  own: Any = copy.deepcopy(values.get("model"))
  try:
    given = overrides.apply(values, arguments)
    config = RunConfig.from_dict(values, _plain_model)
    if start and config.train.init_from:
      ModelConfig.from_dict(own)  # what is wrong in the file must not vanish behind the checkpoint's
  except UserError as error:
    raise UserError(f"{file}: {error}") from None
  if start and config.train.init_from:
    values |= start(config, given)
  try:
    config = RunConfig.from_dict(values, ModelConfig.from_dict)
    for path in sorted(given):
      _check_used(path, values, config.model.to_dict())
  except UserError as error:
    raise UserError(f"{file}: {error}") from None
  return _with_rows(config)


def _with_rows(config: RunConfig) -> RunConfig:
  """Returns the config with sizes of a row in place of a 0: the model's context, and the images that fit into it."""
  data, model = config.data, config.model
  tokens = data.row_tokens or min(_ROW_TOKENS, model.language_model.max_length)
  images = data.row_images or max(1, tokens // (max(model.patches, model.written_patches) + _BESIDE))
  return config.replace(data=dict(row_tokens=tokens, row_images=images))


def _check_used(path: str, values: Mapping[str, Any], model: Mapping[str, Any]) -> None:
  """Refuses a field that an argument sets and this kind of section has not: a section in a file may hold the fields of
  several kinds, those of the others empty."""
  section, *names = path.split(".")
  value: Any = values[section]
  used: Any = model
  for name in names:
    value = value.get(name) if isinstance(value, Mapping) else None
    if section == "model" and isinstance(used, Mapping) and name not in used and value:
      raise refusal(path, value, f"must be left out with kind={used.get('kind')!r}, which has no such field")
    used = used.get(name) if isinstance(used, Mapping) else None


def _plain_model(values: Any) -> Mapping[str, Any]:
  if not isinstance(values, Mapping):
    raise refusal("model", values, "must be a section")
  return values


def _run(named: str) -> tuple[pathlib.Path, dict[str, Any]]:
  """Returns the file, and the result of its get_config as plain values."""
  file, size = _split(named)
  siblings = _Siblings(file.resolve().parent)
  with (
    siblings.in_reach(),
    contextlib.redirect_stdout(sys.stderr),
  ):  # standard output is for the command's result
    name = f"{_PACKAGE}.{file.stem}"
    loader = _Source(name, str(file))
    module = importlib.util.module_from_spec(ModuleSpec(name, loader, origin=str(file)))
    module.__file__, module.__package__ = str(file), _PACKAGE
    with _blamed_on(file, siblings.folder):
      sys.modules[name] = module
      loader.exec_module(module)
    function = getattr(module, "get_config", None)
    if not callable(function):
      raise UserError(f"{file}: a config must have a function get_config(size), and this file has none")
    _check_size(file, function, size)
    with _blamed_on(file, siblings.folder):
      config = function(*size)
      if isinstance(config, FrozenConfigDict):
        config = config.as_configdict()
      config = ConfigDict(config) if isinstance(config, dict) else config
    if not isinstance(config, ConfigDict):
      raise UserError(f"{file}:{_line(function)}: get_config must return a ConfigDict, got a {type(config).__name__}")
  try:
    return file, config.to_dict()
  except Exception as error:  # a name that is no text; a value that is still to be given
    raise UserError(f"{file}:{_line(function)}: get_config returns no config of names and values: {error}") from None


def _split(named: str) -> tuple[pathlib.Path, list[str]]:
  """Returns the file, and the size in a list, which is empty where none is named."""
  parts = named.split(":")
  for count in range(len(parts), 0, -1):  # a folder's name may hold a colon
    path = ":".join(parts[:count])
    with contextlib.suppress(OSError, ValueError):  # a name that is too long, or that is invalid for a file
      if path and pathlib.Path(path).is_file():
        return pathlib.Path(path), [":".join(parts[count:])] if count < len(parts) else []
  name, colon, size = named.partition(":")
  if file := _shipped().get(name.removeprefix("configs/").removesuffix(".py")):
    return file, [size] if colon else []
  named = (named.rpartition(":")[0] or named)[:300].encode("unicode_escape").decode()  # one line, whatever is in it
  raise UserError(
    f"config file {named or repr('')} does not exist: give its path, or the name of one that comes with jflow "
    f"({', '.join(sorted(_shipped()))}), as in stage2:tiny"
  )


def _shipped() -> dict[str, pathlib.Path]:
  """The configs that come with jflow, by name: stage2, ..."""
  files = {path.relative_to(SHIPPED).with_suffix("").as_posix(): path for path in SHIPPED.rglob("*.py")}
  return {name: path for name, path in files.items() if "\ndef get_config(" in path.read_text(encoding="utf-8")}


def _check_size(file: pathlib.Path, function: Callable[..., Any], size: Sequence[str]) -> None:
  try:
    takes = inspect.signature(function)
  except (TypeError, ValueError):  # of native code
    return
  try:
    takes.bind(*size)
  except TypeError:
    what = f"takes no size, got {size[0]!r}" if size else "needs a size, as FILE:SIZE"
    raise UserError(f"{file}:{_line(function)}: get_config{takes} {what}") from None


def _line(function: Any) -> int:
  return getattr(getattr(function, "__code__", None), "co_firstlineno", 1)


@contextlib.contextmanager
def _blamed_on(file: pathlib.Path, folder: pathlib.Path) -> Generator[None, None, None]:
  """Turns any exception of a config into one line that names the config's last line in the traceback."""
  try:
    yield
  except UserError:
    raise
  except SyntaxError as error:
    text = f": {error.text.strip()[:80]}" if error.text else ""
    raise UserError(f"{error.filename or file}:{error.lineno or 1}: {error.msg}{text}") from None
  except KeyboardInterrupt:
    raise
  except BaseException as error:
    own = (str(file), f"{folder}{os.sep}")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(own)]
    at = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else str(file)
    said = one_line(error, 500)
    if isinstance(error, SystemExit):
      raise UserError(f"{at}: the config ends Python ({said or 'exit code 0'})") from None
    if isinstance(error, ModuleNotFoundError):
      said += (
        f"; a config imports a file beside it as `from {folder.name} import NAME` or `from . import NAME`, and others "
        "from folders in PYTHONPATH"
      )
    kind = [] if said and isinstance(error, ValueError) else [type(error).__name__]
    raise UserError(": ".join([at, *kind, *[said] * bool(said)])) from None


class _Source(SourceFileLoader):
  """A loader that compiles the source: it neither writes nor reads bytecode beside the file."""

  def get_code(self, fullname: str) -> CodeType:
    path = self.get_filename(fullname)
    return self.source_to_code(self.get_data(path), path)


class _Siblings(importlib.abc.MetaPathFinder):
  """A finder of the modules in a config's own folder, by the name of the folder and in `_PACKAGE`, and of no others."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self._places = {_PACKAGE: [str(folder)]}
    inside = folder == SHIPPED or SHIPPED in folder.parents  # those mean their own "configs", whoever else has one
    for name in filter(None, dict.fromkeys((folder.name, SHIPPED.name))):
      if inside or not _is_taken(name):
        found = PathFinder.find_spec(name)  # say "configs" in the working directory
        others = list(found.submodule_search_locations or ()) if found else []
        places = [str(folder)] * (name == folder.name) + others + [str(SHIPPED)] * (name == SHIPPED.name)
        self._places[name] = list(dict.fromkeys(places))

  @contextlib.contextmanager
  def in_reach(self) -> Generator[None, None, None]:
    """Makes the modules importable; on exit, it removes what they have imported and restores the path."""
    own = lambda: {name: module for name, module in sys.modules.items() if name.split(".")[0] in self._places}
    before, path = own(), list(sys.path)
    for name in before:
      del sys.modules[name]
    sys.meta_path.insert(0, self)
    try:
      yield
    finally:
      sys.meta_path.remove(self)
      sys.path[:] = path
      for name in own():
        del sys.modules[name]
      sys.modules.update(before)

  def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
    if fullname in self._places:
      places = self._places[fullname]
      return _package(fullname, places, places[0] if fullname != _PACKAGE else "")
    if fullname.split(".")[0] not in self._places:
      return None
    name = fullname.rpartition(".")[2]
    for place in path or ():
      inside, file = os.path.join(place, name), os.path.join(place, name + ".py")
      if os.path.isfile(file):
        return importlib.util.spec_from_file_location(fullname, file, loader=_Source(fullname, file))
      if os.path.isdir(inside):
        return _package(fullname, [inside], inside)
    return None


def _package(name: str, places: list[str], folder: str) -> ModuleSpec | None:
  """Returns the spec of a package; `folder` may hold its __init__.py."""
  file = os.path.join(folder, "__init__.py")
  if folder and os.path.isfile(file):
    made = importlib.util.spec_from_file_location(
      name, file, loader=_Source(name, file), submodule_search_locations=places
    )
    return cast(ModuleSpec, made)  # None only for a file of an unknown kind
  spec = ModuleSpec(name, None, is_package=True)
  spec.submodule_search_locations = places
  return spec


def _is_taken(name: str) -> bool:
  """Whether an installed or already imported module has the name of a folder."""
  if name in sys.stdlib_module_names or getattr(sys.modules.get(name), "__file__", None):
    return True
  installed = [path for path in sys.path if _INSTALLED & set(pathlib.Path(path).parts)]
  return PathFinder.find_spec(name, installed) is not None
