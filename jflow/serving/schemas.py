"""Schemas of requests: JSON in the widely used OpenAI shape, checked field by field.

Null counts as absent. A field that changes nothing is ignored: a hint that affects no answer, or the value of the
default behaviour. Fields that ask for something jflow does not compute are refused by name.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, WrapValidator

from jflow.errors import UserError
from jflow.generation.base import FAMILIES, Family
from jflow.serving import data_uri
from jflow.serving.fields import ApiError, Strict, only, place, refuse, shown

if TYPE_CHECKING:
  from jflow.inference.pipeline import Pipeline

# The mark of an image inside the text of a turn. A client's text must not hold it.
IMAGE_MARK = "\x00"

MAX_PICTURES = 10  # per request for images, as in OpenAI's API
MAX_STOPS = 4
MAX_STOP_LENGTH = 1000  # characters
SEEDS = 2**32  # number of the model's seeds: a key keeps 32 bits


class Chat(NamedTuple):
  """A conversation to answer."""

  turns: list[dict[str, str]]  # "role" and "content" as of `prompts.chat_prompt`; IMAGE_MARK is an image
  images: list[bytes]
  image_fields: list[str]  # field of the request that holds each
  max_tokens: int
  temperature: float
  top_p: float
  seed: int | None
  stream: bool
  include_usage: bool  # of a stream
  stop: tuple[str, ...] = ()  # sequences that end the answer and are not part of it
  model: str = ""  # name of the adapter; "": the base


class Images(NamedTuple):
  """Images to generate from one prompt."""

  prompt: str
  count: int
  seed: int | None  # of the first image; the next ones take the seeds that follow
  settings: Any  # typed, of the model's way to write images; images with the same settings share a batch
  model: str = ""  # name of the adapter; "": the base


def _stops(value: Any) -> tuple[str, ...]:
  """The sequences that end an answer."""
  stops = [value] if isinstance(value, str) else value
  if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
    raise refuse(f"must be a text or a list of texts, got {shown(value)}", "invalid_type")
  if len(stops) > MAX_STOPS:
    raise refuse(f"must be at most {MAX_STOPS} texts, got {len(stops)}")
  if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
    raise refuse(f"must be texts of 1 to {MAX_STOP_LENGTH} characters")
  return tuple(stops)


def _prompt(value: str) -> str:
  if not value.strip():
    raise refuse("is empty: say what to paint")
  return value


_Limit = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class _Hints(Strict):
  """Fields about the client, billing, storage and caching, which change no answer."""

  user: str = ""
  metadata: dict[str, Any] = {}
  safety_identifier: str = ""
  store: only(False) = None
  service_tier: only("auto", "default") = None
  prompt_cache_key: str = ""
  prompt_cache_retention: str = ""
  prompt_cache_options: dict[str, Any] = {}


class _Image(Strict):
  """The source of an image."""

  url: str
  # A model reads every image at one size, its largest.
  detail: Literal["auto", "low", "high", "original"] = "auto"


class _Part(Strict):
  """A part of a message: text or an image, by its type."""

  type: Literal["text", "image_url"]
  text: str = None
  image_url: Annotated[_Image, BeforeValidator(lambda x: {"url": x} if isinstance(x, str) else x)] = None
  prompt_cache_breakpoint: dict[str, Any] = {}


def _text_or_parts(value: Any, parts: Callable[[Any], list[_Part]]) -> str | list[_Part]:
  if isinstance(value, str):
    return value
  if not isinstance(value, list):
    raise refuse(f"must be a text or a list of parts, got {shown(value)}", "invalid_type")
  return parts([{"type": "text", "text": x} if isinstance(x, str) else x for x in value])


class _Message(Strict):
  """A turn of a conversation."""

  role: Literal["system", "developer", "user", "assistant"]
  content: Annotated[list[_Part], Field(fail_fast=True), WrapValidator(_text_or_parts)] = None
  name: str = ""  # the templates have no place for it
  tool_calls: only([]) = None
  function_call: only() = None
  audio: only() = None
  refusal: only("") = None
  annotations: only([]) = None


class _StreamOptions(Strict):
  include_usage: bool = False
  include_obfuscation: only(False) = None


class _ChatBody(_Hints):
  """The body of /v1/chat/completions."""

  model: str = ""
  messages: Annotated[list[_Message], Field(fail_fast=True)]
  max_tokens: _Limit = None
  max_completion_tokens: _Limit = None
  temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
  top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
  seed: _Seed = None
  stop: Annotated[Any, PlainValidator(_stops)] = ()
  stream: bool = False
  stream_options: _StreamOptions = _StreamOptions()
  n: only(1) = None
  frequency_penalty: only(0, 0.0) = None
  presence_penalty: only(0, 0.0) = None
  logit_bias: only({}) = None
  logprobs: only(False) = None
  top_logprobs: only(0) = None
  modalities: only(["text"]) = None
  response_format: only({"type": "text"}) = None
  reasoning_effort: only("none") = None
  verbosity: only("medium") = None
  # Without tools nothing can be called.
  tools: only([]) = None
  tool_choice: only("none", "auto") = None
  parallel_tool_calls: bool = False
  functions: only([]) = None
  function_call: only("none", "auto") = None
  # Fields of the public API that are not computed here, whatever their value.
  audio: only() = None
  prediction: only() = None
  web_search_options: only() = None
  moderation: only() = None


class _ImagesBody(_Hints):
  """The body of /v1/images/generations, without the sampling settings, see `ImageRequests`."""

  model: str = ""
  prompt: Annotated[str, AfterValidator(_prompt)]
  n: Annotated[int, Field(ge=1, le=MAX_PICTURES)] = 1
  size: str = "auto"
  response_format: str = "b64_json"
  seed: _Seed = None
  quality: only("auto", "standard") = None
  background: only("auto", "opaque") = None
  moderation: only("auto", "low") = None
  stream: only(False) = None
  partial_images: only(0) = None
  output_format: only("png") = None
  output_compression: only(100) = None
  style: only() = None
  complexity: only() = None
  frame_count: only() = None
  frame_duration_ms: only() = None
  svg: only() = None


def parse_chat(body: dict[str, Any], model: str, adapters: Collection[str] = ()) -> Chat:
  """Parses a request for /v1/chat/completions.

  Args:
    body: the JSON object.
    model: name of the served model; a request may leave it out.
    adapters: names of the models beside it.

  Raises:
    ApiError: a field is wrong; it is named.
  """
  given = _ChatBody.parse(body)
  chosen = _chosen(given, model, adapters)
  turns, images = _conversation(given.messages)
  most = min((x for x in (given.max_tokens, given.max_completion_tokens) if x is not None), default=512)
  return Chat(
    turns,
    list(images.values()),
    list(images),
    most,
    float(given.temperature),
    float(given.top_p),
    given.seed,
    given.stream,
    given.stream_options.include_usage,
    given.stop,
    chosen,
  )


class ImageRequests:
  """Parses requests for /v1/images/generations; the sampling settings are fields of the body."""

  def __init__(self, family: Family, model: str, image_size: int, usual: Mapping[str, Any] | None = None):
    """Args:
    family: of the model.
    model: its name.
    image_size: the side of its images in pixels.
    usual: the settings where a request sets none, by the name of the adapter, "" for the model itself; None: the
      family's defaults.
    """
    self._family, self._model, self._size = family, model, image_size
    self._usual = usual or {"": family.settings()}
    others = {name for other in FAMILIES.all().values() for name in other.setting_names} - family.setting_names
    foreign = f"is not a setting of a model that writes images by {family.name}: leave it out"

    def refused(_: Any) -> Any:
      raise refuse(foreign, "unknown_parameter")

    fields = {name: (Annotated[Any, AfterValidator(refused)], None) for name in others - {*_ImagesBody.model_fields}}
    own = lambda field: [getattr(settings, field.name) for settings in self._usual.values()]
    fields |= {field.name: (_of_setting(field, own(field)), field.default) for field in family.served}
    self._body = pydantic.create_model("_Body", __base__=_ImagesBody, **fields)

  @classmethod
  def of(cls, pipelines: Mapping[str, "Pipeline"], name: str) -> Self:
    """Args: adapter -> pipeline, "" for the model `name` itself."""
    base = pipelines[""]
    usual = {adapter: each.settings() for adapter, each in pipelines.items()}
    return cls(base.family, name, base.model.config.image_size, usual)

  def parse(self, body: dict[str, Any]) -> Images:
    """The images that a request asks for.

    Raises:
      ApiError: a field is wrong; it is named.
    """
    given, size = self._body.parse(body), f"{self._size}x{self._size}"
    chosen = _chosen(given, self._model, [name for name in self._usual if name])
    if given.size not in (size, "auto"):
      raise ApiError(400, f"size must be one of {size}, auto, got {shown(given.size)}", "size")
    if given.response_format != "b64_json":
      raise ApiError(400, "response_format must be b64_json: no picture is kept to link to", "response_format")
    if given.seed is not None and given.seed + given.n > 2**64:  # the pictures take the seeds that follow
      raise ApiError(400, f"seed must be at most {2**64 - given.n}, got {given.seed}", "seed")
    return Images(given.prompt, given.n, given.seed, self._settings(given, self._usual[chosen]), chosen)

  def _settings(self, given: _ImagesBody, usual: Any) -> Any:
    """The typed settings, `usual` but for those given; what their constructor refuses is an error of that field."""
    names = {field.name for field in self._family.served} & given.model_fields_set
    values = {name: getattr(given, name) for name in names}
    try:
      return dataclasses.replace(usual, **values)
    except UserError as error:
      message, name = str(error), str(error).partition("=")[0]
      if name not in values:
        raise ApiError(400, message) from None
      value, _, rest = message.removeprefix(f"{name}=").partition(" ")
      raise ApiError(400, f"{name} {rest}, got {value}", name) from None


def _of_setting(field: dataclasses.Field, own: Sequence[Any]) -> Any:
  """The type of a sampling setting as a field of a request; what a model sets as its own is within its limits."""
  if "choices" in field.metadata:
    return Literal[tuple(field.metadata["choices"])]
  bounds = field.metadata.get("served")
  least, most = bounds if isinstance(bounds, tuple) else (None, field.metadata.get("most"))
  if isinstance(bounds, tuple):
    least, most = min(least, *own), max(most, *own)
  return Annotated[type(field.default), Field(ge=least, le=most)]


def fold_seed(seed: int) -> int:
  """A seed of up to 64 bits, or a negative one, mapped into [0, SEEDS).

  Seeds in the range map to themselves; others are hashed, so that neighbours and multiples differ.
  """
  if 0 <= seed < SEEDS:
    return seed
  return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest())


def _chosen(given: _ChatBody | _ImagesBody, model: str, adapters: Collection[str]) -> str:
  """The adapter that a request names; "" for the base."""
  if "model" not in given.model_fields_set or given.model == model:
    return ""
  if given.model not in adapters:
    raise no_model(given.model, (model, *adapters))
  return given.model


def no_model(named: str, served: Sequence[str]) -> ApiError:
  """The error for a name other than those of the served models."""
  told = f"{', '.join(map(repr, served[:8]))}{', ...' if len(served) > 8 else ''}"
  message = f"the model {shown(named)} is not served here, but {told} {'is' if len(served) == 1 else 'are'}"
  return ApiError(404, message, "model", code="model_not_found")


def _conversation(messages: list[_Message]) -> tuple[list[dict[str, str]], dict[str, bytes]]:
  """Turns with marks for their images, and the images by their fields."""
  turns: list[dict[str, str]] = []
  images: dict[str, bytes] = {}
  for i, message in enumerate(messages):
    turns.append({"role": message.role, "content": _content(message, ("messages", i, "content"), images)})
  return turns, images


def _content(message: _Message, where: tuple[str | int, ...], images: dict[str, bytes]) -> str:
  """The text of a message, each part on its own line; adds a mark per image, and its bytes to `images`."""
  content = message.content
  if content is None and message.role != "assistant":
    raise _missing(place(where))
  if content is None or isinstance(content, str):
    return _text(content or "", message.role, place(where))
  out = ""
  for i, part in enumerate(content):
    field = place((*where, i))
    if getattr(part, part.type) is None:
      raise _missing(f"{field}.{part.type}")
    if part.text is not None and part.image_url is not None:
      raise ApiError(400, f"{field} must be a text or a picture, and not both", field)
    if part.type == "text":
      out += ("\n" if out else "") + _text(part.text, message.role, field)
    elif message.role != "user":
      raise ApiError(400, f"{field} must be a text: only a user's message can show an image", field)
    else:
      images[f"{field}.image_url"] = _image(part.image_url.url, f"{field}.image_url.url")
      out += ("\n" if out and not out.endswith(IMAGE_MARK) else "") + IMAGE_MARK
  return out


def _missing(field: str) -> ApiError:
  return ApiError(400, f"{field} is missing", field, code="missing_required_parameter")


def _text(text: str, role: str, field: str) -> str:
  if role == "assistant":
    return text.replace(IMAGE_MARK, "\ufffd")  # a model may say it, and its answer comes back
  if IMAGE_MARK in text:
    raise ApiError(400, f"{field} must be a text without NUL characters", field)
  return text


def _image(url: str, field: str) -> bytes:
  """The bytes of an image. Nothing is fetched and no file is opened for a client."""
  try:
    return data_uri.decode(url)
  except ValueError as error:
    raise ApiError(400, f"{field} {error}", field, code="invalid_image_url") from None
