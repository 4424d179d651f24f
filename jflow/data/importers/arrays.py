"""A parser of JSON arrays entry by entry, so that a broken entry costs only itself."""

import json
import re
from typing import Any

from jflow.data.importers import json_texts
from jflow.data.records import RecordError

_BLANKS = re.compile(r"[ \t\r\n]*+")
_TOKENS = re.compile(r'"(?:[^"\\]++|\\.)*+"|[\[\]{}]', re.DOTALL)
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # an undecodable byte, as "surrogateescape" keeps it
_NUMBER = re.compile(r"[-+.0-9eE]++")


def parse_array(data: bytes) -> list[Any]:
  """Returns the entries of a JSON array; one that `json_texts.parse_json` would refuse is a `RecordError` in its place.

  Raises:
    RecordError: the text is not a JSON array, so that the ends of its entries are unknown.
  """
  text = data.decode("utf-8-sig", "surrogateescape")
  damaged = _NOT_UTF8.search(text) is not None
  entries: list[Any] = []
  at = _skip(text, _skip(text, 0) + 1)
  if text[at : at + 1] == "]":
    _end(text, at)
    return entries
  while True:
    try:
      entry, end = json_texts.DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
      raise json_texts.broken_json(error) from None
    except RecordError as error:
      entry, end = error.with_traceback(None), _end_of_value(text, at)
    except (ValueError, RecursionError) as error:
      entry, end = json_texts.broken_json(error), _end_of_value(text, at)
    if damaged and _NOT_UTF8.search(text, at, end):
      entry = RecordError("invalid_utf8", "not valid UTF-8")
    entries.append(entry)
    at = _skip(text, end)
    if text[at : at + 1] == "]":
      _end(text, at)
      return entries
    if text[at : at + 1] != ",":
      raise RecordError("broken_json", f"not valid JSON (no ',' or ']' at character {at:,})")
    at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
  return _BLANKS.match(text, at).end()


def _end(text: str, at: int) -> None:
  if _skip(text, at + 1) < len(text):
    raise RecordError("broken_json", f"not valid JSON (more after its end, at character {at + 1:,})")


def _end_of_value(text: str, at: int) -> int:
  """Returns the end of a list, an object or a number of any depth and length."""
  if number := _NUMBER.match(text, at):
    return number.end()
  depth = 0
  for token in _TOKENS.finditer(text, at):
    depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token[0], 0)
    if not depth:
      return token.end()
  raise RecordError("broken_json", f"not valid JSON (the entry at character {at:,} has no end)")
