"""The second judge's questions: what they expect of a right picture is what the world says of it."""

import json
import random
import sys

import numpy as np
import pytest
import tiny

sys.path.insert(0, str(tiny.ROOT / "launch" / "experiments"))

import second_judge

from jflow.world import judge, questions, scenes, source, words


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
            compared.add((one.kind, one.answer))
  kinds = ("existence", "existence_shape", "relation")
  assert compared >= {(kind, answer) for kind in kinds for answer in ("yes", "no")} - {("existence_shape", "yes")}
  assert {("count", "one"), ("count", "three")} <= compared


@pytest.mark.parametrize("split", ["val", "held_out"])
def test_other_prompts_are_not_fulfilled_and_of_the_same_kind(split):
  tags = [tag for tag in scenes.TAGS if scenes.combinations(tag, split == "held_out")]
  true, others = second_judge.true_pictures(split, tags, 64)
  fulfilled = lambda shown: np.mean([judge.strict(judge.detect(np.asarray(image)), about) for image, about in shown])
  assert fulfilled(true) > 0.98 and fulfilled(others) < 0.02
  assert len(true) == len(others) == second_judge.TRUE * len(tags)
  assert [about["tag"] for _, about in true] == [about["tag"] for _, about in others]


@pytest.mark.parametrize("text", ["scores", "x=", "true={}", "x={}/nowhere", "lone={}/lone", "asked={}/asked"])
def test_what_is_no_evaluation_of_pictures_is_refused_at_once(text, tmp_path, capsys, monkeypatch):
  for name, benchmark, only in (("", "shapes", None), ("lone", "lone", None), ("asked", "shapes", "questions")):
    (tmp_path / name).mkdir(exist_ok=True)
    body = {"benchmark": benchmark, "settings": {"only": only}, "scores": {}, "notes": [], "commit": "x", "date": "x"}
    (tmp_path / name / "report.json").write_text(json.dumps(body))
  monkeypatch.setattr(sys, "argv", ["x", text.format(tmp_path), "--reader=world", "--output=x.json"])
  with pytest.raises(SystemExit) as error:
    second_judge.main()
  assert error.value.code == 2 and text.format(tmp_path) in capsys.readouterr().err


def test_a_prompt_of_two_objects_asks_for_both_and_for_their_colors_not_to_be_swapped():
  about = {"include": [{"class": "star", "count": 1, "color": "red"}, {"class": "heart", "count": 1, "color": "blue"}]}
  about["include"][1]["position"] = ["left of", 0]
  assert second_judge.asked(about) == [
    ("Is there a red star in the picture?", "yes"),
    ("Is there a blue heart in the picture?", "yes"),
    ("Is there a blue star in the picture?", "no"),
    ("Is there a red heart in the picture?", "no"),
    (f"Is there {words.noun(scenes.SHAPES[0])} in the picture?", "no"),
    ("How many stars are there?", "one"),
    ("How many hearts are there?", "one"),
    ("Is the heart left of the star?", "yes"),
    ("Is the heart right of the star?", "no"),
  ]


def test_one_wrong_answer_is_a_wrong_picture():
  class Reader:  # does not see the red star of the wrong picture
    def request(self, text, images, limit):
      return images[0], text

    def understand_batch(self, requests, batch):
      return [
        "One." if "How" in text else "Yes" if "red star" in text and image == "right" else "no"
        for image, text in requests
      ]

  about = {"include": [{"class": "star", "count": 1, "color": "red"}]}
  assert second_judge.judged(Reader(), [("right", about), ("wrong", about)]) == [True, False]
