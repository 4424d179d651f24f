"""Fields of a config on the command line: --config.FIELD=VALUE, each value read as the type that the field has."""

import ast
import difflib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from jflow.errors import UserError
from jflow.training.fields import shown

_LARGEST = 2**63 - 1  # of a whole number
_WHOLE = re.compile(r"[+-]?(0[xo])?[0-9a-f]+(_[0-9a-f]+)*", re.IGNORECASE)
_TRUE, _FALSE = ("true", "t", "1"), ("false", "f", "0")
_SHOWN = 60  # characters of a value in a message


def apply(config: ConfigDict, arguments: Sequence[str]) -> None:
  """Sets the fields that arguments name.

  As --config.FIELD=VALUE or --config.FIELD VALUE; --config.FIELD and --noconfig.FIELD set one that is true or false. Of
  a field that is named again the last value counts; the values of a tuple add up.

  Raises:
    UserError: an unknown argument or field, a value that is not of the field's type.
  """
  given: dict[str, list[str]] = {}
  for path, argument, value in _pairs(config, list(arguments)):
    where, name = _place(config, path, argument)
    read = _value(where, name, argument, value)
    again = path in given and isinstance(read, (tuple, list))
    try:
      where[name] = where[name] + read if again else read
    except (TypeError, ValueError, KeyError) as error:
      raise UserError(f"{argument} cannot be set: {' '.join(str(error).split())[:300]}") from None
    given.setdefault(path, []).append(argument)


def _pairs(config: ConfigDict, arguments: list[str]) -> Iterator[tuple[str, str, str | None]]:
  """Yields (path of the field, the argument as a message shows it, the text of the value); None: there is none."""
  while arguments:
    argument = arguments.pop(0)
    named = re.fullmatch(r"--?(no)?config\.([^=]*)(=(.*))?", argument, re.DOTALL)
    if named is None:
      raise UserError(f"unknown argument {shown(argument)}; fields are set as --config.FIELD=VALUE")
    negated, path, equals, value = named.groups()
    told = f"--{negated or ''}config.{path[:200]}" + (f"={value[:_SHOWN]}" if equals else "")
    told = told.encode("unicode_escape").decode()  # one line, whatever is in it
    if equals or negated or not arguments or arguments[0].startswith("--") or _is_boolean(config, path):
      yield path, told, "false" if negated and not equals else value if equals else None
    else:
      value = arguments.pop(0)
      yield path, f"{told} {shown(value)}", value


def _is_boolean(config: ConfigDict, path: str) -> bool:
  where, name = _place(config, path, path)
  return where.get_type(name) is bool


def _place(config: ConfigDict, path: str, argument: str) -> tuple[ConfigDict, str]:
  """Returns the section that holds the field of a dotted path, and the field's name there."""
  where: Any = config
  parts = path.split(".")
  for depth, name in enumerate(parts):
    if not isinstance(where, ConfigDict):
      leaf = ".".join(parts[:depth])
      raise UserError(f"unknown field {shown(name)} ({argument}): {leaf} is a field and no section")
    if name not in where:
      raise UserError(f"unknown field {shown(name)} ({argument}){_meant(config, path)}")
    if depth == len(parts) - 1:
      return where, name
    where = where[name]
  raise AssertionError("a path has at least one part")


def _meant(config: ConfigDict, path: str) -> str:
  known = list(_names(config))
  last = path.rpartition(".")[2]
  near = [name for name in known if name.rpartition(".")[2] == last][:3]
  near = near or difflib.get_close_matches(path[:100], known, n=1, cutoff=0.75)
  return f"; did you mean {' or '.join(near)}?" if near else f"; sections are {', '.join(config)}"


def _names(config: ConfigDict, before: str = "") -> Iterator[str]:
  for name, value in config.items():
    yield before + name
    if isinstance(value, ConfigDict):
      yield from _names(value, f"{before}{name}.")


