"""The data source of the world: unlimited pictures with exact captions and questions, for runs without a network.

Pictures show one to four colored shapes on gray, in GenEval's terms: a class is a shape. `scenes` renders them,
`questions` asks about them; this file describes them and makes them a source of records. Some pairs of shape and color,
some counts and some relations are held out of all training pictures and texts, to measure generalization.
"""

import bisect
import hashlib
import itertools
import pathlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jflow.batch import TASKS
from jflow.config import DataConfig
from jflow.data.records import Record
from jflow.errors import UserError
from jflow.world import questions, scenes, words
from jflow.world.scenes import DEFAULT_TAGS, SEVERAL, TAGS, Combination, Rng, Scene, pick, shuffled
from jflow.world.words import NUMBERS

VERSION = 1  # to increment with any edit that changes a record; the tests hold a digest of some
# The files that the scores of an evaluation depend on.
CODE = tuple(pathlib.Path(file) for file in (scenes.__file__, words.__file__, questions.__file__, __file__))
LONG_CAPTIONS = 0.25  # share of captions that describe every object
CAPTION_TURNS = 0.4  # share of understanding's records whose answer is a caption
# Wordings of captions; evaluation uses the first.
TEMPLATES = ("a picture of {}", "an image with {}", "{} on a gray background", "there {verb} {}", "{}")


def open_source(task: str, config: DataConfig) -> "WorldSource":
  """The source "shapes" of a run's section `data`; see `jflow.data.sources`."""
  return WorldSource(task, **vars(config.shapes))


