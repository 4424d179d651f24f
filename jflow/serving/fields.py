"""The fields of a request's JSON, taken one by one, and the error that a wrong one gets."""

import http
from collections.abc import Mapping, Sequence
from typing import Any

# What an error's "code" says where its raiser names none; another status gets its HTTP phrase.
_CODES = {
  400: "invalid_value",
  401: "invalid_api_key",
  404: "unknown_url",
  408: "request_timeout",
  413: "request_too_large",
  415: "unsupported_content_type",
  429: "rate_limit_exceeded",
  500: "server_error",
  504: "timeout",
}
_KINDS = {
  list: "a list",
  dict: "an object",
  str: "a text",
  bool: "true or false",
  int: "a whole number",
  float: "a number",
}


class ApiError(Exception):
  """A request that gets an error: its HTTP status, one line, the wrong field, and a code for programs."""

  def __init__(
    self,
    status: int,
    message: str,
    field: str | None = None,
    headers: Mapping[str, str] | None = None,
    code: str | None = None,
  ):
    super().__init__(message)
    self.status, self.message, self.field = status, " ".join(message.split()), field
    self.headers = dict(headers or {})
    self.code = code or _CODES.get(status) or http.HTTPStatus(status).phrase.lower().replace(" ", "_")

  def body(self) -> dict[str, Any]:
    """The error as JSON."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
    return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}


class Fields:
  """Takes the fields of an object one by one; what nobody took is refused at the end.

  Null counts as left out, in every object.
  """

  def __init__(self, value: Any, where: str = ""):
    """Args: `value` as JSON gave it, and `where` it stands in the request ("" is the top).

    Raises:
      ApiError: it is no object.
    """
    if not isinstance(value, dict):
      message = f"{where or 'the body'} must be an object, got {shown(value)}"
      raise ApiError(400, message, where or None, code="invalid_type")
    self._where = where
    self._rest = {name: x for name, x in value.items() if x is not None}

  def path(self, name: str) -> str:
    """A field as the request's author would name it."""
    return f"{self._where}.{name}" if self._where else name

  def refuse(self, name: str, message: str, code: str | None = None) -> ApiError:
    """The error of a field; `message` goes on after its name."""
    return ApiError(400, f"{self.path(name)} {message}", self.path(name), code=code)

  def take(self, name: str, kind: type, default: Any = ...) -> Any:
    """A field of one JSON type. true is no number, 1.0 is no whole one, and "1" is none at all."""
    value = self._rest.pop(name, None)
    if value is None:
      if default is ...:
        raise self.refuse(name, "is missing", "missing_required_parameter")
      return default
    if not is_kind(value, kind):
      raise self.refuse(name, f"must be {_KINDS[kind]}, got {shown(value)}", "invalid_type")
    return value

  def any(self, name: str) -> Any:
    """A field of any type; None where it is left out."""
    return self._rest.pop(name, None)

  def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
    """A whole number in [low, high]."""
    value = self.take(name, int, default)
    if value is not default and not low <= value <= high:
      raise self.refuse(name, f"must be a whole number from {low} to {high}, got {shown(value)}")
    return value

  def number(self, name: str, default: float, low: float, high: float) -> float:
    """A number in [low, high]."""
    value = self.take(name, float, default)
    if not low <= value <= high:
      raise self.refuse(name, f"must be a number from {low:g} to {high:g}, got {shown(value)}")
    return float(value)

  def choice(self, name: str, values: Sequence[str], default: Any = ...) -> str:
    """One of some texts."""
    value = self.take(name, str, default)
    if value is not default and value not in values:
      raise self.refuse(name, f"must be one of {', '.join(values)}, got {shown(value)}")
    return value

  def ignore(self, harmless: Mapping[str, type | Sequence[Any]]) -> None:
    """Drops fields that ask for nothing which is missing here.

    Args:
      harmless: name -> the type that every value may have, or the only values that ask for nothing.

    Raises:
      ApiError: another value: what it asks for would not be in the answer.
    """
    for name, allowed in harmless.items():
      if isinstance(allowed, type):
        self.take(name, allowed, None)
        continue
      value = self.any(name)
      given = {k: x for k, x in value.items() if x is not None} if isinstance(value, dict) else value
      if given is not None and not any(_equal(given, x) for x in allowed):
        raise self.refuse(name, f"is not supported: leave it out ({shown(value)})", "unsupported_value")

  def end(self) -> None:
    """Raises ApiError for a field that is not known: a typo should not be taken for a wish."""
    if self._rest:
      name = next(iter(self._rest))
      at = f" of {self._where}" if self._where else ""
      message = f"the field {shown(name)}{at} is not known: leave it out"
      raise ApiError(400, message, self.path(name[:80]), code="unknown_parameter")


def is_kind(value: Any, kind: type) -> bool:
  """Whether a value has a JSON type; `float` stands for any number."""
  if isinstance(value, bool):
    return kind is bool
  return isinstance(value, (int, float) if kind is float else kind)


def shown(value: Any) -> str:
  """A value in a message: short, whatever a client sent."""
  if isinstance(value, (list, dict)):
    return _KINDS[type(value)]
  if value is None or isinstance(value, bool):
    return {None: "null", True: "true", False: "false"}[value]
  return repr(value[:40] if isinstance(value, str) else value)[:60]


def _equal(value: Any, wanted: Any) -> bool:
  """Equality in which true is not 1, nor 1 a 1.0."""
  return type(value) is type(wanted) and value == wanted
