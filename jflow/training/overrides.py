"""Fields of a config on the command line: --config.FIELD=VALUE, each value parsed by the type of its field."""

import ast
import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jflow.config import RENAMED, RunConfig
from jflow.errors import UserError
from jflow.generation.base import FAMILIES
from jflow.models.config import reader_section
from jflow.sections import flat, kinds
from jflow.strict_json import shown

_TRUE, _FALSE = ("true", "t", "1"), ("false", "f", "0")
_SHOWN = 60  # characters of a value in a message
_KINDS = dict(kinds(RunConfig))
_RENAMED = RENAMED | {  # of a file, `ModelConfig.from_dict` reads them
  "model.alignment_layer": "model.objectives.alignment.layer",
  "model.alignment_width": "model.objectives.alignment.hidden_dim",
}


def apply(values: dict[str, Any], arguments: Sequence[str]) -> set[str]:
  """Sets the fields that arguments name.

  Forms: --config.FIELD=VALUE or --config.FIELD VALUE; --config.FIELD and --noconfig.FIELD for true and false. Of a
  repeated field the last value counts; the values of a tuple are concatenated.

  Args:
    values: the config as nested plain values; changed.
    arguments: of the command line.

  Returns:
    The dotted names of the fields.

  Raises:
    UserError: an unknown argument or field, a value that is not of the field's type.
  """
  given: set[str] = set()
  for path, argument, value in _pairs(values, list(arguments)):
    where, name = _place(values, path, argument)
    if path == "model.reader" and value and value.isidentifier():  # its kind, as before it was a section
      where[name] = reader_section(value)
      continue
    read = _value(_kind(where, name, path), where.get(name), argument, value)
    where[name] = where[name] + read if path in given and isinstance(read, tuple) else read
    given.add(path)
  return given


def _pairs(values: dict[str, Any], arguments: list[str]) -> Iterator[tuple[str, str, str | None]]:
  """Yields (path of the field, the argument as a message shows it, the text of the value or None)."""
  while arguments:
    argument = arguments.pop(0)
    named = re.fullmatch(r"--?(no)?config\.([^=]*)(=(.*))?", argument, re.DOTALL)
    if named is None:
      raise UserError(f"unknown argument {shown(argument)}; fields are set as --config.FIELD=VALUE")
    negated, path, equals, value = named.groups()
    told = f"--{negated or ''}config.{path[:200]}" + (f"={value[:_SHOWN]}" if equals else "")
    path = _RENAMED.get(path, path)
    told = told.encode("unicode_escape").decode()  # one line, whatever is in it
    alone = equals or negated or not arguments or arguments[0].startswith("--")
    if alone or _kind(*_place(values, path, told), path) is bool:
      yield path, told, "false" if negated and not equals else value if equals else None
    else:
      value = arguments.pop(0)
      yield path, f"{told} {shown(value)}", value


def _place(values: dict[str, Any], path: str, argument: str) -> tuple[dict[str, Any], str]:
  """Returns the section that holds the field of a dotted path, and the field's name there."""
  section, where = values, values
  parts = path.split(".")
  for depth, name in enumerate(parts):
    if not isinstance(where, dict):
      above = ".".join(parts[:depth])
      raise UserError(f"unknown field {shown(name)} ({argument}): {above} is a field, not a section")
    if name not in where and path not in _sampling():  # which a config names as it likes
      raise UserError(f"unknown field {shown(name)} ({argument}){_meant(values, path)}")
    section, where = where, where.get(name)
  return section, parts[-1]


def _meant(values: dict[str, Any], path: str) -> str:
  known = list(dict.fromkeys([*(name for name, _ in flat(values)), *_sampling()]))
  known += sorted({".".join(parts[:i]) for parts in (name.split(".") for name in known) for i in range(1, len(parts))})
  section, _, last = path.rpartition(".")
  near = [name for name in known if name.rpartition(".")[2] == last][:3]
  beside = [name.rpartition(".")[2] for name in known if section and name.rpartition(".")[0] == section]
  if not near and beside:
    near = [f"{section}.{name}" for name in difflib.get_close_matches(last[:100], beside, n=1)]
  elif not near:
    near = difflib.get_close_matches(path[:100], known, n=1, cutoff=0.75)
  if near:
    return f"; did you mean {' or '.join(near)}?"
  return f"; {section} has {', '.join(beside)}" if beside else f"; sections are {', '.join(values)}"


