"""A loaded model with its tokenizer: `generate` makes images, `understand` answers questions."""

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jflow import checks, registry
from jflow.data import images
from jflow.data.images import ImageError
from jflow.data.prompts import chat_prompt, generation_prompt
from jflow.data.records import Turn
from jflow.data.sequences import IMAGE_MARK
from jflow.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from jflow.errors import CannotGenerate, UserError
from jflow.generation.base import family, settings
from jflow.inference import decoding, likelihood
from jflow.inference.decoding import Request, bucket
from jflow.models.unified import UnifiedModel, for_inference


class Pipeline:
  """A model for inference with its tokenizer. Made by `jflow.load`."""

  def __init__(
    self,
    model: UnifiedModel,
    params: Any,
    tokenizer: Tokenizer,
    template: str,
    can_generate: bool = True,
    *,
    sampling: Mapping[str, Any] = {},
    beside: "Pipeline | None" = None,
  ):
    """Places the parameters on the device, as inference lays them out.

    Args:
      model: its modules.
      params: of it, nested.
      tokenizer: of the checkpoint.
      template: of turns, "plain" (stages 1, 2), "chat" (stage 3, JanusFlow, Janus) or "pro" (Janus-Pro).
      can_generate: whether there is an autoencoder.
      sampling: settings of its pictures in place of its family's defaults.
      beside: another one with the same model, of whose arrays on the device those that are equal are shared.
    """
    self.model, params = for_inference(model, params)
    self.params, self.can_generate = _placed(params, beside and beside.params), can_generate
    self.family = family(self.model.config.generation)
    self.sampler = registry.load(self.family.sampler)(self.model, self.params, tokenizer)
    self.tokenizer, self.template, self._sampling = tokenizer, template, sampling

  def settings(self, **given: Any) -> Any:
    """The typed sampling settings of this model's family; None stands for the checkpoint's own, else its default.

    Raises:
      UserError: a setting of another family, or a value out of its range.
    """
    return settings(self.family, {**self._sampling, **{name: x for name, x in given.items() if x is not None}})

  def generate(
    self,
    prompts: str | Sequence[str],
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    noise: np.ndarray | None = None,
    *,
    num_images: int = 1,
    seeds: Sequence[int] | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    **rest: Any,
  ) -> list[Image.Image]:
    """Generates `num_images` images per prompt; an image depends on its prompt and seed, never on its batch.

    Args:
      prompts: one or several texts.
      steps, guidance: settings of the family; for flow solver steps (30) and w of eq. 5 (2). None: as the checkpoint
        says, else the default.
      seed: image j of a prompt starts from seed + j.
      noise: for flow f32[I, C, h, w] latents at time 0 (PyTorch's layout) in place of seeds, I = prompts x num_images.
      num_images: images per prompt.
      seeds: I seeds in place of seed + j; not beside `noise`.
      batch_size: images generated at once.
      progress: called with (images done, images in all).
      on_step: called with (steps done, steps) about ten times per batch.
      rest: other settings of the family, such as those of `generation.flow.settings.Settings`.

    Returns:
      PIL images, those of the first prompt first.

    Raises:
      UserError: a value out of its range, a setting that this model's family does not have, an empty prompt or one
        longer than the context.
    """
    prompts = [prompts] if isinstance(prompts, str | Mapping) or not np.iterable(prompts) else list(prompts)
    check_prompts(prompts, seed=seed, num_images=num_images, batch_size=batch_size)
    seed, num_images, batch_size = int(seed), int(num_images), int(batch_size)  # NumPy's wrap around
    chosen = self.settings(steps=steps, guidance=guidance, **rest)
    ids = [x for x in map(self.generation_prompt, prompts) for _ in range(num_images)]
    if noise is not None:
      if seeds is not None:
        raise UserError("give noise or seeds: noise takes the place of seeds")
      start = self.sampler.given(noise, len(ids))
    else:
      if seeds is not None and not np.iterable(seeds):
        raise UserError(f"seeds must be a number for each of {len(ids)} images, got {seeds!r:.80}")
      seeds = [seed + j for j in range(num_images)] * len(prompts) if seeds is None else list(seeds)
      if len(seeds) != len(ids):
        raise UserError(f"seeds must have one number for each of {len(ids)} images, got {len(seeds)}")
      for one in seeds:
        checks.seed(one)
      start = self.sampler.start(seeds)
    out: list[Image.Image] = []
    for at in range(0, len(ids), batch_size):
      tokens, lengths = padded(ids[at : at + batch_size], self.tokenizer.pad)
      pixels = self.sampler.sample(tokens, lengths, start[at : at + batch_size], chosen, on_step)
      out.extend(to_image(x) for x in pixels)
      if progress:
        progress(len(out), len(ids))
    return out

  def prepare_images(self, prompts: Sequence[str], chosen: Any, *, rows: int, compile: bool = True) -> bool:
    """Compiles the programs of `generate` for a batch of these prompts, or only checks that they are compiled.

    Args:
      prompts: texts.
      chosen: typed settings, see `settings`.
      rows: images of the batch.
      compile: False only checks.

    Returns:
      Whether all of them are compiled.

    Raises:
      UserError: see `generation_prompt`.
    """
    slots = bucket(max(len(self.generation_prompt(prompt)) for prompt in set(prompts)))
    return self.sampler.prepare(rows, slots, chosen, compile)

  def generation_prompt(self, text: str) -> np.ndarray:
    """The tokens of a prompt for an image, int32[n].

    Raises:
      CannotGenerate: there is no VAE.
      UserError: the prompt is empty or longer than the context.
    """
    if not self.can_generate:
      raise CannotGenerate(
        "this checkpoint has no VAE, so it can answer but not paint: give the VAE's directory (--vae=DIR)"
      )
    c = self.model.config
    room = c.language_model.max_length - self.family.layout.slots(c.written_patches)
    return generation_prompt(text, self.template, self.tokenizer, room)

  def request(
    self,
    messages: str | Sequence[Any],
    images: Any = (),
    max_tokens: int = 512,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    system: str = "",
    mark: str | None = None,
    context: int | None = None,
    read: Callable[[Any, int], np.ndarray] | None = None,
  ) -> Request:
    """Checks a conversation and returns a request for a `decoding.Decoder`; other arguments as in `understand`.

    Args:
      mark: the only image mark, in place of the two that `understand` knows.
      context: of the decoder, where it is less than the model's.
      read: used in place of `prepare_image`.

    Raises:
      UserError: an unreadable image, a value out of its range, a prompt longer than the context.
    """
    if not isinstance(images, (list, tuple)):
      images = [images]
    if isinstance(messages, Mapping | bytes) or not isinstance(messages, Iterable):
      raise UserError(f"messages must be a question or a list of turns, got {messages!r:.80}")
    if not isinstance(system, str):
      raise UserError(f"system must be text, got {system!r:.80}")
    checks.answer(max_tokens, temperature, top_p, seed)
    max_tokens, seed, temperature, top_p = int(max_tokens), int(seed), float(temperature), float(top_p)  # from NumPy's
    c = self.model.config
    context = min(context or c.language_model.max_length, c.language_model.max_length)
    prompt = chat_prompt(
      messages if mark else _with_marks(messages, len(images)),
      len(images),
      self.tokenizer,
      c.patches,
      self.template,
      system,
      mark or IMAGE_MARK,
      context - 1,
    )
    pixels = np.zeros((len(images), c.image_size, c.image_size, 3), np.uint8)
    for i, image in enumerate(images):
      pixels[i] = (read or prepare_image)(image, c.image_size)
    budget = min(max_tokens, context - len(prompt.tokens))
    return Request(prompt.tokens, prompt.image_starts, pixels, budget, temperature, top_p, seed)

  def understand(
    self,
    messages: str | Sequence[Any],
    images: Any = (),
    max_tokens: int = 512,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    system: str = "",
    stream: Callable[[str], None] | None = None,
  ) -> str:
    """Answers the last question of a conversation.

    Args:
      messages: a question, or turns {"role": "user" | "assistant" | "system", "content": text}, see
        `prompts.chat_prompt`. "<image>" marks say where the images stand, or "<image_placeholder>" as in the
        published code; without any, they stand before the first question.
      images: one or a list of paths, encoded bytes, PIL images or uint8[H, W, 3] arrays.
      max_tokens: longest answer.
      temperature: 0 is greedy.
      top_p: mass of the nucleus to sample from.
      seed: of the sampling.
      system: system prompt; the release's own is `jflow.data.prompts.SYSTEM_PROMPT`.
      stream: called with each new piece of the answer; their concatenation is the returned text.

    Raises:
      UserError: an unreadable image, a value out of its range, a prompt longer than the context.
    """
    request = self.request(messages, images, max_tokens, temperature=temperature, top_p=top_p, seed=seed, system=system)
    say = None if stream is None else lambda _, piece: stream(piece)
    return self.understand_batch([request], stream=say)[0]

  def understand_batch(
    self,
    requests: Sequence[Request],
    batch_size: int = 16,
    *,
    stream: Callable[[int, str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
  ) -> list[str]:
    """Answers many conversations at once; an answer does not depend on the others.

    Args:
      requests: made by `request`, of any lengths.
      batch_size: rows decoded at the same time; when one ends, the next request takes its row.
      stream: called with (number of the request, new piece of its answer).
      progress: called with (answers done, answers in all).

    Returns:
      One answer per request, in their order.
    """
    checks.whole("batch_size", batch_size)
    requests = list(requests)
    if not requests:
      return []
    for one in requests:
      if not isinstance(one, Request):
        raise UserError(f"a request must be made by `request`, got {one!r:.80}")
    return decoding.answer_all(self, requests, batch_size, stream, progress)

  def loglikelihood(
    self, messages: str | Sequence[Any], images: Any, answers: Sequence[str], *, system: str = ""
  ) -> list[tuple[float, bool]]:
    """Log-likelihood of given answers to a question, for multiple-choice benchmarks.

    Args:
      messages, images, system: as in `understand`.
      answers: texts; the space that training puts before an answer is added, and the end of the text is not scored.

    Returns:
      Per answer the sum of its tokens' log-probabilities (nats), and whether greedy decoding would give it.

    Raises:
      UserError: as `understand`; an empty answer, or one that does not fit the context.
    """
    answers = answers if isinstance(answers, str) or not np.iterable(answers) else list(answers)
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
      raise UserError(f"answers must be a list of texts, got {answers!r:.80}")
    if not answers:
      return []
    return likelihood.loglikelihood(self, self.request(messages, images, 1, system=system), answers)


def _placed(params: Any, shared: Any | None) -> Any:
  """The parameters on the device, those of `shared` in place of equal ones."""
  if shared is None:
    return jax.device_put(params)

  def place(x: Any, other: jax.Array) -> jax.Array:
    own = jax.device_put(x)
    return other if own.dtype == other.dtype and bool(jnp.array_equal(own, other)) else own

  return jax.tree.map(place, params, shared)


def check_prompts(prompts: Sequence[str], *, seed: int, num_images: int, batch_size: int) -> None:
  """Checks the arguments of `Pipeline.generate` that need no model; raises UserError."""
  if not prompts:
    raise UserError("give at least one prompt")
  if not all(isinstance(prompt, str) for prompt in prompts):
    raise UserError("a prompt must be text")
  if not all(prompt.strip() for prompt in prompts):
    raise UserError("the prompt is empty: say what to paint")
  for name, value in dict(num_images=num_images, batch_size=batch_size).items():
    checks.whole(name, value)
  checks.seed(seed, num_images - 1)


def to_image(pixels: np.ndarray) -> Image.Image:
  """f32[H, W, 3] about [-1, 1] -> PIL image; clipped, then truncated to uint8 as the release does."""
  return Image.fromarray(((np.clip(pixels, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8))


def prepare_image(image: Any, size: int) -> np.ndarray:
  """A path, bytes, PIL image or array -> uint8[size, size, 3]; see `images.for_understanding`."""
  name = (str(image) or "''") if isinstance(image, (str, pathlib.Path)) else "the image"
  if isinstance(image, (str, pathlib.Path)):
    try:
      image = pathlib.Path(image).read_bytes()
    except (OSError, ValueError) as error:  # the latter of a zero byte in its name
      why = error.strerror if isinstance(error, OSError) else error
      raise UserError(f"image {name} cannot be read: {why}") from error
  try:
    return images.for_understanding(image, size)
  except ImageError as error:
    raise UserError(f"{name}: {error}") from error


def _with_marks(messages: str | Sequence[Any], count: int) -> Sequence[Any]:
  """Puts one image mark per image before the first question, where the messages hold none."""
  messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
  if not all(isinstance(m, (Turn, Mapping)) for m in messages):
    return messages  # which `prompts.chat_prompt` refuses
  turns = [m._asdict() | {"content": m.text} if isinstance(m, Turn) else dict(m) for m in messages]
  if not all(isinstance(t.get("content"), str) for t in turns):
    return turns  # likewise
  mark = IMAGE_MARK
  marked = lambda mark: any(mark in t["content"] for t in turns)
  if count and not marked(mark) and marked(published := SPECIAL_TOKENS["image"]):
    return [t | {"content": t["content"].replace(published, mark)} for t in turns]
  asked = [i for i, t in enumerate(turns) if str(t.get("role", "")).lower() == "user"]
  if asked and count and not marked(mark):
    turns[asked[0]]["content"] = mark * count + "\n" + turns[asked[0]]["content"]
  return turns


def padded(ids: Sequence[np.ndarray], pad: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompts as one array: tokens int32[I, S], padded on the right with `pad` to a usual width, and lengths int32[I]."""
  lengths = np.asarray([len(x) for x in ids], np.int32)
  tokens = np.full((len(ids), bucket(int(lengths.max()))), pad, np.int32)
  for row, x in zip(tokens, ids):
    row[: len(x)] = x
  return tokens, lengths
