"""Golden arrays that every model has: SigLIP, the LLM's input and logits for rows with images, greedy answers, text."""

import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow.errors import UserError
from jflow.interop import golden
from jflow.interop.golden import IDS, MASK, MOST_STEPS, REAL, Group, Output
from jflow.models.cache import Cache
from jflow.models.config import ModelConfig
from jflow.models.unified import UnifiedModel

CLEAR = 1e-3  # distance of the best logit or cosine from the second above which the choice must be the golden one


class Runner:
  """Runner of a model's parts in float32 on the inputs of a golden file."""

  def __init__(self, model: UnifiedModel, params: Any):
    self.model, self.params = model, params
    self.vocabulary = model.config.language_model.vocab_size

  def apply(self, method: str | Callable[..., Any], *args: Any) -> Any:
    """The result of one method of the model, compiled."""
    return _apply(self.model, method, self.params, *args)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(model: UnifiedModel, method: str | Callable[..., Any], params: Any, *args: Any) -> Any:
  return model.apply({"params": params}, *args, method=method)


def read_slots(model: UnifiedModel, features: jax.Array) -> jax.Array:
  """The slots of images to read, [I, K, D], from SigLIP's features."""
  return model.reader.slots(features)


def clear_until_it_splits(ours: np.ndarray, theirs: np.ndarray, margin: np.ndarray) -> np.ndarray:
  """The mask of choices to compare, bool[B, T]: those that are clear, up to an unclear one that was made differently.

  What follows such a choice continues another sequence.
  """
  n = min(ours.shape[-1], theirs.shape[-1], margin.shape[-1])
  split = (ours[..., :n] != theirs[..., :n]) & (margin[..., :n] <= CLEAR)
  mask = np.ones(ours.shape, bool)
  mask[..., :n] = (margin[..., :n] > CLEAR) & ~np.maximum.accumulate(split, axis=-1)
  return mask


# --- rows with images to read ----------------------------------------------------------------------------


def _understanding(runner: Runner, g: Mapping[str, np.ndarray], want: Callable[[str], bool]) -> dict[str, Output]:
  tokens, mask = g["und/input_ids"].astype(np.int32), g["und/attention_mask"].astype(bool)
  features = runner.apply("features", pixels_of(g, runner.model.config.image_size))
  index, place = place_images(runner, g)
  slots = runner.apply(read_slots, features)
  embeds = runner.apply("assemble", tokens, slots[place].reshape(len(tokens), -1, slots.shape[-1]), index)
  out = {
    "und/features": Output(np.asarray(features)),
    "und/inputs_embeds": Output(np.asarray(embeds), mask),
  }
  if want("und/logits"):
    hidden = runner.apply("backbone", embeds, positions(mask), mask.astype(np.int32)).hidden
    out["und/logits"] = Output(np.asarray(runner.apply("logits", hidden)), mask)
  if want("und/greedy_tokens"):
    answer, margin = _greedy(runner, np.asarray(embeds), mask, greedy_count(g))
    compared = None
    if "und/greedy_tokens" in g:
      compared = clear_until_it_splits(answer, g["und/greedy_tokens"], g.get("und/greedy_margin", margin))
    out["und/greedy_tokens"] = Output(answer, compared)
  return out


def positions(mask: np.ndarray) -> np.ndarray:
  """Positions of the tokens of padded rows, counted from each row's first, int32[B, S]."""
  return np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)


def pixels_of(g: Mapping[str, np.ndarray], size: int) -> np.ndarray:
  """The pictures of the rows, f32[I, H, W, 3]."""
  return g["und/pixels"].astype(np.float32).reshape(-1, 3, size, size).transpose(0, 2, 3, 1)


