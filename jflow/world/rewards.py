"""Rewards of the world (see `jflow.rl.rewards`): what the judge says, and how far a picture is from true ones."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jflow.world import features, judge, references, scenes

_TRUE = 600  # renders: half that a picture's texture is compared with, half that say how far true ones lie
_LEAST = 0.05  # of a feature's deviation, as a share of the largest, so that constant ones do not decide


def strict(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[float]:
  """1 where a picture shows exactly what was asked and nothing else, else 0."""
  return [float(judge.strict(judge.detect(_large(x)), about)) for x, about in zip(images, metadata, strict=True)]


def lenient(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[float]:
  """1 where GenEval's rules accept a picture, else 0."""
  return [float(judge.lenient(judge.detect(_large(x)), about)) for x, about in zip(images, metadata, strict=True)]


def true(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[float]:
  """Minus how much farther a picture's texture is from that of true pictures than 19 of 20 true ones: a guard.

  0 for all that lie within, so that no picture gains by likeness to the mean: variety costs nothing. Distance is the
  root mean square over Gabor features of the difference from their mean, in their deviations. It sees single pictures,
  so that a small shift that all share costs nothing either.
  """
  mean, deviation, typical = _true(images.shape[1])
  return [min(0.0, typical - _distance(features.texture(x), mean, deviation)) for x in images]


def unknown(about: Mapping[str, Any]) -> str:
  """Why the judge would never accept a picture of a prompt with this metadata, or could not read it; "" if neither."""
  include = about["include"]
  if not isinstance(include, list) or not include or not all(isinstance(x, Mapping) for x in include):
    return f"'include' must be a list of objects, got {include!r:.60}"
  for wanted in include:
    if wanted.get("class") not in scenes.SHAPES:
      return (
        f"'class' must be one of {', '.join(scenes.SHAPES)}, the shapes of the world, got {wanted.get('class')!r:.60}"
      )
    if type(wanted.get("count")) is not int or wanted["count"] < 1:
      return f"'count' must be a whole number above 0, got {wanted.get('count')!r:.60}"
    if wanted.get("color", "red") not in tuple(scenes.COLORS):
      return f"'color' must be one of {', '.join(scenes.COLORS)}, got {wanted['color']!r:.60}"
  return ""


strict.needs = lenient.needs = ("include",)  # pyrefly: ignore
strict.refuses = lenient.refuses = unknown  # pyrefly: ignore


@functools.cache
def _true(side: int) -> tuple[np.ndarray, np.ndarray, float]:
  """Mean and deviation of the texture of true pictures of `side` pixels, and the distance that 95 % of others keep."""
  drawn = np.stack([features.texture(x) for x in references.renders("train", scenes.TAGS, _TRUE, side, "reward")])
  seen, others = drawn[: _TRUE // 2], drawn[_TRUE // 2 :]
  mean, deviation = seen.mean(0), seen.std(0)
  deviation = np.maximum(deviation, _LEAST * deviation.max())
  return mean, deviation, float(np.quantile([_distance(x, mean, deviation) for x in others], 0.95))


def _distance(texture: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> float:
  return float(np.sqrt(np.mean(np.square((texture - mean) / deviation))))


def _large(image: np.ndarray) -> np.ndarray:
  """A picture that is large enough for the judge."""
  if len(image) >= judge.LEAST_SIDE:
    return image
  return np.asarray(Image.fromarray(image).resize((judge.LEAST_SIDE,) * 2, Image.Resampling.BICUBIC))
