"""The second judge's questions: what they expect of a right picture is what the world says of it."""

import random
import sys

import pytest
import tiny

sys.path.insert(0, str(tiny.ROOT / "launch" / "experiments"))

import second_judge

from jflow.world import questions, scenes, source


@pytest.mark.parametrize("split", ["val", "held_out"])
def test_the_answers_are_those_of_the_worlds_own_questions(split):
  rng, compared = random.Random(0), set()
  for tag in scenes.TAGS:
    for _ in range(40 if scenes.combinations(tag, split == "held_out") else 0):
      scene, combination = scenes.sample(tag, split, rng)
      expected = dict(second_judge.asked(source.prompt(combination)[1]))
      for _ in range(20):  # what is not there is drawn
        for one in questions.about(scene, rng):
          if one.question in expected:
            assert expected[one.question] == one.answer, (combination, one)
            compared.add(one.kind)
  assert compared >= {"existence", "count", "relation"}


def test_a_prompt_of_two_objects_asks_for_both_and_for_their_colors_not_to_be_swapped():
  about = {"include": [{"class": "star", "count": 1, "color": "red"}, {"class": "heart", "count": 1, "color": "blue"}]}
  about["include"][1]["position"] = ["left of", 0]
  assert second_judge.asked(about) == [
    ("Is there a red star in the picture?", "yes"),
    ("Is there a blue heart in the picture?", "yes"),
    ("Is there a blue star in the picture?", "no"),
    ("Is there a red heart in the picture?", "no"),
    ("How many stars are there?", "one"),
    ("How many hearts are there?", "one"),
    ("Is the heart left of the star?", "yes"),
    ("Is the heart right of the star?", "no"),
  ]


def test_one_wrong_answer_is_a_wrong_picture():
  class Reader:
    def request(self, text, images, limit):
      return images[0], text

    def understand_batch(self, requests, batch):
      return ["One." if text.startswith("How") else "yes" if image == "right" else "no" for image, text in requests]

  about = {"include": [{"class": "star", "count": 1, "color": "red"}]}
  assert second_judge.judged(Reader(), [("right", about), ("wrong", about)]) == [True, False]
