"""Questions about pictures of the world, each with its only right answer."""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jflow.data.records import Turn
from jflow.world import scenes, words
from jflow.world.scenes import COLORS, PAIRS, SEEN_PAIRS, SHAPES, Rng, Scene, pick, shuffled
from jflow.world.words import NUMBERS

SHORT_ANSWERS = 0.5  # share of first questions that end with SHORT_ANSWER
# Not in the paper: the release's instruction for short answers. As in LLaVA it ends the first question only.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCD"
_TRIES = 2000  # scenes to look for an answer in
# Kinds of questions. Those in PAIRED come as a yes and a no about the same picture.
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
PLACE = "place"  # where an object is, or which relation holds; in training only, if `asked` gives it a weight
PAIRED = ("existence", "existence_adversarial", "existence_shape", "relation")


class Question(NamedTuple):
  """A question about a picture and its only right answer."""

  question: str
  answer: str  # a word or a few in lower case, or the letter of the right option
  kind: str  # of KINDS, or PLACE


def for_evaluation(
  split: str,
  count: int,
  seed: int,
  kinds: Sequence[str] = KINDS,
  tags: Sequence[str] = tuple(scenes.DEFAULT_TAGS),
  large: float = scenes.LARGE,
  spread: float = scenes.ANYWHERE,
) -> list[tuple[Scene, Question]]:
  """Returns questions with their scenes, balanced over kinds and answers.

  Consecutive questions with the same kind and scene form a group, as in MME's acc+ and MMBench's circular score: a yes
  and a no, or the four orders of the options of a choice.

  Args:
    split: as in `WorldSource`.
    count: number of questions; the last group may be cut short.
    seed: of the draws.
    kinds: of KINDS, asked in turn; at least one of them must be about these scenes.
    tags: of the scenes.
    large: see `scenes.sample`.
    spread: see `scenes.sample`.
  """
  words.check("split", split, scenes.SPLITS)
  rng = random.Random(f"{seed}/{split}/questions")
  wanted = {
    "count": itertools.cycle(NUMBERS),
    "size": itertools.cycle(scenes.SIZES),
    "color": itertools.cycle(COLORS),
    "shape": itertools.cycle(SHAPES),
  }
  asked: list[tuple[Scene, Question]] = []
  for kind in itertools.cycle(kinds):
    answer = next(wanted[kind]) if kind in wanted else None
    group: list[Question] = []
    for _ in range(_TRIES):  # no scene of these tags may have the answer: no held-out pair is brown
      scene = scenes.sample(pick(rng, tags), split, rng, large, spread)[0]
      if group := [q for q in about(scene, rng) if q.kind == kind and answer in (None, q.answer)]:
        break
    if not group:
      continue
    size = 2 if kind in PAIRED else len(group) if kind == "choice" else 1
    first = size * int(rng.random() * (len(group) // size))
    asked += [(scene, question) for question in group[first : first + size]]
    if len(asked) >= count:
      return asked[:count]


def about(scene: Scene, rng: Rng) -> list[Question]:
  """Returns questions of all kinds that the scene allows.

  Questions about a scene without held-out combinations name no held-out one either. POPE's popular negatives are left
  out, since all pairs of this world are about equally frequent.
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
    ask("count", f"How many {words.plural_noun(shape)} are there?", NUMBERS[shapes.count(shape)])
  ask("count", f"How many {words.plural_noun(pick(rng, missing))} are there?", NUMBERS[0])
  for thing in objects:
    if shapes.count(thing.shape) == 1:
      ask(PLACE, f"Where is the {thing.shape}?", words.place(thing))
      ask("color", f"What color is the {thing.shape}?", thing.color)
      ask("size", f"Is the {thing.shape} small or large?", thing.size)
    if len({shape for shape, color in present if color == thing.color}) == 1:
      ask("shape", f"What shape is {thing.color}?", thing.shape)
  for a, b in itertools.permutations(objects, 2):
    name = scenes.relation(a, b)
    if name and shapes.count(a.shape) == shapes.count(b.shape) == 1:
      inverse = scenes.INVERSE[name]
      if unseen or not (
        scenes.relation_held_out(a.shape, name, b.shape) or scenes.relation_held_out(a.shape, inverse, b.shape)
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


def conversation(scene: Scene, rng: Rng, weights: Mapping[str, float]) -> tuple[Turn, ...]:
  """Returns one to six questions about the same picture, drawn by the `weights` of their kinds without replacement."""
  kinds: dict[str, list[Question]] = {}
  for question in about(scene, rng):
    if weights[question.kind]:
      kinds.setdefault(question.kind, []).append(question)
  turns: list[Turn] = []
  # Order of the first ticks of exponential clocks with these rates; equal rates give a plain shuffle.
  clocks = sorted((-math.log(1 - rng.random()) / weights[kind], i, kind) for i, kind in enumerate(kinds))
  for _, _, kind in clocks[: 1 + int(rng.random() * 6)]:
    question = pick(rng, kinds[kind])
    text = question.question
    if not turns:
      short = kind != "choice" and rng.random() < SHORT_ANSWERS
      text = f"<image>\n{text}{SHORT_ANSWER if short else ''}"
    turns += [Turn("user", text), Turn("assistant", question.answer)]
  return tuple(turns)


def _is_there(shape: str, color: str | None = None) -> str:
  return f"Is there {words.noun(shape, color)} in the picture?"