def place_images(runner: Runner, g: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Distributes images over rows: int32[B, S] indices into the slots of a row, and int32[B, M] its images."""
  c, tokens = runner.model.config, g["und/input_ids"]
  k = 1 + c.patches
  images = math.prod(g["und/pixels"].shape[:-3])
  starts = image_starts(tokens, images, c.patches, *special_ids(g, runner.vocabulary))
  most = max(map(len, starts))
  index, place = np.full(tokens.shape, -1, np.int32), np.zeros((len(tokens), most), np.int32)
  used = 0
  for b, row in enumerate(starts):
    for m, start in enumerate(row):
      index[b, start : start + k] = m * k + np.arange(k)
      place[b, m] = used
      used += 1
  return index, place


def _greedy(runner: Runner, embeds: np.ndarray, mask: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Decodes `count` tokens per row as `understand` does: prompts padded on the right, each row at its own length.

  Returns:
    (int32[B, count], the distance from each one's logit to the second best, f32[B, count]).
  """
  lengths = mask.sum(axis=1).astype(np.int32)
  order = np.argsort(~mask, axis=1, kind="stable")  # left padding to the right end
  embeds = np.take_along_axis(embeds, order[..., None], axis=1)
  b, s = mask.shape
  segments = (np.arange(s) < lengths[:, None]).astype(np.int32)
  cache = Cache.empty(runner.model.config.language_model, b, s + count, jnp.float32)
  out = runner.apply("backbone", embeds, np.broadcast_to(np.arange(s, dtype=np.int32), (b, s)), segments, cache)
  cache, last = out.cache.replace(length=lengths), out.hidden[np.arange(b), lengths - 1]
  logits, answer, margins = runner.apply("logits", last), [], []
  for i in range(count):
    best = np.asarray(jax.lax.top_k(logits, 2)[0])
    margins.append(best[:, :1] - best[:, 1:])
    answer.append(np.asarray(jnp.argmax(logits, axis=-1), np.int32)[:, None])
    if i + 1 < count:
      x = runner.apply("embed", answer[-1])
      out = runner.apply("backbone", x, lengths[:, None] + i, np.ones((b, 1), np.int32), cache)
      cache, logits = out.cache, runner.apply("logits", out.hidden[:, 0])
  return np.concatenate(answer, axis=1), np.concatenate(margins, axis=1)


def check_understanding(path: pathlib.Path, g: Mapping[str, np.ndarray]) -> None:
  """See `golden.Group.check`, of the rows of `und/`."""
  tokens, mask = g["und/input_ids"], g["und/attention_mask"]
  if tokens.shape != mask.shape:
    raise UserError(f"{path}: und/attention_mask is {list(mask.shape)}, und/input_ids {list(tokens.shape)}")
  if not mask.astype(bool).any(axis=1).all():
    raise UserError(f"{path}: und/attention_mask hides all of row {int(np.argmin(mask.astype(bool).any(axis=1)))}")
  greedy_count(g)
  if "und/greedy_margin" in g and "und/greedy_tokens" in g:
    golden.check_margin(f"{path}: und/greedy_margin", g["und/greedy_margin"], g["und/greedy_tokens"].shape)


def greedy_count(g: Mapping[str, np.ndarray]) -> int:
  """The number of tokens to decode for und/greedy_tokens, or for its first ones where the file holds only those.

  Raises:
    UserError: the file holds only the last tokens, or the array has other axes.
  """
  names = [name for name in g if golden.base(name) == "und/greedy_tokens"]
  for name in names:
    if g[name].ndim != 2 or len(g[name]) != len(g["und/input_ids"]) or g[name].shape[1] > MOST_STEPS:
      raise UserError(f"{name} must have the axes [B, tokens], got the shape {list(g[name].shape)}")
  if "und/greedy_tokens" in g:
    return g["und/greedy_tokens"].shape[1]
  for name in names:
    found = golden.VARIANT.search(name)
    if found is None or found[1] != "first":
      raise UserError(f"{name} needs und/greedy_tokens beside it, which says how many tokens there are")
  return max((g[name].shape[1] for name in names), default=0)


def special_ids(g: Mapping[str, np.ndarray], vocabulary: int) -> tuple[int, int]:
  """The ids of <begin_of_image> and <image_placeholder> in the rows of `und/`."""
  special = g.get("und/special_ids", np.array([vocabulary - 4, vocabulary - 3]))
  golden.check_shape("und/special_ids", special.shape, (2,))
  return int(special[0]), int(special[1])


def image_starts(tokens: np.ndarray, images: int, patches: int, boi: int, image: int) -> list[np.ndarray]:
  """The positions at which each row's images begin.

  Raises:
    UserError: the rows do not match the images.
  """
  starts = [np.flatnonzero(row == boi) for row in tokens]
  if sum(map(len, starts)) != images:
    raise UserError(f"und/input_ids has {sum(map(len, starts))} images, und/pixels {images}")
  for b, row in enumerate(starts):
    for start in row:
      if start + patches >= tokens.shape[1] or not (tokens[b, start + 1 : start + 1 + patches] == image).all():
        raise UserError(f"und/input_ids row {b}: {patches} image ids should follow position {start}")
  return starts


def fits_understanding(g: Mapping[str, np.ndarray], c: ModelConfig) -> None:
  """See `golden.Group.fits`, of the rows of `und/`."""
  vocabulary, tokens, pixels = c.language_model.vocab_size, g["und/input_ids"], g["und/pixels"]
  golden.check_ids("und/input_ids", tokens[g["und/attention_mask"].astype(bool)], vocabulary)
  golden.check_shape("und/pixels", pixels.shape[-3:], (3, c.image_size, c.image_size))
  image_starts(tokens, math.prod(pixels.shape[:-3]), c.patches, *special_ids(g, vocabulary))


# --- text ------------------------------------------------------------------------------------------------


def _text(runner: Runner, g: Mapping[str, np.ndarray], want: Callable[[str], bool]) -> dict[str, Output]:
  tokens = g["text/input_ids"].astype(np.int32)
  rows = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  hidden = runner.apply("backbone", runner.apply("embed", tokens), rows, np.ones_like(tokens)).hidden
  return {"text/logits": Output(np.asarray(runner.apply("logits", hidden)))}


UND = {
  "und/pixels": (REAL, ("..", "3", "H", "W")),
  "und/input_ids": (IDS, ("B", "S")),
  "und/attention_mask": (MASK, ("B", "S")),
}
_NEEDS = tuple(UND)
GROUPS = (
  Group(
    inputs=UND | {"und/greedy_margin": (REAL, ("B", "T"))},
    outputs={
      "und/features": ("understanding_encoder", _NEEDS),
      "und/inputs_embeds": ("understanding_projector, understanding_start or the embedding", _NEEDS),
      "und/logits": ("language_model", _NEEDS),
      "und/greedy_tokens": ("greedy decoding with the cache", _NEEDS),
    },
    check=check_understanding,
    fits=fits_understanding,
    run=_understanding,
    besides=("und/special_ids",),
  ),
  Group(
    inputs={"text/input_ids": (IDS, ("B", "S"))},
    outputs={"text/logits": ("language_model", ("text/input_ids",))},
    fits=lambda g, c: golden.check_ids("text/input_ids", g["text/input_ids"], c.language_model.vocab_size),
    run=_text,
  ),
)
