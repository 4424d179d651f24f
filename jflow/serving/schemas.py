"""What clients send and get: JSON in the widely used OpenAI shape, checked field by field."""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jflow.flow import SOLVERS

# Stands for an image inside the text of a turn. No text may hold it.
IMAGE_MARK = "\x00"

MAX_PICTURES = 10  # of one painting request, as in the API whose shape this is
MAX_STEPS = 200
SEEDS = 2**32
_DATA_URI = re.compile(r"data:image/(png|jpeg|jpg|webp);base64,", re.IGNORECASE)

# Fields that clients send by habit -> the values that ask for nothing that is missing here.
_CHAT_IGNORED = {
  "n": (1,), "stop": (None, []), "frequency_penalty": (None, 0), "presence_penalty": (None, 0), "logit_bias": (None, {}),
  "logprobs": (None, False), "top_logprobs": (None, 0), "tools": (None, []), "tool_choice": (None, "none", "auto"),
  "response_format": (None, {"type": "text"}), "modalities": (None, ["text"]),
}  # fmt: skip
_PAINTING_IGNORED = {
  "quality": (None, "auto", "standard"), "style": (None,), "background": (None, "auto", "opaque"), "stream": (None, False),
  "output_format": (None, "png"), "moderation": (None, "auto", "low"),
}  # fmt: skip
_ALWAYS_IGNORED = ("user", "metadata", "store", "safety_identifier", "service_tier")


