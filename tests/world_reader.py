"""A reader of the world that is independent of it: truth of sentences, right answers, and what is held out."""

import collections
import random
import re

from jflow.world import scenes
from jflow.world.scenes import COLORS, SHAPES, Object, Scene

NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SHAPE = "(" + "|".join(SHAPES) + ")"
COLOR = "(" + "|".join(COLORS) + ")"


def some_scenes(split: str, each: int = 60) -> list[Scene]:
  return [
    scenes.sample(tag, split, random.Random(f"{tag}/{split}/{i}"))[0]
    for tag in scenes.DEFAULT_TAGS
    for i in range(each)
  ]


def is_left(a: Object, b: Object) -> bool:
  return a.x < b.x


def is_above(a: Object, b: Object) -> bool:
  return a.y < b.y


def shows_held_out(scene: Scene) -> bool:
  """The definition again, from the lists as they stand in the documentation."""
  pairs = {
    ("circle", "red"),
    ("square", "green"),
    ("triangle", "pink"),
    ("diamond", "white"),
    ("star", "yellow"),
    ("cross", "purple"),
    ("ring", "black"),
    ("heart", "orange"),
    ("circle", "purple"),
    ("square", "black"),
    ("triangle", "orange"),
    ("diamond", "blue"),
  }
  by_shape = collections.defaultdict(list)
  for thing in scene.objects:
    by_shape[thing.shape].append(thing)
  return (
    any((thing.shape, thing.color) in pairs for thing in scene.objects)
    or len(by_shape["star"]) == 4
    or len(by_shape["ring"]) == 3
    or len(by_shape["square"]) == 2
    or len(by_shape["heart"]) == 4
    or any(is_left(a, b) for a in by_shape["star"] for b in by_shape["heart"])
    or any(is_above(a, b) for a in by_shape["circle"] for b in by_shape["cross"])
    or any(is_left(b, a) for a in by_shape["ring"] for b in by_shape["square"])
    or any(is_above(b, a) for a in by_shape["triangle"] for b in by_shape["diamond"])
  )


def says(sentence: str, scene: Scene) -> bool:
  """Reads a short caption back, word by word, and checks it against the scene."""
  sentence = re.sub("^(a picture of|an image with|there is|there are) ", "", sentence)
  sentence = sentence.removesuffix(" on a gray background")
  group = re.fullmatch(rf"(two|three|four) (?:{COLOR} )?{SHAPE}e?s", sentence)
  if group:
    number, color, shape = group.groups()
    return (
      len(scene.objects) == NUMBERS[number]
      and {thing.shape for thing in scene.objects} == {shape}
      and (color is None or {thing.color for thing in scene.objects} == {color})
    )
  related = re.fullmatch(rf"an? (?:{COLOR} )?{SHAPE} (left of|right of|above|below) an? (?:{COLOR} )?{SHAPE}", sentence)
  if related:
    first, shape, relation, second, other = related.groups()
    things = {thing.shape: thing for thing in scene.objects}
    a, b = things[shape], things[other]
    offset = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[relation]
    across = abs(a.y - b.y) if relation in ("left of", "right of") else abs(a.x - b.x)
    placed = len(scene.objects) == 2 and offset > a.r + b.r and across <= 0.45 * offset
    return placed and (first, second) in ((None, None), (a.color, b.color))
  nouns = [re.fullmatch(rf"(a|an) (?:{COLOR} )?{SHAPE}", part) for part in re.split(", | and ", sentence)]
  assert all(nouns), sentence
  assert all((noun[1] == "an") == (noun[2] == "orange") for noun in nouns)
  said = sorted((noun[3], noun[2] or "") for noun in nouns)
  colored = nouns[0][2] is not None
  return said == sorted((thing.shape, thing.color if colored else "") for thing in scene.objects)


def right_answer(question: str, scene: Scene) -> str:
  """Answers a question from the scene alone."""
  objects = scene.objects
  yes = {True: "yes", False: "no"}
  if match := re.fullmatch(rf"Is there an? (?:{COLOR} )?{SHAPE} in the picture\?", question):
    return yes[any(thing.shape == match[2] and match[1] in (None, thing.color) for thing in objects)]
  if match := re.fullmatch(rf"How many {SHAPE}e?s are there\?", question):
    return list(NUMBERS)[sum(thing.shape == match[1] for thing in objects)]
  if match := re.fullmatch(rf"What shape is {COLOR}\?", question):
    (answer,) = {thing.shape for thing in objects if thing.color == match[1]}
    return answer
  if match := re.fullmatch(rf"Is the {SHAPE} small or large\?", question):
    (answer,) = [thing.size for thing in objects if thing.shape == match[1]]
    return answer
  if match := re.fullmatch(rf"Is the {SHAPE} (left of|right of|above|below) the {SHAPE}\?", question):
    (a,), (b,) = ([thing for thing in objects if thing.shape == match[i]] for i in (1, 3))
    return yes[
      {"left of": is_left(a, b), "right of": is_left(b, a), "above": is_above(a, b), "below": is_above(b, a)}[match[2]]
    ]
  if match := re.fullmatch(rf"Where is the {SHAPE}\?", question):
    (thing,) = [thing for thing in objects if thing.shape == match[1]]
    row = "at the top" if thing.y < 1 / 3 else "at the bottom" if thing.y >= 2 / 3 else ""
    column = "left" if thing.x < 1 / 3 else "right" if thing.x >= 2 / 3 else ""
    return f"{row} {column}".strip() if row else f"on the {column}" if column else "in the center"
  if match := re.fullmatch(rf"Where is the {SHAPE}, seen from the (?:{SHAPE}|other one)\?", question):
    (a,) = [thing for thing in objects if thing.shape == match[1]]
    (b,) = [thing for thing in objects if (thing.shape == match[2] if match[2] else thing != a)]
    if abs(a.x - b.x) > abs(a.y - b.y):
      return "left" if is_left(a, b) else "right"
    return "above" if is_above(a, b) else "below"
  first, *lines = question.split("\n")
  match = re.fullmatch(rf"What color is the {SHAPE}\?", first)
  (answer,) = [thing.color for thing in objects if thing.shape == match[1]]
  if not lines:
    return answer
  (letter,) = [line[0] for line in lines[:4] if line[3:] == answer]
  assert [line[:3] for line in lines[:4]] == ["A. ", "B. ", "C. ", "D. "] and len(set(lines)) == 5
  return letter
