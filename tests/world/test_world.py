"""Laws of the world: what is said of a picture is true, and training never meets what is held out."""

import collections
import hashlib
import itertools
import math
import pickle
import random
import re

import numpy as np
import pytest

from jflow.data import examples
from jflow.errors import UserError
from jflow.world import questions, scenes
from jflow.world import source as world
from jflow.world.scenes import COLORS, SHAPES, Object, Scene
from jflow.world.source import WorldSource

TASKS = ("understanding", "generation", "text")
NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SHAPE = "(" + "|".join(SHAPES) + ")"
COLOR = "(" + "|".join(COLORS) + ")"


def one(shape: str, color: str = "red", x: float = 0.5, y: float = 0.5, r: float = 0.3) -> Scene:
  return Scene((Object(shape, color, "large", x, y, r),), 168, (COLORS[color],))


def some_scenes(split: str, each: int = 60) -> list[Scene]:
  return [
    scenes.sample(tag, split, random.Random(f"{tag}/{split}/{i}"))[0]
    for tag in scenes.DEFAULT_TAGS
    for i in range(each)
  ]


def texts(record) -> str:
  return "\n".join([record.text] + [turn.text for turn in record.turns])


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


# --- Drawing


STAR = 10 / 2 * 1.08 * 0.40 * math.sin(math.pi / 5)
AREAS = {  # of radius 1
  "circle": math.pi,
  "square": 4 * 0.88**2,
  "triangle": 1.75,
  "diamond": 2.0,
  "star": STAR,
  "cross": 4 * 2 * 0.31 - 4 * 0.31**2,
  "ring": math.pi * (1 - 0.56**2),
  # Green's theorem over (sin^3 t, (13 cos t - 5 cos 2t - 2 cos 3t - cos 4t) / 16).
  "heart": 180 * math.pi / 256,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_area_is_that_of_the_geometric_shape(shape):
  image = one(shape, "black").render(256).astype(float)
  covered = (168 - image[..., 0]) / (168 - 22)
  assert covered.sum() / (0.3 * 256) ** 2 == pytest.approx(AREAS[shape], rel=0.015)


@pytest.mark.parametrize("shape", SHAPES)
def test_box_is_centered_and_has_the_radius(shape):
  image = one(shape, "black", x=0.4, y=0.6, r=0.25).render(400)
  rows, columns = np.nonzero(image[..., 0] < 100)
  left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
  assert abs((left + right) / 2 - 160) <= 1.5
  assert abs((top + bottom) / 2 - 240) <= 11  # stars and triangles stand on less than half of their box
  assert 0.84 * 200 <= max(right - left, bottom - top) <= 1.08 * 200 + 2


def test_picture_is_uint8_rgb_of_any_size_and_always_the_same():
  for scene in some_scenes("train", 5):
    image = scene.render(64)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and image.flags.writeable
    np.testing.assert_array_equal(image, pickle.loads(pickle.dumps(scene)).render(64))
    small = scene.render(192).reshape(64, 3, 64, 3, 3).mean((1, 3))
    assert np.abs(small - image).mean() < 1.0  # the same picture, sharper


def test_colors_are_the_palette_within_the_jitter_on_gray():
  for scene in some_scenes("train", 30):
    image = scene.render(96).astype(int)
    np.testing.assert_array_equal(image[0, 0], [scene.background] * 3)
    assert abs(scene.background - 168) <= 8
    for thing, fill in zip(scene.objects, scene.fills):
      assert np.abs(np.subtract(fill, COLORS[thing.color])).max() <= 8
      if thing.shape != "ring":
        np.testing.assert_array_equal(image[int(thing.y * 96), int(thing.x * 96)], fill)


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_objects_keep_apart_and_inside(split):
  for scene in some_scenes(split):
    assert 1 <= len(scene.objects) <= 4
    for thing in scene.objects:
      low, high = {"small": (0.135, 0.16), "large": (0.2, 0.235)}[thing.size]
      assert low <= thing.r <= high
      assert min(thing.x, thing.y, 1 - thing.x, 1 - thing.y) >= thing.r + 0.02 - 1e-9
    for a, b in itertools.combinations(scene.objects, 2):
      assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.r + b.r + 0.045 - 1e-9


# --- What is held out


@pytest.mark.parametrize("split", scenes.SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_scenes_of_a_split_show_held_out_combinations_always_or_never(task, split):
  source = WorldSource(task if task != "text" else "generation", 600, 1, split)
  assert {shows_held_out(record.images[0]) for record in source} == {split == "held_out"}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("task", TASKS)
def test_texts_never_mention_what_is_held_out(task, split):
  text = "\n".join(texts(record) for record in WorldSource(task, 3000, 2, split))
  pairs = {(shape, color) for color, shape in re.findall(f"{COLOR} {SHAPE}", text)}
  pairs |= {(shape, color) for shape, color in re.findall(f"{SHAPE}(?:e?s)? (?:is|are) {COLOR}", text)}
  for shape, options in re.findall(rf"What color is the {SHAPE}\?((?:\n[A-D]\. \w+)+)", text):
    pairs |= {(shape, color) for color in re.findall(COLOR, options)}
  assert pairs == {(shape, color) for shape in SHAPES for color in COLORS} - scenes.HELD_OUT_PAIRS

  found = re.findall(rf"(two|three|four) (?:\w+ )?{SHAPE}", text)
  found += [
    (number, shape)
    for shape, number in re.findall(rf"How many {SHAPE}e?s are there\?(?:{questions.SHORT_ANSWER})?\s(\w+)", text)
  ]
  counts = {(shape, NUMBERS[number]) for number, shape in found}
  assert len(counts) > 15 and not counts & scenes.HELD_OUT_COUNTS

  relations = set(re.findall(rf"{SHAPE}(?: is)? (left of|right of|above|below) (?:a|the) {SHAPE}", text))
  relations |= set(re.findall(rf"Is the {SHAPE} (left of|right of|above|below) the {SHAPE}", text))
  held_out = scenes.HELD_OUT_RELATIONS | {(b, OPPOSITE[name], a) for a, name, b in scenes.HELD_OUT_RELATIONS}
  assert len(relations) > 50 and not relations & held_out


def test_every_shape_color_count_and_relation_is_seen_in_other_combinations():
  assert {shape for shape, _ in scenes.SEEN_PAIRS} == set(SHAPES)
  assert {color for _, color in scenes.SEEN_PAIRS} == set(COLORS)
  assert len(scenes.HELD_OUT_PAIRS) == 12 and len(scenes.SEEN_PAIRS) == 68
  seen = {(c.pairs[0][0], c.count) for c in scenes.combinations("counting", False)}
  assert {shape for shape, _ in seen} == set(SHAPES) and {count for _, count in seen} == {2, 3, 4}
  assert {c.relation for c in scenes.combinations("position", False)} == set(OPPOSITE)


# --- Records


def test_record_is_a_pure_function_of_its_index():
  for task in TASKS:
    source = WorldSource(task, 50, 3)
    records = [source[i] for i in range(50)]
    again = pickle.loads(pickle.dumps(WorldSource(task, 10**9, 3)))
    assert [again[i] for i in reversed(range(50))] == records[::-1]
    assert list(source) == records
    assert len({record.id for record in records}) == 50
    assert len({repr(record[1:]) for record in records}) > 45
    for other in (WorldSource(task, 50, 4), WorldSource(task, 50, 3, "val")):
      assert [other[i][1:] for i in range(50)] != [record[1:] for record in records]
    with pytest.raises(IndexError):
      source[50]


def test_evaluation_sets_are_the_same_on_every_machine():
  """Whoever changes this hash changes the test set: scores from before and after cannot be compared."""
  digest = hashlib.sha256()
  for split, prompts in (("val", 360), ("held_out", 160)):
    digest.update(repr(world.evaluation_prompts(split, prompts, 0)).encode())
    digest.update(repr(questions.for_evaluation(split, 1500, 0)).encode())
  assert digest.hexdigest() == "d2868cd8ee3bf52d2755e89ba48837f26d2e597a69fdbc9794e72a6e68df273b"


def test_records_of_training_are_those_of_their_version():
  """A run goes on over an edit of the world's files; one that changes a record has to change VERSION and this hash."""
  digest = hashlib.sha256(str(world.VERSION).encode())
  for task in ("understanding", "generation", "text"):
    source = WorldSource(
      task, 300, 9, tags=dict(position=1.0, several=1.0, counting=1.0), named_colors=0.5, in_order=0.5
    )
    digest.update(repr([source[i] for i in range(300)]).encode())
  assert digest.hexdigest() == "24ffee17171bfa9ccf816024f1962026d94a173fa5b3cc3c5e757762e1974af5"


def test_records_fit_their_task():
  for record in WorldSource("generation", 200, 5):
    assert len(record.images) == 1 and record.text and not record.turns
  for record in WorldSource("text", 200, 5):
    assert not record.images and record.text.count(".") >= 1 and not record.turns
  captions = short = 0
  for record in WorldSource("understanding", 400, 5):
    assert len(record.images) == 1 and bool(record.text) != bool(record.turns)
    captions += not record.turns
    if record.turns:
      assert [turn.role for turn in record.turns] == ["user", "assistant"] * (len(record.turns) // 2)
      assert len(record.turns) in (2, 4, 6, 8, 10, 12)
      assert record.turns[0].text.startswith("<image>\n") and texts(record).count("<image>") == 1
      short += record.turns[0].text.endswith(questions.SHORT_ANSWER)
      assert not any(turn.text.endswith(questions.SHORT_ANSWER) for turn in record.turns[1:])
  assert 0.33 < captions / 400 < 0.47
  assert short > 80


def test_shares_of_the_tags():
  source = WorldSource("generation", 100, 0, tags={"single_object": 2, "colors": 1, "counting": 0})
  assert all(len(record.images[0].objects) == 1 for record in source)
  single = [len(record.images[0].objects) == 1 for record in WorldSource("generation", 3000, 0)]
  assert np.mean(single) == pytest.approx(0.45, abs=0.04)
  phrases = [record.text for record in WorldSource("generation", 600, 0, tags={"position": 1, "colors": 3})]
  share = np.mean([bool(re.search("left of|right of|above|below", text.split(". ")[0])) for text in phrases])
  assert share == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize(
  "arguments, field, value",
  [
    (("painting", 10, 0), "task", "painting"),
    (("text", 10, 0, "test"), "split", "'test'"),
    (("text", 0, 0), "size", "0"),
    (("text", 10, 0, "val", {"dogs": 1}), "tag", "'dogs'"),
    (("text", 10, 0, "val", {"colors": -1}), "tags", "-1"),
    (("text", 10, 0, "val", {"colors": 0}), "tags", "'colors': 0"),
    (("text", 10, 0, "val", None, 1.5), "long_captions", "1.5"),
    (("text", 10, 0, "val", None, 0.5, -0.5), "named_colors", "-0.5"),
    (("text", 10, 0, "val", None, 0.5, 0.5, (), 1.1), "in_order", "1.1"),
    (("text", 10, 0, "val", None, 0.5, 0.5, (("colour", 2.0),)), "kind of question", "'colour'"),
    (("text", 10, 0, "val", None, 0.5, 0.5, ("relation", 4.0)), "asked", "('relation', 4.0)"),
    (("text", 10, 0, "val", None, 0.5, 0.5, (("relation", "4"),)), "'relation'", "4"),
    (
      ("text", 10, 0, "val", None, 0.5, 0.5, (("existence", 0), ("existence_shape", 0), ("count", 0))),
      "asked",
      "'count', 0",
    ),
    (("text", 10, 0, "val", None, 0.5, 0.5, (("color", -1.0),)), "'color'", "-1.0"),
  ],
)
def test_mistakes_are_named(arguments, field, value):
  with pytest.raises(UserError) as error:
    WorldSource(*arguments)
  assert field in str(error.value) and value in str(error.value)


# --- Truth of what is said


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


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_captions_are_true_and_their_first_sentence_is_one(split):
  openings, long = set(), 0
  for record in WorldSource("generation", 1500, 6, split):
    scene = record.images[0]
    first, _, rest = record.text.partition(". ")
    assert says(first, scene), record
    assert examples.first_sentence_of(record.text) == (first + "." if rest else first)
    openings.add(" ".join(first.split()[:2]))
    long += bool(rest)
    details = re.findall(rf"The {SHAPE} is {COLOR}, (\w+) and (?:at|on|in) the ([\w ]+)\.", rest)
    for shape, color, size, place in details:
      (thing,) = (thing for thing in scene.objects if thing.shape == shape)
      assert (thing.color, thing.size) == (color, size)
      assert ("left" in place) == (thing.x < 1 / 3) and ("right" in place) == (thing.x >= 2 / 3)
      assert ("top" in place) == (thing.y < 1 / 3) and ("bottom" in place) == (thing.y >= 2 / 3)
    if rest and len({thing.shape for thing in scene.objects}) == len(scene.objects):
      assert rest.count(".") == len(scene.objects)
  assert 0.2 < long / 1500 < 0.3
  assert {"a picture", "an image", "there is", "there are"} <= openings


@pytest.mark.parametrize("task", ["generation", "text"])
def test_first_sentences_name_colors_that_their_kind_leaves_open_as_often_as_asked(task):
  for share in (0.0, 0.3, 1.0):
    source = WorldSource(task, 400, 6, tags=dict(position=1.0, counting=1.0), named_colors=share)
    colored = [bool(re.search(COLOR, record.text.split(".")[0])) for record in source]
    assert abs(np.mean(colored) - share) <= (0.08 if share == 0.3 else 0.0)


@pytest.mark.parametrize("task", ["generation", "text"])
def test_first_sentences_name_objects_from_the_top_left_as_often_as_asked(task, monkeypatch):
  shown = []
  draw = scenes.sample
  monkeypatch.setattr(scenes, "sample", lambda *of: shown.append(draw(*of)) or shown[-1])
  for share in (0.0, 0.5, 1.0):
    tags = dict(two_object=1.0, color_attr=1.0, several=1.0)
    pairs = []  # of neighbors in the sentence: is the first nearer to the top left?
    for record in WorldSource(task, 900, 6, tags=tags, named_colors=0.3, in_order=share):
      objects = shown[-1][0].objects
      told = re.findall(SHAPE, record.text.split(".")[0])
      at = {thing.shape: thing.x + thing.y for thing in objects}
      if len(at) == len(objects):
        assert sorted(told) == sorted(at)
        pairs += [at[first] < at[second] for first, second in zip(told, told[1:])]
    assert abs(np.mean(pairs) - (0.5 + share / 2)) <= (0.05 if share < 1 else 0)


def test_relations_stay_true_and_in_random_order_where_captions_are_in_order():
  related = WorldSource("generation", 300, 6, tags=dict(position=1.0), long_captions=0.0, in_order=1.0)
  assert all(says(record.text, record.images[0]) for record in related)
  told = [re.search("left|right|above|below", record.text)[0] for record in related]
  assert min(map(told.count, ("left", "right", "above", "below"))) > 50


def test_describe_names_every_object():
  for scene in some_scenes("train") + some_scenes("held_out"):
    text = world.describe(scene)
    related = len(scene.objects) == 2 and scenes.relation(*scene.objects) and " two " not in text
    assert any(f" {name} " in text for name in scenes.RELATIONS) == bool(related)
    assert says(text, scene) and len(re.findall(COLOR, text)) >= 1
    first, rest = world.describe(scene, long=True).split(". ", 1)
    assert first == text
    details = re.findall(rf"The {SHAPE} is {COLOR}, (\w+) and (?:at|on|in) the [\w ]+\.", rest)
    order = (lambda thing: thing.shape) if related else (lambda thing: thing.x)  # from left to right
    ordered = sorted(scene.objects, key=order)
    if len({thing.shape for thing in scene.objects}) == len(scene.objects):
      assert details == [(thing.shape, thing.color, thing.size) for thing in ordered]


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


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_answers_are_right(split):
  kinds = set()
  for i, scene in enumerate(some_scenes(split)):
    for asked in questions.about(scene, random.Random(i)):
      assert asked.answer == right_answer(asked.question, scene), (asked, scene)
      kinds.add(asked.kind)
  assert kinds == {*questions.KINDS, questions.PLACE}


@pytest.mark.parametrize("asked", [(), (("place", 5.0), ("count", 0.0))])
def test_answers_of_conversations_are_right(asked):
  texts = []
  for record in WorldSource("understanding", 500, 7, asked=asked):
    for question, answer in zip(record.turns[::2], record.turns[1::2]):
      text = question.text.removeprefix("<image>\n").removesuffix(questions.SHORT_ANSWER)
      assert answer.text == right_answer(text, record.images[0])
      texts.append(text)
  assert any(text.startswith("Where is") for text in texts) == bool(asked)
  assert any(text.startswith("How many") for text in texts) != bool(asked)


def test_a_kind_of_question_can_be_asked_more_often():
  """Of relations where a scene of two objects allows them: first in 1 of 9 conversations, or in 9 of 17."""

  def first(weight: float) -> float:
    asked = (("relation", weight),)
    source = WorldSource("understanding", 3000, 8, tags=dict(position=1.0), asked=asked)
    questions = [record.turns[0].text for record in source if record.turns]
    return np.mean([bool(re.match(r"<image>\nIs the \w+ (left|right|above|below)", text)) for text in questions])

  records = lambda asked: [record.turns for record in WorldSource("understanding", 50, 8, asked=asked)]
  assert records(()) == records((("relation", 1.0),))
  assert first(1.0) == pytest.approx(1 / 9, abs=0.03) and first(9.0) == pytest.approx(9 / 17, abs=0.05)


def test_questions_take_either_kind_of_generator():
  scene = some_scenes("train", 1)[-1]
  asked = [questions.about(scene, rng) for rng in (np.random.default_rng(0), random.Random(0))]
  assert [question.kind for question in asked[0]] == [question.kind for question in asked[1]]


# --- Evaluation sets


@pytest.mark.parametrize("split", ["val", "held_out"])
def test_evaluation_questions_are_balanced_and_grouped(split):
  asked = questions.for_evaluation(split, 1600, 0)
  assert asked == questions.for_evaluation(split, 1600, 0) != questions.for_evaluation(split, 1600, 1)
  assert len(asked) == 1600
  answers = collections.defaultdict(collections.Counter)
  groups = collections.defaultdict(list)
  for scene, question in asked:
    assert shows_held_out(scene) == (split == "held_out")
    assert question.answer == right_answer(question.question, scene)
    answers[question.kind][question.answer] += 1
    groups[question.kind, scene].append(question.answer)
  assert set(answers) == set(questions.KINDS)
  for kind, counter in answers.items():
    assert max(counter.values()) - min(counter.values()) <= 1, (kind, counter)
    assert len(counter) == {"count": 5, "color": 10, "shape": 8, "choice": 4}.get(kind, 2)
  whole = list(groups.items())[:-1]  # the last may be cut short
  assert all(sorted(group) == ["no", "yes"] for (kind, _), group in whole if kind in questions.PAIRED)
  assert all(sorted(group) == list("ABCD") for (kind, _), group in whole if kind == "choice")


def test_evaluation_prompts_follow_the_schema_of_geneval():
  prompts = world.evaluation_prompts("val", 360, 0)
  assert prompts == world.evaluation_prompts("val", 360, 0) != world.evaluation_prompts("val", 360, 1)
  assert collections.Counter(metadata["tag"] for _, metadata in prompts) == dict.fromkeys(scenes.TAGS, 60)
  for prompt, metadata in prompts:
    assert metadata["prompt"] == prompt and prompt.startswith("a picture of ")
    tag, include = metadata["tag"], metadata["include"]
    assert set(metadata) == {"tag", "include", "prompt"} | ({"exclude"} if tag == "counting" else set())
    assert len(include) == (2 if tag in ("two_object", "position", "color_attr") else 1)
    for thing in include:
      name = f"{thing['color']} {thing['class']}" if "color" in thing else thing["class"]
      assert name in prompt
      assert ("color" in thing) == (tag in ("colors", "color_attr"))
    if tag == "position":
      relation, other = include[1]["position"]
      assert prompt == f"a picture of a {include[1]['class']} {relation} a {include[other]['class']}"
    if tag == "counting":
      number = include[0]["count"]
      assert metadata["exclude"] == [{"class": include[0]["class"], "count": number + 1}]
      assert list(NUMBERS)[number] in prompt


def test_evaluation_prompts_come_again_only_when_all_have_come():
  prompts = [
    prompt for prompt, metadata in world.evaluation_prompts("val", 600, 0) if metadata["tag"] == "single_object"
  ]
  every = {f"a picture of a {shape}" for shape in SHAPES}
  assert all(set(prompts[i : i + 8]) == every for i in range(0, 96, 8))


def test_unseen_prompts_name_what_is_held_out():
  prompts = world.evaluation_prompts("held_out", 160, 0)
  assert {metadata["tag"] for _, metadata in prompts} == {"counting", "colors", "position", "color_attr"}
  for split, unseen in (("held_out", True), ("val", False)):
    for _, metadata in world.evaluation_prompts(split, 160, 0):
      include = metadata["include"]
      names = any((thing["class"], thing.get("color")) in scenes.HELD_OUT_PAIRS for thing in include) or any(
        (thing["class"], thing["count"]) in scenes.HELD_OUT_COUNTS for thing in include
      )
      if metadata["tag"] == "position":
        a, name, b = include[1]["class"], include[1]["position"][0], include[0]["class"]
        names = bool({(a, name, b), (b, OPPOSITE[name], a)} & scenes.HELD_OUT_RELATIONS)
      assert names == unseen