class WorldSource:
  """A source of records of the world, each a pure function of (seed, split, task, index). Picklable.

  Attributes:
    fingerprint: hash of the arguments and of VERSION.
  """

  def __init__(
    self,
    task: str,
    size: int,
    seed: int,
    split: str = "train",
    tags: Mapping[str, float] | None = None,
    long_captions: float = LONG_CAPTIONS,
    named_colors: float = 0.0,
    asked: Sequence[tuple[str, float]] = (),
    in_order: float = 0.0,
    large: float = scenes.LARGE,
    spread: float = scenes.ANYWHERE,
  ):
    """Checks and stores the arguments.

    Args:
      task: "understanding", "generation" or "text".
      size: number of records.
      seed: of the whole world.
      split: "train", "val" (same distribution as training, other scenes) or "held_out" (each scene shows at least
        one held-out combination).
      tags: share of each kind of scene, any sum above 0; kinds not named have none. Default: DEFAULT_TAGS.
      long_captions: share of captions, of either task, that describe every object.
      named_colors: share of generation's captions, and of texts, whose first sentence names every color, whatever the
        kind of scene. Colors are learned long before shapes and then identify the objects of a sentence.
      asked: (kind of question, weight) pairs; other kinds have weight 1, and questions.PLACE 0.
      in_order: share of generation's captions, and of texts, whose first sentence names objects in the order of x + y
        of their centers: of two, the left one first where they are more side by side than one above the other, else
        the upper one. Otherwise the order is random, as it always is in a sentence with a relation. With random order
        a caption of two objects without colors leaves their places open, which makes generation harder to learn.
      large: share of the scenes of one or two different objects that hold a large one.
      spread: most that a lone object lies from the middle along each axis, of the side of the picture.

    Raises:
      UserError: an argument is out of range.
    """
    shares_of = dict(long_captions=long_captions, named_colors=named_colors, in_order=in_order, large=large)
    for name, share in shares_of.items():
      if not 0 <= share <= 1:
        raise UserError(f"data.shapes.{name} must be a share from 0 to 1, got {share}")
    if not 0 <= spread <= scenes.ANYWHERE:
      raise UserError(f"data.shapes.spread must be from 0 to {scenes.ANYWHERE}, got {spread}")
    self._large, self._spread = large, spread
    self._long_captions, self._named_colors, self._in_order = long_captions, named_colors, in_order
    self._asked = dict.fromkeys(questions.KINDS, 1.0) | {questions.PLACE: 0.0}
    if any(not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in asked):
      raise UserError(f"data.shapes.asked must hold pairs, as (('relation', 4.0),), got {asked!r}")
    for kind, weight in asked:
      words.check("kind of question", kind, tuple(self._asked))
      if not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise UserError(f"data.shapes.asked must give {kind!r} a weight >= 0, got {weight}")
      self._asked[kind] = weight
    if not any(self._asked[kind] for kind in ("existence", "existence_shape", "count")):
      raise UserError(f"data.shapes.asked must leave existence or count, which every scene allows, got {asked!r}")
    shares = dict(DEFAULT_TAGS if tags is None else tags)
    words.check("task", task, TASKS)
    words.check("split", split, scenes.SPLITS)
    for tag, share in shares.items():
      words.check("tag", tag, TAGS + (SEVERAL,))
      if not 0 <= share < float("inf"):
        raise UserError(f"data.shapes.tags must give {tag!r} a share >= 0, got {share}")
    if not sum(shares.values()):
      raise UserError(f"data.shapes.tags must hold a share above 0, got {shares}")
    if size < 1:
      raise UserError(f"data.shapes.size must be at least 1 record, got {size}")
    self._task, self._size, self._seed, self._split = task, int(size), int(seed), split
    self._tags = tuple(shares)
    key = (VERSION, task, size, seed, split, shares, long_captions, named_colors, self._asked, in_order)
    placed = (large, spread) if (large, spread) != (scenes.LARGE, scenes.ANYWHERE) else ()  # as before they were fields
    self.fingerprint = hashlib.sha256(repr(key + placed).encode()).hexdigest()
    self._bounds = [share / sum(shares.values()) for share in itertools.accumulate(shares.values())]

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < self._size:
      raise IndexError(f"record {index} of {self._size}")
    rng = random.Random(f"{self._seed}/{self._split}/{self._task}/{index}")
    tag = self._tags[min(bisect.bisect_right(self._bounds, rng.random()), len(self._tags) - 1)]
    scene, combination = scenes.sample(tag, self._split, rng, self._large, self._spread)
    name = f"shapes-{self._split}-{self._task}-{index}"
    if self._task == "generation":
      told = self._told(scene, combination, rng)
      return Record(name, (scene,), caption(scene, told, rng, self._long_captions), ())
    if self._task == "text":
      return Record(name, (), _document(scene, self._told(scene, combination, rng), rng), ())
    if rng.random() < CAPTION_TURNS:
      return Record(name, (scene,), describe(scene, rng.random() < self._long_captions), ())
    return Record(name, (scene,), "", questions.conversation(scene, rng, self._asked))

  def _told(self, scene: Scene, combination: Combination, rng: Rng) -> Combination:
    """The combination of the first sentence, sometimes with every color named, or with objects in order."""
    things = scene.objects[: len(combination.pairs)]
    pairs = combination.pairs
    if self._named_colors and rng.random() < self._named_colors:
      pairs = tuple((thing.shape, thing.color) for thing in things)
    if self._in_order and rng.random() < self._in_order and not combination.relation:
      pairs = tuple(pair for _, pair in sorted(zip(things, pairs), key=lambda both: both[0].x + both[0].y))
    return combination._replace(pairs=pairs)


def caption(scene: Scene, combination: Combination, rng: Rng, long_captions: float = LONG_CAPTIONS) -> str:
  """Returns a caption in one of several wordings; the first sentence of a long one is a short one."""
  long = rng.random() < long_captions
  # "a star." would be taken for an abbreviation when a caption is cut to its first sentence.
  text = _sentence(combination, TEMPLATES[:-1] if long else TEMPLATES, rng)
  return f"{text}. {' '.join(_details(scene))}" if long else text


def describe(scene: Scene, long: bool = False) -> str:
  """Returns the canonical caption, which names every object with its color; if `long`, also with size and place.

  The order is from left to right. Two objects with a clear relation are in alphabetical order instead, so that the
  order does not reveal which of the four relations holds.
  """
  group = _is_group(scene)
  ordered = sorted(scene.objects, key=lambda thing: thing.shape)
  relation = scenes.relation(*ordered) if len(ordered) == 2 and not group else None
  if not relation:
    ordered = sorted(scene.objects, key=lambda thing: thing.x)
  nouns = [words.noun(thing.shape, thing.color) for thing in ordered]
  if group:
    told = words.plural(ordered[0].shape, ordered[0].color, len(ordered))
  else:
    told = f" {relation} ".join(nouns) if relation else words.join(nouns)
  text = f"a picture of {told}"
  return f"{text}. {' '.join(_details(scene._replace(objects=tuple(ordered))))}" if long else text


