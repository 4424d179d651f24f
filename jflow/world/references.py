"""References for the world's scores: answers without the picture, true pictures and their features."""

import collections
import functools
import hashlib
import pathlib
import random
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jflow.files import replacing
from jflow.world import features, judge, questions, scenes, source
from jflow.world.questions import Question

LEARNED = 6000  # training questions that the baselines use
FREQUENT, BLIND, NEAREST = "most frequent answer", "question alone", "nearest picture"
_SIDE = 24  # pixels at which pictures are compared to find the nearest

Asked = tuple[scenes.Scene, Question]


class Scope(NamedTuple):
  """The part of the world that a benchmark is about."""

  prompts: tuple[str, ...] = scenes.TAGS  # kinds of scenes that prompts ask for
  shown: tuple[str, ...] = tuple(scenes.DEFAULT_TAGS)  # kinds of scenes that questions are about
  kinds: tuple[str, ...] = questions.KINDS  # of questions
  large: float = scenes.LARGE  # see `scenes.sample`
  spread: float = scenes.ANYWHERE


def asked_of(scope: Scope, split: str, count: int, seed: int) -> list[Asked]:
  """Questions with their scenes; see `questions.for_evaluation`."""
  return questions.for_evaluation(split, count, seed, scope.kinds, scope.shown, scope.large, scope.spread)


def baselines(asked: Sequence[Asked], scope: Scope = Scope()) -> dict[str, dict[str, float]]:
  """Kind of question -> baseline -> its accuracy.

  FREQUENT gives the most frequent right answer of the kind. BLIND gives the most frequent answer to the same words
  among LEARNED training questions. NEAREST gives the right answer for the training picture with the nearest pixels
  among those with the same question; of a choice it takes the option with that word. For questions that training does
  not have, both answer as FREQUENT.
  """
  learned = _learned(scope)
  kinds: dict[str, list[Asked]] = collections.defaultdict(list)
  for scene, question in asked:
    kinds[question.kind].append((scene, question))
  pixels = _Pixels()
  out = {}
  for kind, group in kinds.items():
    frequent = collections.Counter(q.answer for _, q in group).most_common(1)[0][0]
    right = dict.fromkeys((FREQUENT, BLIND, NEAREST), 0)
    for scene, question in group:
      pool = [(s, q) for s, q in learned.get(_words(question), ()) if s != scene]
      same = collections.Counter(q.answer for _, q in pool if q.question == question.question)
      right[FREQUENT] += question.answer == frequent
      right[BLIND] += question.answer == (same.most_common(1)[0][0] if same else frequent)
      right[NEAREST] += question.answer == (_nearest(scene, question, pool, pixels) or frequent)
    out[kind] = {name: count / len(group) for name, count in right.items()}
  return out


@functools.cache
def _learned(scope: Scope) -> dict[str, list[Asked]]:
  """Words of a question -> the training questions with these words, and their scenes."""
  out: dict[str, list[Asked]] = collections.defaultdict(list)
  for scene, question in asked_of(scope, "train", LEARNED, 1):
    out[_words(question)].append((scene, question))
  return dict(out)


class _Pixels:
  """The pixels of a scene, float32[_SIDE * _SIDE * 3], rendered once."""

  def __init__(self) -> None:
    self._known: dict[scenes.Scene, np.ndarray] = {}

  def __call__(self, scene: scenes.Scene) -> np.ndarray:
    if scene not in self._known:
      self._known[scene] = scene.render(_SIDE).astype(np.float32).ravel()
    return self._known[scene]


def _words(question: Question) -> str:
  """The question without the options of a choice."""
  return question.question.splitlines()[0]


def _options(question: Question) -> dict[str, str]:
  """Word -> letter of a choice."""
  lines = [line.split(". ", 1) for line in question.question.splitlines() if line[1:3] == ". "]
  return {word: letter for letter, word in lines}


def _nearest(scene: scenes.Scene, question: Question, pool: Sequence[Asked], pixels: _Pixels) -> str | None:
  if not pool:
    return None
  own = pixels(scene)
  _, found = min(pool, key=lambda one: float(np.square(pixels(one[0]) - own).sum()))
  words = {letter: word for word, letter in _options(found).items()}
  word = words.get(found.answer, found.answer)
  options = _options(question)
  return options.get(word) if options else word


def features_of_renders(
  split: str,
  tags: Sequence[str],
  count: int,
  side: int,
  name: str,
  cache: pathlib.Path | None,
  scope: Scope = Scope(),
  kinds: Sequence[str] = ("tex", "state"),
) -> dict[str, np.ndarray]:
  """Features (see `features.stacked`) of true pictures with the same shares of categories.

  Args:
    split: of the world.
    tags: categories of the pictures to compare with, in order.
    count: of renders.
    side: in pixels.
    name: of the set, which seeds its draws.
    cache: folder for the result, which depends only on these arguments and the code; None: no cache.
    scope: sizes and places of the objects.
    kinds: of features.
  """
  path = None
  if cache:
    files = (*source.CODE, *(pathlib.Path(module.__file__) for module in (judge, features)))
    code = b"".join(file.read_bytes() for file in files)
    drawn = (split, tuple(tags), count, side, name, scope.large, scope.spread, tuple(kinds))
    key = hashlib.sha256(code + repr(drawn).encode()).hexdigest()
    path = cache / f"renders-{key[:16]}.npz"
    if (kept := _kept(path)) is not None:
      return kept
  out = features.stacked(kinds, renders(split, tags, count, side, name, scope))
  if path:
    try:
      cache.mkdir(parents=True, exist_ok=True)
      with replacing(path) as new, open(new, "wb") as file:
        np.savez(file, **out)
    except OSError as error:  # the scores do not need the cache
      print(f"jflow: features of true pictures are not kept: {error}", file=sys.stderr)
  return out


def _kept(path: pathlib.Path) -> dict[str, np.ndarray] | None:
  """The arrays of a cached file; None where it is missing or damaged."""
  try:
    with np.load(path, allow_pickle=False) as file:
      return dict(file)
  except FileNotFoundError:
    return None
  except Exception as error:  # zip, zlib and NumPy raise many types
    print(f"jflow: {path} is damaged ({type(error).__name__}): its features are made anew", file=sys.stderr)
    return None


def renders(
  split: str, tags: Sequence[str], count: int, side: int, name: str, scope: Scope = Scope()
) -> list[np.ndarray]:
  """True pictures, uint8[side, side, 3] each, with the same shares of categories."""
  rng = random.Random(f"evaluation/{split}/{name}")
  drawn = (scenes.sample(tags[i % len(tags)], split, rng, scope.large, scope.spread)[0] for i in range(count))
  return [scene.render(side) for scene in drawn]