class ApiError(Exception):
  """A request that gets an error: its HTTP status, one line, and the field that is wrong."""

  def __init__(
    self, status: int, message: str, field: str | None = None, headers: Mapping[str, str] | None = None
  ):
    super().__init__(message)
    self.status, self.message, self.field = status, " ".join(message.split()), field
    self.headers = dict(headers or {})

  def body(self) -> dict[str, Any]:
    """The error as JSON."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
    return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.status}}


class Chat(NamedTuple):
  """A conversation to answer."""

  turns: list[dict[str, str]]  # "role" and "content", in which IMAGE_MARK stands for the next image
  images: list[bytes]
  system: str
  max_tokens: int
  temperature: float
  top_p: float
  seed: int | None
  stream: bool
  include_usage: bool  # of a stream


class Settings(NamedTuple):
  """How to paint; pictures with the same settings share a batch."""

  steps: int
  guidance: float
  solver: str
  shift: float


class Painting(NamedTuple):
  """Pictures to paint from one prompt."""

  prompt: str
  count: int
  seed: int | None  # of the first picture; the next ones take the seeds that follow
  settings: Settings


def parse_chat(body: dict[str, Any], model: str) -> Chat:
  """A request for /v1/chat/completions.

  Args:
    body: the JSON object.
    model: name of the model that is served; a request may leave it out.

  Raises:
    ApiError: what is wrong, with the field's name.
  """
  fields = _Fields(body, model, _CHAT_IGNORED)
  messages = fields.take("messages", list)
  limits = [fields.integer(name, None, 1, 2**31 - 1) for name in ("max_tokens", "max_completion_tokens")]
  temperature = fields.number("temperature", 0.0, 0.0, 2.0)
  top_p = fields.number("top_p", 1.0, 0.0, 1.0)
  if top_p == 0:
    raise ApiError(400, "top_p must be above 0, and at most 1", "top_p")
  seed = fields.integer("seed", None, 0, SEEDS - 1)
  stream = fields.take("stream", bool, False)
  options = fields.take("stream_options", dict, {})
  fields.end()
  turns, images, system = _conversation(messages)
  return Chat(
    turns, images, system, limits[0] or limits[1] or 512, temperature, top_p, seed, stream,
    bool(options.get("include_usage")),
  )  # fmt: skip


def parse_painting(body: dict[str, Any], model: str, image_size: int) -> Painting:
  """A request for /v1/images/generations; `image_size` is the side of the model's pictures.

  Raises:
    ApiError: what is wrong, with the field's name.
  """
  fields = _Fields(body, model, _PAINTING_IGNORED)
  prompt = fields.take("prompt", str)
  if not prompt.strip():
    raise ApiError(400, "the prompt is empty: say what to paint", "prompt")
  count = fields.integer("n", 1, 1, MAX_PICTURES)
  size, mine = fields.take("size", str, "auto"), f"{image_size}x{image_size}"
  if size not in (mine, "auto"):
    raise ApiError(400, f"size must be {mine}, the only one that this model paints: {size[:40]!r}", "size")
  if fields.take("response_format", str, "b64_json") != "b64_json":
    raise ApiError(400, "response_format must be b64_json: no picture is kept to link to", "response_format")
  guidance = fields.number("guidance", 2.0, 0.0, 1000.0)
  if 0 < guidance < 1:
    raise ApiError(400, "guidance must be at least 1 (1: none), or 0 (ignore the prompt)", "guidance")
  solver = fields.take("solver", str, "euler")
  if solver not in SOLVERS:
    raise ApiError(400, f"solver must be one of {', '.join(SOLVERS)}", "solver")
  shift = fields.number("shift", 1.0, 0.01, 100.0)
  settings = Settings(fields.integer("steps", 30, 1, MAX_STEPS), guidance, solver, shift)
  seed = fields.integer("seed", None, 0, SEEDS - count)
  fields.end()
  return Painting(prompt, count, seed, settings)


class _Fields:
  """Takes the fields of a body one by one; what nobody took is refused at the end."""

  def __init__(self, body: dict[str, Any], model: str, ignored: Mapping[str, tuple]):
    self._rest = dict(body)
    for name in _ALWAYS_IGNORED:
      self._rest.pop(name, None)
    for name, values in ignored.items():
      if (value := self._rest.pop(name, values[0])) not in values:
        raise ApiError(400, f"{name} is not supported: leave it out ({json.dumps(value)[:80]})", name)
    if (named := self.take("model", str, model)) != model:
      raise ApiError(404, f"the model {named[:80]!r} is not served here, but {model!r} is", "model")

  def take(self, name: str, kind: type, default: Any = ...) -> Any:
    """A field of one JSON type; null counts as left out."""
    value = self._rest.pop(name, None)
    if value is None:
      if default is ...:
        raise ApiError(400, f"{name} is missing", name)
      return default
    if not isinstance(value, kind):
      names = {list: "a list", dict: "an object", str: "a text", bool: "true or false"}
      raise ApiError(400, f"{name} must be {names[kind]}", name)
    return value

  def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
    """A whole number in [low, high]."""
    value = self._rest.pop(name, None)
    if value is None:
      return default
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
      raise ApiError(400, f"{name} must be a whole number from {low} to {high}", name)
    return value

  def number(self, name: str, default: float, low: float, high: float) -> float:
    """A number in [low, high]."""
    value = self._rest.pop(name, None)
    if value is None:
      return default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
      raise ApiError(400, f"{name} must be a number from {low:g} to {high:g}", name)
    return float(value)

  def end(self) -> None:
    """Raises ApiError for a field that is not known: a typo should not be taken for a wish."""
    if self._rest:
      name = next(iter(self._rest))
      raise ApiError(400, f"the field {name[:80]!r} is not known", name[:80])


def _conversation(messages: list[Any]) -> tuple[list[dict[str, str]], list[bytes], str]:
  """Turns with marks for their images, the images, and the system prompt."""
  turns: list[dict[str, str]] = []
  images: list[bytes] = []
  system: list[str] = []
  for i, message in enumerate(messages):
    where = f"messages[{i}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
      raise ApiError(400, f'{where} must be an object with "role" and "content"', where)
    role = message["role"]
    if role not in ("system", "developer", "user", "assistant"):
      raise ApiError(400, f"{where}.role must be system, user or assistant: {role[:40]!r}", f"{where}.role")
    text = _content(message.get("content"), f"{where}.content", images if role == "user" else None)
    if role not in ("system", "developer"):
      turns.append({"role": role, "content": text})
    elif turns:
      raise ApiError(400, f"{where}: a system message comes before all others", where)
    else:
      system.append(text)
  return turns, images, "\n\n".join(system)


def _content(content: Any, where: str, images: list[bytes] | None) -> str:
  """The text of a message, each part on a line of its own; an image leaves its mark, and its bytes in `images`."""
  parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
  if not isinstance(parts, list):
    raise ApiError(400, f"{where} must be a text or a list of parts", where)
  out = ""
  for i, part in enumerate(parts):
    here = f"{where}[{i}]" if content is parts else where
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
      if IMAGE_MARK in part["text"]:
        raise ApiError(400, f"{here}: the text holds a NUL character", here)
      out += ("\n" if out else "") + part["text"]
    elif kind == "image_url":
      if images is None:
        raise ApiError(400, f"{here}: only a user's message can show an image", here)
      images.append(_image(part.get("image_url"), f"{here}.image_url"))
      out += ("\n" if out and not out.endswith(IMAGE_MARK) else "") + IMAGE_MARK
    else:
      raise ApiError(400, f'{here} must be a part of type "text" or "image_url"', here)
  return out


def _image(value: Any, where: str) -> bytes:
  """The bytes of a data URI. Nothing is fetched and no file is opened for a client."""
  url = value.get("url") if isinstance(value, dict) else value
  if not isinstance(url, str):
    raise ApiError(400, f'{where} must be {{"url": "data:image/png;base64,..."}}', where)
  match = _DATA_URI.match(url)
  if not match:
    hint = "remote addresses and files are not opened" if not url.startswith("data:") else "of no other kind"
    raise ApiError(
      400, f"{where}.url must be a data URI with a base64 PNG, JPEG or WebP image; {hint}", where
    )
  try:
    return base64.b64decode(url[match.end() :], validate=True)
  except (binascii.Error, ValueError):
    raise ApiError(400, f"{where}.url is not valid base64", where) from None
