"""The shapes world: endless pictures with exact captions and questions, so that all of jflow runs offline.

Gray pictures of one to four colored shapes, in GenEval's terms: a class is a shape. `scenes` draws them, this
file speaks about them and makes them a source of records. Some pairs of shape and color, some counts and some
relations are held out of all training pictures and texts, to measure what a model has understood.
"""

import bisect
import hashlib
import itertools
import math
import pathlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jflow.batch import TASKS
from jflow.data import scenes
from jflow.data.records import Record, Turn
from jflow.data.scenes import (
  COLORS,
  HELD_OUT_COUNTS,
  HELD_OUT_PAIRS,
  HELD_OUT_RELATIONS,
  PAIRS,
  SEEN_PAIRS,
  SEVERAL,
  SHAPES,
  TAGS,
  Combination,
  Object,
  Rng,
  Scene,
  pick,
  shuffled,
)
from jflow.errors import UserError

__all__ = [
  "COLORS",
  "DEFAULT_TAGS",
  "HELD_OUT_COUNTS",
  "HELD_OUT_PAIRS",
  "HELD_OUT_RELATIONS",
  "KINDS",
  "SHAPES",
  "TAGS",
  "Object",
  "Question",
  "Scene",
  "ShapesSource",
  "caption",
  "describe",
  "evaluation_prompts",
  "evaluation_questions",
  "prompt",
  "questions",
]

# Shares of the kinds of scenes.
DEFAULT_TAGS = {
  "single_object": 0.2,
  "colors": 0.25,
  "two_object": 0.1,
  "counting": 0.15,
  "position": 0.1,
  "color_attr": 0.15,
  SEVERAL: 0.05,
}
LONG_CAPTIONS = 0.25  # share of captions that describe every object
CAPTION_TURNS = 0.4  # share of understanding's records whose answer is a caption
SHORT_ANSWERS = 0.5  # share of first questions that carry the next
# Not in the paper: the release's instruction for short answers. As in LLaVA it ends the first question only.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."
NUMBERS = ("zero", "one", "two", "three", "four")
LETTERS = "ABCD"
# The first is the one wording of evaluation.
TEMPLATES = ("a picture of {}", "an image with {}", "{} on a gray background", "there {verb} {}", "{}")
PLACES = (
  ("at the top left", "at the top", "at the top right"),
  ("on the left", "in the center", "on the right"),
  ("at the bottom left", "at the bottom", "at the bottom right"),
)
# Kinds of questions. Those of a kind in PAIRED come as a yes and a no about the same picture.
KINDS = (
  "existence",
  "existence_adversarial",
  "existence_shape",
  "count",
  "color",
  "shape",
  "size",
  "relation",
  "choice",
)
PLACE = "place"  # which relation it is; asked in training alone, where `asked` says so
PAIRED = ("existence", "existence_adversarial", "existence_shape", "relation")


class Question(NamedTuple):
  """A question about a picture, and its only right answer."""

  question: str
  answer: str  # one word in lower case, or the letter of the right option
  kind: str  # of KINDS, or PLACE