def _kind(where: dict[str, Any], name: str, path: str) -> Any:
  """The type of a field; in the model or a mapping, that of its current value."""
  known = _KINDS | _sampling()
  return known[path] if path in known else type(where[name])


def _sampling() -> dict[str, Any]:
  """The settings of all families, whoever has registered them: dotted name -> type."""
  return {
    f"sampling.{field.name}": type(field.default)
    for kind in FAMILIES.all().values()
    for field in dataclasses.fields(kind.settings)
  }


def _value(kind: Any, now: Any, argument: str, text: str | None) -> Any:
  """Parses the text of a value by the type of its field; raises UserError."""
  if text is None:
    if kind is bool:
      return True
    raise UserError(f"{argument} needs a value, as {argument}=VALUE")
  if kind == dict | None and text.strip() == "None":
    return None
  if kind in (dict | None, Mapping):  # of any names
    return _mapping(
      None, argument, text, "must be a dict, {} for none" if kind is Mapping else "must be a dict, or None"
    )
  if isinstance(now, Mapping):
    return _mapping(now, argument, text)
  readers = {bool: _boolean, int: _integer, float: _number, str: _text, tuple: _tuple, list: _tuple}
  return readers[kind](argument, text)


def _mapping(
  now: Mapping[str, Any] | None, argument: str, text: str, what: str = "must be a dict, or None"
) -> dict[str, Any]:
  """Parses a mapping with all names of a section, or with any names for an empty one; `what` it must be otherwise."""
  if now:
    what = f"names a section: set one of its fields, or all of {', '.join(now)} as a dict"
  read = _plain(argument, _literal(argument, text, what))
  if not isinstance(read, dict) or now and set(read) != set(now):
    raise UserError(f"{argument} {what}, got {shown(text)}")
  return read


def _boolean(argument: str, text: str) -> bool:
  if text.lower() not in _TRUE + _FALSE:
    raise UserError(f"{argument} must be true or false, got {shown(text)}")
  return text.lower() in _TRUE


def _integer(argument: str, text: str) -> int:
  word = text.strip()
  try:
    return int(word if word.isascii() else "", 0 if word.lstrip("+-")[:2].lower() in ("0x", "0o") else 10)
  except ValueError:
    raise UserError(f"{argument} must be a whole number, got {shown(text)}") from None


def _number(argument: str, text: str) -> float:
  try:
    read = float(text) if text.isascii() else math.nan
  except ValueError:
    read = math.nan
  if not math.isfinite(read):
    raise UserError(f"{argument} must be a finite number, got {shown(text)}")
  return read


def _text(argument: str, text: str) -> str:
  if re.search(r"[\x00-\x1f\x7f]", text):
    raise UserError(f"{argument} must be text without control characters, got {shown(text)}")
  return text


def _tuple(argument: str, text: str) -> tuple[Any, ...]:
  """Parses a tuple: a literal, or one word without quotes, such as a pattern, as its only element."""
  what = "must be a tuple, as ('a', 'b') or ((0, 1.5),) or ()"
  read = (text,) if _is_pattern(text) else _plain(argument, _literal(argument, text, what))
  if isinstance(read, (dict, bool)) or read is None:
    raise UserError(f"{argument} {what}, got {shown(text)}")
  return read if isinstance(read, tuple) else (read,)


def _is_pattern(text: str) -> bool:
  """Whether a text is one word and not a Python literal: a name, or a regular expression."""
  if not text or re.search(r"[\s,'\"\x00-\x1f\x7f]", text) or re.fullmatch(r"[+-]?[0-9_.]+", text):
    return False
  try:
    ast.literal_eval(text)
    return False
  except (ValueError, SyntaxError, RecursionError, MemoryError):
    pass
  try:
    re.compile(text)
    return True
  except (re.error, RecursionError, OverflowError):
    return False


def _literal(argument: str, text: str, what: str) -> Any:
  try:
    return ast.literal_eval(text.strip())
  except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
    raise UserError(f"{argument} {what}, got {shown(text)}") from None


def _plain(argument: str, value: Any) -> Any:
  """Returns the value with tuples for lists; raises UserError where it holds a type that no field has."""
  if isinstance(value, (tuple, list)):
    return tuple(_plain(argument, one) for one in value)
  if isinstance(value, dict):
    return {_plain(argument, key): _plain(argument, one) for key, one in value.items()}
  if isinstance(value, str):
    return _text(argument, value)
  if isinstance(value, (bool, int)) or value is None or isinstance(value, float) and math.isfinite(value):
    return value
  raise UserError(f"{argument} must hold texts and finite numbers, got {shown(value)}")
