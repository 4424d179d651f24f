"""The fields of a request's JSON, checked by pydantic, and the errors for wrong ones."""

import http
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

import pydantic
from pydantic import AfterValidator
from pydantic_core import ErrorDetails, PydanticCustomError

# Default of an error's "code" by status; another status gets its HTTP phrase.
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
# The type that a value must have, in words, by the type of pydantic's error.
_KINDS = {
  "list_type": "a list",
  "dict_type": "an object",
  "model_type": "an object",
  "string_type": "a text",
  "bool_type": "true or false",
  "int_type": "a whole number",
  "float_type": "a number",
  "finite_number": "a finite number",
}
# A bound in words, by its name in the context of pydantic's error.
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


class ApiError(Exception):
  """An error response: its HTTP status, a message of one line, the wrong field, and a code for programs."""

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


class Strict(pydantic.BaseModel):
  """A JSON object without unknown fields or coerced types: true and "1" are not numbers, 1.0 is not an integer.

  Null counts as absent, in every object.
  """

  model_config = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

  @pydantic.model_validator(mode="before")
  @classmethod
  def _without_null(cls, value: Any) -> Any:
    if not isinstance(value, dict):
      return value
    given = {name: x for name, x in value.items() if x is not None}
    for name in [name for name in given if name not in cls.model_fields][1:]:
      del given[name]  # one error of an unknown field is enough, where a client sends a hundred thousand
    return given

  @classmethod
  def parse(cls, body: Any) -> Self:
    """Parses the body of a request.

    Raises:
      ApiError: 400, for the first wrong field.
    """
    try:
      return cls.model_validate(body)
    except pydantic.ValidationError as error:
      raise _refused(error.errors(include_url=False)[0]) from None


def only(*values: Any) -> Any:
  """The type of an unsupported field, which accepts the listed values, since they change nothing, and refuses others.

  Without values, every value is refused.
  """

  def check(value: Any) -> Any:
    given = {k: x for k, x in value.items() if x is not None} if isinstance(value, dict) else value
    if any(type(given) is type(x) and given == x for x in values):  # true is not 1, nor 1 a 1.0
      return value
    raise refuse(f"is not supported: leave it out ({shown(value)})", "unsupported_value")

  return Annotated[Any, AfterValidator(check)]


def refuse(message: str, code: str = "invalid_value") -> PydanticCustomError:
  """The error of a field, for its validator to raise; `message` continues after the field's name."""
  return PydanticCustomError(code, "{message}", {"message": message})


def place(where: Sequence[str | int]) -> str:
  """The path of a field as a client would write it: messages[0].content."""
  text = "".join(f"[{x}]" if isinstance(x, int) else f".{x[:80]}" for x in where)
  return text.removeprefix(".")


def _refused(error: ErrorDetails) -> ApiError:
  """The ApiError of pydantic's first error."""
  kind, context = error["type"], error.get("ctx", {})
  where, value, code = error["loc"], error["input"], "invalid_value"
  if kind == "extra_forbidden":  # a typo should not be taken for a wish
    *parents, name = where
    at = f" of {place(parents)}" if parents else ""
    message = f"the field {shown(name)}{at} is not known: leave it out"
    return ApiError(400, message, place(where), code="unknown_parameter")
  if kind == "missing":
    message, code = "is missing", "missing_required_parameter"
  elif kind in _KINDS:
    message, code = f"must be {_KINDS[kind]}, got {shown(value)}", "invalid_type"
  elif "message" in context:
    message, code = context["message"], kind
  elif bounds := [f"{words} {context[name]}" for name, words in _BOUNDS.items() if name in context]:
    message = f"must be {bounds[0]}, got {shown(value)}"
  else:
    expected = context.get("expected") or " ".join(error["msg"].split())
    message = f"must be {expected}, got {shown(value)}"
  field = place(where)
  return ApiError(400, f"{field or 'the body'} {message}", field or None, code=code)


def shown(value: Any) -> str:
  """A value in a message, shortened to a bounded length."""
  if isinstance(value, (list, dict)):
    return "a list" if isinstance(value, list) else "an object"
  if value is None or isinstance(value, bool):
    return {None: "null", True: "true", False: "false"}[value]
  return repr(value[:40] if isinstance(value, str) else value)[:60]