class ShapesSource:
  """Records of the shapes world; each is a pure function of (seed, split, task, index). Picklable.

  Attributes:
    fingerprint: hash of the arguments and of the world's code.
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
  ):
    """Checks and stores the arguments.

    Args:
      task: "understanding", "generation" or "text".
      size: number of records.
      seed: of the whole world.
      split: "train", "val" (what training could have shown, but did not) or "held_out" (each scene shows at
        least one combination that training never shows).
      tags: share of each kind of scene, any sum above 0; those not named have none. Default: DEFAULT_TAGS.
      long_captions: share of captions, to paint from and to read, that describe every object.
      named_colors: share of captions to paint from, and of texts, whose first sentence names every color, whatever
        the kind of scene. What stands where is learned from colors, long before shapes are.
      asked: (kind of question, how often it is drawn beside the others, which have 1, and PLACE 0).

    Raises:
      UserError: an argument is out of range.
    """
    for name, share in (("long_captions", long_captions), ("named_colors", named_colors)):
      if not 0 <= share <= 1:
        raise UserError(f"the shapes world's {name} should be a share from 0 to 1: {share}")
    self._long_captions, self._named_colors = long_captions, named_colors
    self._asked = dict.fromkeys(KINDS, 1.0) | {PLACE: 0.0}
    if any(not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in asked):
      raise UserError(f"the shapes world's asked should hold pairs, as (('relation', 4.0),): {asked!r}")
    for kind, weight in asked:
      _check("kind of question", kind, (*KINDS, PLACE))
      if not 0 <= weight < float("inf"):
        raise UserError(f"the shapes world's questions of kind {kind!r} should have a weight >= 0: {weight}")
      self._asked[kind] = weight
    shares = dict(DEFAULT_TAGS if tags is None else tags)
    _check("task", task, TASKS)
    _check("split", split, scenes.SPLITS)
    for tag, share in shares.items():
      _check("tag", tag, TAGS + (SEVERAL,))
      if not 0 <= share < float("inf"):
        raise UserError(f"the share of the shapes world's tag {tag!r} should be a number >= 0: {share}")
    if not sum(shares.values()):
      raise UserError("the shapes world's tags have no share above 0")
    if size < 1:
      raise UserError(f"the size of the shapes world should be at least 1 record: {size}")
    self._task, self._size, self._seed, self._split = task, int(size), int(seed), split
    self._tags = tuple(shares)
    # The words are those of the code: an edit makes another world.
    code = b"".join(pathlib.Path(module).read_bytes() for module in (__file__, scenes.__file__))
    key = repr((task, size, seed, split, shares, long_captions, named_colors, self._asked)).encode()
    self.fingerprint = hashlib.sha256(code + key).hexdigest()
    self._bounds = [share / sum(shares.values()) for share in itertools.accumulate(shares.values())]

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < self._size:
      raise IndexError(f"record {index} of {self._size}")
    rng = random.Random(f"{self._seed}/{self._split}/{self._task}/{index}")
    tag = self._tags[min(bisect.bisect_right(self._bounds, rng.random()), len(self._tags) - 1)]
    scene, combination = scenes.sample(tag, self._split, rng)
    name = f"shapes-{self._split}-{self._task}-{index}"
    if self._task == "generation":
      told = self._told(scene, combination, rng)
      return Record(name, (scene,), caption(scene, told, rng, self._long_captions), ())
    if self._task == "text":
      return Record(name, (), _document(scene, self._told(scene, combination, rng), rng), ())
    if rng.random() < CAPTION_TURNS:
      return Record(name, (scene,), describe(scene, rng.random() < self._long_captions), ())
    return Record(name, (scene,), "", _conversation(scene, rng, self._asked))

  def _told(self, scene: Scene, combination: Combination, rng: Rng) -> Combination:
    """What the first sentence says of the scene: the combination, at times with every color."""
    if not self._named_colors or rng.random() >= self._named_colors:
      return combination
    things = scene.objects[: len(combination.pairs)]
    return combination._replace(pairs=tuple((thing.shape, thing.color) for thing in things))


def caption(scene: Scene, combination: Combination, rng: Rng, long_captions: float = LONG_CAPTIONS) -> str:
  """Returns a caption in one of several wordings; the first sentence of a long one is a short one."""
  long = rng.random() < long_captions
  # "a star." has too few words to be told from an abbreviation where a caption is cut to its first sentence.
  text = _sentence(combination, TEMPLATES[:-1] if long else TEMPLATES, rng)
  return f"{text}. {' '.join(_details(scene))}" if long else text


def describe(scene: Scene, long: bool = False) -> str:
  """Returns the one caption that names every object with its color; long: size and place, too.

  From left to right, but for two objects of which one clearly lies on a side of the other: then by the alphabet, so that
  each of the four relations has to be seen.
  """
  group = _is_group(scene)
  ordered = sorted(scene.objects, key=lambda thing: thing.shape)
  relation = scenes.relation(*ordered) if len(ordered) == 2 and not group else None
  if not relation:
    ordered = sorted(scene.objects, key=lambda thing: thing.x)
  nouns = [_noun(thing.shape, thing.color) for thing in ordered]
  if group:
    told = _plural(ordered[0].shape, ordered[0].color, len(ordered))
  else:
    told = f" {relation} ".join(nouns) if relation else _join(nouns)
  text = f"a picture of {told}"
  return f"{text}. {' '.join(_details(scene._replace(objects=tuple(ordered))))}" if long else text


def evaluation_prompts(split: str, count: int, seed: int) -> list[tuple[str, dict[str, Any]]]:
  """Returns prompts for pictures, in the one wording of evaluation, with what the pictures should hold.

  The tags share the prompts equally, and no prompt of a tag comes again before all of them have come.

  Args:
    split: "train" or "val" for what training shows; "held_out" for what it does not, which leaves out
      "single_object" and "two_object": they name no color.
    count: number of prompts.
    seed: of the choice.

  Returns:
    (prompt, metadata) in GenEval's schema: {"tag", "include": [{"class", "count", "color"?, "position"?}],
    "exclude"?, "prompt"}; "position": [relation, index in "include" of the object that it refers to].
  """
  _check("split", split, scenes.SPLITS)
  pools = [(tag, scenes.combinations(tag, split == "held_out")) for tag in TAGS]
  streams = [_cycle(pool, random.Random(f"{seed}/{split}/prompts/{tag}")) for tag, pool in pools if pool]
  return [prompt(next(streams[i % len(streams)])) for i in range(count)]


def evaluation_questions(split: str, count: int, seed: int) -> list[tuple[Scene, Question]]:
  """Returns questions with their pictures, the kinds and their answers balanced.

  Neighbours that share kind and scene belong together, as in MME's acc+ and MMBench's circular score: a yes
  and a no, or the four orders of the options of a choice.

  Args:
    split: as in `ShapesSource`.
    count: number of questions; the last group may be cut short.
    seed: of the choice.
  """
  _check("split", split, scenes.SPLITS)
  rng = random.Random(f"{seed}/{split}/questions")
  wanted = {
    "count": itertools.cycle(NUMBERS),
    "size": itertools.cycle(scenes.SIZES),
    "color": itertools.cycle(COLORS),
    "shape": itertools.cycle(SHAPES),
  }
  asked: list[tuple[Scene, Question]] = []
  for kind in itertools.cycle(KINDS):
    answer = next(wanted[kind]) if kind in wanted else None
    group: list[Question] = []
    while not group:
      scene = scenes.sample(pick(rng, tuple(DEFAULT_TAGS)), split, rng)[0]
      group = [q for q in questions(scene, rng) if q.kind == kind and answer in (None, q.answer)]
    size = 2 if kind in PAIRED else len(group) if kind == "choice" else 1
    first = size * int(rng.random() * (len(group) // size))
    asked += [(scene, question) for question in group[first : first + size]]
    if len(asked) >= count:
      return asked[:count]


def questions(scene: Scene, rng: Rng) -> list[Question]:
  """Returns questions of all kinds that the scene allows.

  A scene without anything held out gets no question that names anything held out.
  POPE's popular negatives are left out: in this world all pairs are about equally frequent.
  """
  objects, unseen = scene.objects, scenes.held_out(scene)
  present = {(thing.shape, thing.color) for thing in objects}
  absent = [pair for pair in (PAIRS if unseen else SEEN_PAIRS) if pair not in present]
  shapes = [thing.shape for thing in objects]
  there, missing = list(dict.fromkeys(shapes)), [shape for shape in SHAPES if shape not in shapes]
  asked = []

  def ask(kind: str, question: str, answer: str) -> None:
    asked.append(Question(question, answer, kind))

  for shape, color in sorted(present):
    ask("existence", _is_there(shape, color), "yes")
    ask("existence", _is_there(*pick(rng, absent)), "no")
    near = [pair for pair in absent if (pair[0] == shape) != (pair[1] == color)]
    ask("existence_adversarial", _is_there(shape, color), "yes")
    ask("existence_adversarial", _is_there(*pick(rng, near)), "no")
  for shape in there:
    ask("existence_shape", _is_there(shape), "yes")
    ask("existence_shape", _is_there(pick(rng, missing)), "no")
    ask("count", f"How many {_plural_noun(shape)} are there?", NUMBERS[shapes.count(shape)])
  ask("count", f"How many {_plural_noun(pick(rng, missing))} are there?", NUMBERS[0])
  for thing in objects:
    if shapes.count(thing.shape) == 1:
      ask("color", f"What color is the {thing.shape}?", thing.color)
      ask("size", f"Is the {thing.shape} small or large?", thing.size)
    if len({shape for shape, color in present if color == thing.color}) == 1:
      ask("shape", f"What shape is {thing.color}?", thing.shape)
  for a, b in itertools.permutations(objects, 2):
    name = scenes.relation(a, b)
    if name and shapes.count(a.shape) == shapes.count(b.shape) == 1:
      inverse = scenes.INVERSE[name]
      if unseen or not (
        scenes.relation_held_out(a.shape, name, b.shape)
        or scenes.relation_held_out(a.shape, inverse, b.shape)
      ):
        for seen_from in (f"the {b.shape}",) + ("the other one",) * (len(objects) == 2):
          ask(PLACE, f"Where is the {a.shape}, seen from {seen_from}?", name.removesuffix(" of"))
        ask("relation", f"Is the {a.shape} {name} the {b.shape}?", "yes")
        ask("relation", f"Is the {a.shape} {inverse} the {b.shape}?", "no")
  unique = [thing for thing in objects if shapes.count(thing.shape) == 1]
  if unique:
    thing = pick(rng, unique)
    wrong = [color for color in COLORS if (thing.shape, color) in absent]
    options = [thing.color] + shuffled(rng, wrong)[:3]
    for turn in range(4):
      lines = "".join(f"\n{letter}. {options[(i + turn) % 4]}" for i, letter in enumerate(LETTERS))
      ask("choice", f"What color is the {thing.shape}?{lines}{LETTER_ANSWER}", LETTERS[-turn % 4])
  return asked


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


def _conversation(scene: Scene, rng: Rng, weights: Mapping[str, float]) -> tuple[Turn, ...]:
  """Returns one to six questions about the same picture; kinds are drawn by `weights`, without putting back."""
  kinds: dict[str, list[Question]] = {}
  for question in questions(scene, rng):
    if weights[question.kind]:
      kinds.setdefault(question.kind, []).append(question)
  turns: list[Turn] = []
  # The first of exponential clocks that tick at these rates, then the next; equal rates are a plain shuffle.
  clocks = sorted((-math.log(1 - rng.random()) / weights[kind], i, kind) for i, kind in enumerate(kinds))
  for _, _, kind in clocks[: 1 + int(rng.random() * 6)]:
    question = pick(rng, kinds[kind])
    text = question.question
    if not turns:
      short = kind != "choice" and rng.random() < SHORT_ANSWERS
      text = f"<image>\n{text}{SHORT_ANSWER if short else ''}"
    turns += [Turn("user", text), Turn("assistant", question.answer)]
  return tuple(turns)


def _document(scene: Scene, combination: Combination, rng: Rng) -> str:
  """Returns a text of a few true sentences about a scene."""
  number = len(scene.objects)
  facts = _details(scene)
  facts += [f"{asked.question} {asked.answer}." for asked in questions(scene, rng) if asked.kind not in ("choice", PLACE)]
  facts.append("There is one object." if number == 1 else f"There are {NUMBERS[number]} objects.")
  facts = shuffled(rng, tuple(dict.fromkeys(facts)))[: 2 + int(rng.random() * 4)]
  return f"{_sentence(combination, TEMPLATES, rng)}. {' '.join(facts)}"


def _details(scene: Scene) -> list[str]:
  """Returns sentences that say the color, size and place of every object."""
  objects = scene.objects
  places = [PLACES[min(2, int(3 * thing.y))][min(2, int(3 * thing.x))] for thing in objects]
  if _is_group(scene):
    name = _plural_noun(objects[0].shape)
    return [f"The {name} are {objects[0].color} and {objects[0].size}.", f"The {name} are {_join(places)}."]
  shapes = [thing.shape for thing in objects]
  sentences = []
  for (shape, color, size, *_), place in zip(objects, places):
    told_apart = shapes.count(shape) == 1
    sentences.append(
      f"The {shape} is {color}, {size} and {place}."
      if told_apart
      else f"The {color} {shape} is {size} and {place}."
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
    return _plural(*pairs[0], combination.count)
  if combination.relation:
    return f"{_noun(*pairs[0])} {combination.relation} {_noun(*pairs[1])}"
  return _join([_noun(*pair) for pair in pairs])


def _cycle(pool: tuple[Combination, ...], rng: Rng) -> Iterator[Combination]:
  while True:
    yield from shuffled(rng, pool)


def _is_there(shape: str, color: str | None = None) -> str:
  return f"Is there {_noun(shape, color)} in the picture?"


def _noun(shape: str, color: str | None = None) -> str:
  return f"{'an' if color == 'orange' else 'a'} {color + ' ' if color else ''}{shape}"


def _plural(shape: str, color: str | None, count: int) -> str:
  return f"{NUMBERS[count]} {color + ' ' if color else ''}{_plural_noun(shape)}"


def _plural_noun(shape: str) -> str:
  return shape + ("es" if shape == "cross" else "s")


def _join(parts: list[str]) -> str:
  return " and ".join([", ".join(parts[:-1])] * (len(parts) > 1) + parts[-1:])


def _check(what: str, name: str, known: tuple[str, ...]) -> None:
  if name not in known:
    raise UserError(f"the shapes world has no {what} {name!r}: use one of {', '.join(known)}")