def evaluation_prompts(
  split: str, count: int, seed: int, tags: Sequence[str] = TAGS
) -> list[tuple[str, dict[str, Any]]]:
  """Returns prompts for pictures, in evaluation's wording, with the metadata of the requested objects.

  The tags have equally many prompts, and a prompt of a tag repeats only after all others of the tag.

  Args:
    split: "train" or "val" for combinations of training; "held_out" for held-out ones, which leaves out
      "single_object" and "two_object": they name no color.
    count: number of prompts.
    seed: of the draws.
    tags: kinds of prompts.

  Returns:
    (prompt, metadata) in GenEval's schema: {"tag", "include": [{"class", "count", "color"?, "position"?}],
    "exclude"?, "prompt"}; "position": [relation, index in "include" of the object that it refers to].
  """
  words.check("split", split, scenes.SPLITS)
  pools = [(tag, scenes.combinations(tag, split == "held_out")) for tag in tags]
  streams = [_cycle(pool, random.Random(f"{seed}/{split}/prompts/{tag}")) for tag, pool in pools if pool]
  return [prompt(next(streams[i % len(streams)])) for i in range(count)]


def prompt(combination: Combination) -> tuple[str, dict[str, Any]]:
  """Returns the prompt of a combination and its metadata; see `evaluation_prompts`."""
  include: list[dict[str, Any]] = []
  for shape, color in combination.pairs:
    include.append({"class": shape, "count": combination.count})
    if color:
      include[-1]["color"] = color
  metadata: dict[str, Any] = {"tag": combination.tag, "include": include}
  if combination.relation:
    include.reverse()
    include[1]["position"] = [combination.relation, 0]
  if combination.tag == "counting":
    metadata["exclude"] = [{"class": include[0]["class"], "count": combination.count + 1}]
  text = TEMPLATES[0].format(_phrase(combination))
  return text, metadata | {"prompt": text}


def _document(scene: Scene, combination: Combination, rng: Rng) -> str:
  """Returns a text of a few true sentences about a scene."""
  number = len(scene.objects)
  facts = _details(scene)
  asked = [one for one in questions.about(scene, rng) if one.kind not in ("choice", questions.PLACE)]
  facts += [f"{one.question} {one.answer}." for one in asked]
  facts.append("There is one object." if number == 1 else f"There are {NUMBERS[number]} objects.")
  facts = shuffled(rng, tuple(dict.fromkeys(facts)))[: 2 + int(rng.random() * 4)]
  return f"{_sentence(combination, TEMPLATES, rng)}. {' '.join(facts)}"


def _details(scene: Scene) -> list[str]:
  """Returns sentences with the color, size and place of every object."""
  objects = scene.objects
  places = [words.place(thing) for thing in objects]
  if _is_group(scene):
    name = words.plural_noun(objects[0].shape)
    return [f"The {name} are {objects[0].color} and {objects[0].size}.", f"The {name} are {words.join(places)}."]
  shapes = [thing.shape for thing in objects]
  sentences = []
  for (shape, color, size, *_), place in zip(objects, places):
    told_apart = shapes.count(shape) == 1
    sentences.append(
      f"The {shape} is {color}, {size} and {place}." if told_apart else f"The {color} {shape} is {size} and {place}."
    )
  return sentences


def _is_group(scene: Scene) -> bool:
  """Returns whether the scene holds several objects of one class and nothing else."""
  return len(scene.objects) > 1 and len({thing[:2] for thing in scene.objects}) == 1


def _sentence(combination: Combination, templates: Sequence[str], rng: Rng) -> str:
  return pick(rng, templates).format(_phrase(combination), verb="are" if combination.count > 1 else "is")


def _phrase(combination: Combination) -> str:
  pairs = combination.pairs
  if combination.count > 1:
    return words.plural(*pairs[0], combination.count)
  if combination.relation:
    return f"{words.noun(*pairs[0])} {combination.relation} {words.noun(*pairs[1])}"
  return words.join([words.noun(*pair) for pair in pairs])


def _cycle(pool: tuple[Combination, ...], rng: Rng) -> Iterator[Combination]:
  while True:
    yield from shuffled(rng, pool)
