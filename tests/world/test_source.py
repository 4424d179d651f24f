"""The source of the world: captions are true, training never meets what is held out, records are those of their
version."""

import collections
import hashlib
import pickle
import re

import numpy as np
import pytest
from world_reader import (
  COLOR,
  NUMBERS,
  OPPOSITE,
  SHAPE,
  says,
  shows_held_out,
  some_scenes,
)

from jflow.data import examples
from jflow.errors import UserError
from jflow.world import questions, scenes
from jflow.world import source as world
from jflow.world.scenes import COLORS, SHAPES
from jflow.world.source import WorldSource

TASKS = ("understanding", "generation", "text")


def texts(record) -> str:
  return "\n".join([record.text] + [turn.text for turn in record.turns])


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
    (("text", 10, 0, "val", None, 0.5, 0.5, (), 0.0, -0.1), "large", "-0.1"),
    (("text", 10, 0, "val", None, 0.5, 0.5, (), 0.0, 0.5, 0.6), "spread", "0.6"),
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


def test_lone_objects_are_as_large_and_as_near_to_the_middle_as_asked():
  default = WorldSource("generation", 300, 6, tags=dict(colors=1.0))
  near = WorldSource("generation", 300, 6, tags=dict(colors=1.0), large=1.0, spread=0.1)
  assert near.fingerprint != default.fingerprint
  for source, furthest, sizes in ((default, 0.345, {"small", "large"}), (near, 0.1, {"large"})):
    things = [thing for record in source for thing in record.images[0].objects]
    off = [max(abs(thing.x - 0.5), abs(thing.y - 0.5)) for thing in things]
    assert furthest - 0.02 < max(off) <= furthest
    assert {thing.size for thing in things} == sizes


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
