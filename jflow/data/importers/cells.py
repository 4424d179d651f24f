"""Values of a table, with a `RecordError` in place of each unreadable part, which costs only the rows that need it."""

from typing import Any

from jflow.data.records import RecordError


def broken_in(value: Any) -> RecordError | None:
  """Returns the first `RecordError` in a value, if any."""
  if isinstance(value, (dict, list)):
    found = map(broken_in, value.values() if isinstance(value, dict) else value)
    return next((error for error in found if error), None)
  return value if isinstance(value, RecordError) else None
