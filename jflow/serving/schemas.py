"""What clients send: JSON in the widely used OpenAI shape, checked field by field.

Null is left out. A field that asks for nothing which is missing here is ignored: a hint that changes no
answer, or a value that stands for what is done anyway. What jflow does not compute is refused by name.
"""

import hashlib
from typing import Any, NamedTuple

from jflow.generation.flow.equations import SOLVERS
from jflow.serving import data_uri
from jflow.serving.fields import ApiError, Fields, shown

# Stands for an image inside the text of a turn. No text may hold it.
IMAGE_MARK = "\x00"

MAX_PICTURES = 10  # of one painting request, as in the API whose shape this is
MAX_STEPS = 200
MAX_STOPS = 4
MAX_STOP_LENGTH = 1000  # characters
SEEDS = 2**32  # of the model: a key keeps 32 bits

_ZERO = (0, 0.0)
# Who asks, and how to bill, keep and cache it.
_HINTS = {
  "user": str,
  "metadata": dict,
  "safety_identifier": str,
  "store": (False,),
  "service_tier": ("auto", "default"),
  "prompt_cache_key": str,
  "prompt_cache_retention": str,
  "prompt_cache_options": dict,
}
_CHAT_IGNORED = _HINTS | {
  "n": (1,),
  "frequency_penalty": _ZERO,
  "presence_penalty": _ZERO,
  "logit_bias": ({},),
  "logprobs": (False,),
  "top_logprobs": (0,),
  "modalities": (["text"],),
  "response_format": ({"type": "text"},),
  "reasoning_effort": ("none",),
  "verbosity": ("medium",),
  # Nothing can be called where no tools are given.
  "tools": ([],),
  "tool_choice": ("none", "auto"),
  "parallel_tool_calls": bool,
  "functions": ([],),
  "function_call": ("none", "auto"),
  # Of the public API, and not computed here whatever they say.
  "audio": (),
  "prediction": (),
  "web_search_options": (),
  "moderation": (),
}
_PAINTING_IGNORED = _HINTS | {
  "quality": ("auto", "standard"),
  "background": ("auto", "opaque"),
  "moderation": ("auto", "low"),
  "stream": (False,),
  "partial_images": (0,),
  "output_format": ("png",),
  "output_compression": (100,),
  "style": (),
  "complexity": (),
  "frame_count": (),
  "frame_duration_ms": (),
  "svg": (),
}
_MESSAGE_IGNORED = {
  "name": str,  # the templates have no place for it
  "tool_calls": ([],),
  "function_call": (),
  "audio": (),
  "refusal": ("",),
  "annotations": ([],),
}
_PART_IGNORED = {"prompt_cache_breakpoint": dict}
_DETAILS = ("auto", "low", "high", "original")  # a model reads every picture at one size, the largest it has


class Chat(NamedTuple):
  """A conversation to answer."""

  turns: list[dict[str, str]]  # "role" and "content" as of `examples.chat_prompt`; IMAGE_MARK is an image
  images: list[bytes]
  image_fields: list[str]  # where each stands in the request
  max_tokens: int
  temperature: float
  top_p: float
  seed: int | None
  stream: bool
  include_usage: bool  # of a stream
  stop: tuple[str, ...] = ()  # sequences that end the answer, and are not part of it


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
  fields = _of_model(body, model)
  fields.ignore(_CHAT_IGNORED)
  turns, images, image_fields = _conversation(fields.take("messages", list))
  limits = [fields.integer(name, None, 1, 2**31 - 1) for name in ("max_tokens", "max_completion_tokens")]
  temperature = fields.number("temperature", 0.0, 0.0, 2.0)
  top_p = fields.number("top_p", 1.0, 0.0, 1.0)
  if top_p == 0:
    raise fields.refuse("top_p", "must be above 0, and at most 1, got 0")
  seed, stop = _seed(fields), _stop(fields)
  stream = fields.take("stream", bool, False)
  options = Fields(fields.take("stream_options", dict, {}), "stream_options")
  include_usage = options.take("include_usage", bool, False)
  options.ignore({"include_obfuscation": (False,)})
  options.end()
  fields.end()
  most = min((x for x in limits if x is not None), default=512)
  return Chat(turns, images, image_fields, most, temperature, top_p, seed, stream, include_usage, stop)


