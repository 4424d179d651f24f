"""The questions of the world: right answers, balance, and how often each kind is asked."""

import collections
import random
import re

import numpy as np
import pytest
from world_reader import (
  right_answer,
  shows_held_out,
  some_scenes,
)

from jflow.world import questions, scenes
from jflow.world.source import WorldSource


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


@pytest.mark.parametrize("split", ["val", "held_out"])
def test_evaluation_questions_of_some_kinds_and_scenes(split):
  """No held-out pair is brown: the answers that no scene has are left out."""
  asked = questions.for_evaluation(split, 60, 0, ("color", "shape"), ("colors",), 1.0, 0.1)
  assert [question.kind for _, question in asked].count("shape") in range(28, 34)
  assert all(scene.objects[0].size == "large" and len(scene.objects) == 1 for scene, _ in asked)
  colors = {question.answer for _, question in asked if question.kind == "color"}
  assert colors == set(scenes.COLORS) - ({"brown"} if split == "held_out" else set())


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
