"""Values of a table in which what cannot be read stands as a `RecordError`, so that it costs the rows that need it."""

from typing import Any

from jflow.data.records import RecordError


def broken_in(value: Any) -> RecordError | None:
  """Returns the first part of a value that could not be read."""
  if isinstance(value, (dict, list)):
    found = map(broken_in, value.values() if isinstance(value, dict) else value)
    return next((error for error in found if error), None)
  return value if isinstance(value, RecordError) else None