def _value(where: ConfigDict, name: str, argument: str, text: str | None) -> Any:
  """Returns the text of a value as the type of its field; raises UserError."""
  kind = where.get_type(name)
  if text is None:
    if kind is bool:
      return True
    raise UserError(f"{argument} needs a value, as {argument}=VALUE")
  if isinstance(where[name], ConfigDict):
    return _section(where[name], argument, text)
  reader = {bool: _boolean, int: _integer, float: _number, str: _text, tuple: _tuple, list: _tuple}.get(kind, _any)
  read = reader(argument, text)
  return list(read) if kind is list else read


def _section(section: ConfigDict, argument: str, text: str) -> ConfigDict:
  read = _literal(argument, text, f"names a section, whose fields are {', '.join(section)}")
  if not isinstance(read, dict) or set(read) != set(section):
    raise UserError(f"{argument} names a section: set one of its fields, or all of {', '.join(section)} as a dict")
  changed = ConfigDict(section)
  for field, value in read.items():
    if isinstance(section[field], ConfigDict):
      changed[field] = _section(section[field], argument, repr(value))
      continue
    try:
      changed[field] = _plain(argument, value)
    except (TypeError, ValueError) as error:
      raise UserError(f"{argument}: {field} cannot be {shown(value)}: {error}") from None
  return changed


def _boolean(argument: str, text: str) -> bool:
  if text.lower() not in _TRUE + _FALSE:
    raise UserError(f"{argument} must be true or false, got {shown(text)}")
  return text.lower() in _TRUE


def _integer(argument: str, text: str) -> int:
  word = text.strip()
  if _WHOLE.fullmatch(word) and len(word) < 100:
    base = {"0x": 16, "0o": 8}.get(word.lstrip("+-")[:2].lower(), 10)
    try:
      read = int(word, base)
    except ValueError:
      raise UserError(f"{argument} must be a whole number, got {shown(text)}") from None
    if abs(read) <= _LARGEST:
      return read
  elif not re.fullmatch(r"[+-]?[0-9_]+", word):
    raise UserError(f"{argument} must be a whole number, got {shown(text)}")
  raise UserError(f"{argument} must be a whole number of at most {_LARGEST}, got {shown(text)}")


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


def _is_pattern(text: str) -> bool:
  """Whether a word is no literal of Python, but a regular expression, as for the names of parameters."""
  if re.fullmatch(r"[+-]?[0-9_.]+", text):  # a number, of more digits than Python reads
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


def _tuple(argument: str, text: str) -> tuple[Any, ...]:
  """A literal, or one word without quotes as the only element."""
  if not re.search(r"[\s,'\"]|^[(\[{]", text) and not re.match(r"[+-]?[0-9.]", text):
    return (_text(argument, text),) if text not in ("", "None", "True", "False") else _refuse_tuple(argument, text)
  if not re.search(r"[\s,'\"]", text) and _is_pattern(text):
    return (_text(argument, text),)
  read = _plain(argument, _literal(argument, text, "must be a tuple, as ('a', 'b') or ((0, 1.5),)"))
  if isinstance(read, dict) or read is None:
    _refuse_tuple(argument, text)
  return read if isinstance(read, tuple) else (read,)


def _refuse_tuple(argument: str, text: str) -> Any:
  raise UserError(f"{argument} must be a tuple, as ('a', 'b') or (), got {shown(text)}")


def _any(argument: str, text: str) -> Any:
  """Of a field without a type: a literal, or else the text."""
  try:
    return _plain(argument, ast.literal_eval(text))
  except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
    return _text(argument, text)


def _literal(argument: str, text: str, what: str) -> Any:
  try:
    return ast.literal_eval(text.strip())
  except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
    raise UserError(f"{argument} {what}, got {shown(text)}") from None


def _plain(argument: str, value: Any) -> Any:
  """The value with tuples for lists; raises UserError where it holds what no field of a config does."""
  if isinstance(value, (tuple, list)):
    return tuple(_plain(argument, one) for one in value)
  if isinstance(value, dict):
    return {_plain(argument, key): _plain(argument, one) for key, one in value.items()}
  if isinstance(value, str):
    return _text(argument, value)
  if isinstance(value, bool):
    return value
  if isinstance(value, int) and abs(value) <= _LARGEST or isinstance(value, float) and math.isfinite(value):
    return value
  raise UserError(f"{argument} holds {shown(value)}, and must hold texts and finite numbers")
