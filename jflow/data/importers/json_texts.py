"""A strict parser of the JSON in data sets, with a reason for each refusal."""

import json
from typing import Any

from jflow.data.records import RecordError


def parse_json(text: bytes | str) -> Any:
  """Returns the value of a JSON text.

  Raises:
    RecordError: it is not UTF-8 ("invalid_utf8"), not JSON ("broken_json"), or an object in it names a key
      twice ("duplicate_key"), where parsers differ in the value they take.
  """
  try:
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    return json.loads(text, object_pairs_hook=_object)
  except UnicodeDecodeError:
    raise RecordError("invalid_utf8", "not valid UTF-8") from None
  except (ValueError, RecursionError) as error:
    raise broken_json(error) from None


def broken_json(error: Exception) -> RecordError:
  """Returns the error for a text that is not JSON."""
  return RecordError("broken_json", f"not valid JSON ({str(error)[:80]})")


def parse_object(text: bytes | str) -> dict[str, Any]:
  """Returns a JSON object; see `parse_json`."""
  value = parse_json(text)
  if not isinstance(value, dict):
    raise RecordError("broken_json", "not a JSON object")
  return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) < len(pairs):
    seen: set[str] = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))
    raise RecordError("duplicate_key", f"the key {twice[:40]!r} occurs twice in an object")
  return value


DECODER = json.JSONDecoder(object_pairs_hook=_object)