def parse_painting(body: dict[str, Any], model: str, image_size: int) -> Painting:
  """A request for /v1/images/generations; `image_size` is the side of the model's pictures.

  Raises:
    ApiError: what is wrong, with the field's name.
  """
  fields = _of_model(body, model)
  fields.ignore(_PAINTING_IGNORED)
  prompt = fields.take("prompt", str)
  if not prompt.strip():
    raise fields.refuse("prompt", "is empty: say what to paint")
  count = fields.integer("n", 1, 1, MAX_PICTURES)
  fields.choice("size", (f"{image_size}x{image_size}", "auto"), None)
  if fields.take("response_format", str, "b64_json") != "b64_json":
    raise fields.refuse("response_format", "must be b64_json: no picture is kept to link to")
  guidance = fields.number("guidance", 2.0, 0.0, 1000.0)
  if 0 < guidance < 1:
    message = f"must be at least 1 (1: none), or 0 (ignore the prompt), got {guidance:g}"
    raise fields.refuse("guidance", message)
  solver = fields.choice("solver", tuple(SOLVERS), "euler")
  shift = fields.number("shift", 1.0, 0.01, 100.0)
  settings = Settings(fields.integer("steps", 30, 1, MAX_STEPS), guidance, solver, shift)
  seed = _seed(fields, count)
  fields.end()
  return Painting(prompt, count, seed, settings)


def fold_seed(seed: int) -> int:
  """The seed in [0, SEEDS) that one of up to 64 bits, or a negative one, stands for.

  Those in the range stand for themselves; the others are hashed, so that neighbours and multiples differ.
  """
  if 0 <= seed < SEEDS:
    return seed
  return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest())


def _of_model(body: dict[str, Any], model: str) -> Fields:
  """The fields of a request for this model."""
  fields = Fields(body)
  if (named := fields.take("model", str, model)) != model:
    raise no_model(named, model)
  return fields


def no_model(named: str, model: str) -> ApiError:
  """The error of a name that is not the served model's."""
  message = f"the model {shown(named)} is not served here, but {model!r} is"
  return ApiError(404, message, "model", code="model_not_found")


def _seed(fields: Fields, count: int = 1) -> int | None:
  """The seed of the first of `count` results; each has to be one that can be asked for."""
  return fields.integer("seed", None, -(2**63), 2**64 - count)


def _stop(fields: Fields) -> tuple[str, ...]:
  """The sequences that end an answer."""
  value = fields.any("stop")
  stops = [value] if isinstance(value, str) else [] if value is None else value
  if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
    raise fields.refuse("stop", f"must be a text or a list of texts, got {shown(value)}", "invalid_type")
  if len(stops) > MAX_STOPS:
    raise fields.refuse("stop", f"must be at most {MAX_STOPS} texts, got {len(stops)}")
  if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
    raise fields.refuse("stop", f"must be texts of 1 to {MAX_STOP_LENGTH} characters")
  return tuple(stops)


def _conversation(messages: list[Any]) -> tuple[list[dict[str, str]], list[bytes], list[str]]:
  """Turns with marks for their images, the images, and where these stand."""
  turns: list[dict[str, str]] = []
  images: dict[str, bytes] = {}
  for i, value in enumerate(messages):
    message = Fields(value, f"messages[{i}]")
    role = message.choice("role", ("system", "developer", "user", "assistant"))
    message.ignore(_MESSAGE_IGNORED)
    text = _content(message, role, images)
    message.end()
    turns.append({"role": role, "content": text})
  return turns, list(images.values()), list(images)


def _content(message: Fields, role: str, images: dict[str, bytes]) -> str:
  """The text of a message, each part on its own line; an image leaves its mark, and its bytes in `images`."""
  content = message.any("content")
  if content is None and role == "assistant":
    return ""
  if content is None:
    raise message.refuse("content", "is missing", "missing_required_parameter")
  if not isinstance(content, (str, list)):
    wrong = f"must be a text or a list of parts, got {shown(content)}"
    raise message.refuse("content", wrong, "invalid_type")
  out = ""
  for i, value in enumerate([content] if isinstance(content, str) else content):
    where = message.path("content" if isinstance(content, str) else f"content[{i}]")
    part = Fields({"type": "text", "text": value} if isinstance(value, str) else value, where)
    kind = part.choice("type", ("text", "image_url"))
    if kind == "text":
      text = part.take("text", str)
      if role == "assistant":
        text = text.replace(IMAGE_MARK, "\ufffd")  # a model may say it, and its answer comes back
      if IMAGE_MARK in text:
        raise ApiError(400, f"{where} must be a text without NUL characters", where)
      out += ("\n" if out else "") + text
    elif role != "user":
      raise ApiError(400, f"{where} must be a text: only a user's message can show an image", where)
    else:
      images[part.path("image_url")] = _image(part)
      out += ("\n" if out and not out.endswith(IMAGE_MARK) else "") + IMAGE_MARK
    part.ignore(_PART_IGNORED)
    part.end()
  return out


def _image(part: Fields) -> bytes:
  """The bytes of a part's picture. Nothing is fetched and no file is opened for a client."""
  value = part.any("image_url")
  if value is None:
    raise part.refuse("image_url", "is missing", "missing_required_parameter")
  image = Fields({"url": value} if isinstance(value, str) else value, part.path("image_url"))
  url = image.take("url", str)
  image.choice("detail", _DETAILS, None)
  image.end()
  try:
    return data_uri.decode(url)
  except ValueError as error:
    raise image.refuse("url", str(error), "invalid_image_url") from None
