"""The closed rules on records made by hand, odd cases included; intervals against SciPy and by simulation."""

import numpy as np
import pytest
from refusals import refused
from scipy import stats

from jflow.evaluation import answers, scores
from jflow.evaluation.benchmarks import mmbench, mme
from jflow.evaluation.benchmarks.pope import f1_and_accuracy
from jflow.evaluation.scores import Score

# --- A yes or a no


@pytest.mark.parametrize(
  "answer, said",
  [
    ("Yes", "Yes"),
    ("yes.", "Yes"),
    ("Yes, there is a dog.", "Yes"),
    ("No", "No"),
    ("no, there is not", "No"),
    ("There is no dog, yes?", "Unknown"),  # both
    ("", "Unknown"),
    ("Not at all", "Unknown"),  # "no" is not among the words
    ("I know", "Unknown"),
    ("Yes/no", "Unknown"),
    ("(Yes)", "Yes"),
    ("yes-", "Yes"),
    ("Yes\nNo", "Unknown"),
    ("Y", "Unknown"),
  ],
)
def test_a_yes_or_a_no_is_read_from_the_words(answer, said):
  assert answers.yes_or_no(answer) == said


# --- The VQA challenge


@pytest.mark.parametrize(
  "text, normal",
  [
    ("The Cat", "cat"),
    ("two", "2"),
    ("none", "0"),
    ("eleven", "eleven"),
    ("dont", "don't"),
    ("couldntve", "couldntve"),  # only one apostrophe is put back
    ("couldnt've", "couldn't've"),
    ("somebody'd", "somebodyd"),  # the official table's own
    ("a dog.", "dog"),
    ("3.5", "3.5"),
    ("$5.", "$5"),
    ("1,000", "1000"),
    ("red, white", "red white"),
    ("red,white", "red white"),
    ("t-shirt", "t shirt"),
    ("t- shirt", "t shirt"),
    ("what?", "what"),
    ("U.S.A.", "usa"),
    ("on the left\n", "on left"),
    ("a\tb", "b"),
    ("it's", "it's"),
  ],
)
def test_answers_are_normalised_as_by_evalai(text, normal):
  assert answers.normal_answer(text) == normal


def test_only_32_points_are_removed_as_in_the_official_code():
  assert answers.without_punctuation("." * 40) == "." * 8


@pytest.mark.parametrize("agree, score", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_score_leaves_out_each_of_ten_people_once(agree, score):
  people = ["cat"] * agree + [f"other {i}" for i in range(10 - agree)]
  assert answers.vqa_score("Cat.", people) == pytest.approx(score)


def test_vqa_score_against_the_definition():
  """The mean over all nine-person subsets of min(1, agreeing / 3), written out."""
  rng = np.random.default_rng(0)
  for _ in range(50):
    people = rng.choice(["cat", "dog", "2"], 10).tolist()
    subsets = [people[:i] + people[i + 1 :] for i in range(10)]
    expected = np.mean([min(1, subset.count("2") / 3) for subset in subsets])
    assert answers.vqa_score("two", people) == pytest.approx(expected)


def test_unanimous_people_stay_as_they_wrote_by_the_challenges_rule_alone():
  """The model's answer is normalised by either: "Yes." must not lose what ten people agree on, nor "Yes" itself."""
  for as_written in (True, False):
    assert answers.vqa_score("Yes.", ["yes"] * 10, unanimous_as_written=as_written) == 1
    assert answers.vqa_score("the 2", ["two"] * 9 + ["2"], unanimous_as_written=as_written) == 1
    assert answers.vqa_score("Yes", ["Yes"] * 9 + ["no"], unanimous_as_written=as_written) == 1
  assert answers.vqa_score("Yes", ["Yes"] * 10, unanimous_as_written=True) == 1
  assert answers.vqa_score("t-shirt", ["t-shirt"] * 10, unanimous_as_written=True) == 1
  assert answers.vqa_score("yes", ["Yes"] * 10, unanimous_as_written=True) == 0
  assert answers.vqa_score("Yes", ["Yes"] * 10) == 1


# --- GQA, ChartQA


def test_gqa_is_exact_but_for_case_and_spaces():
  assert answers.exact(" Left\n", "left")
  assert not answers.exact("left.", "left")
  assert not answers.exact("two", "2")


@pytest.mark.parametrize(
  "answer, truth, right",
  [
    ("100", "105", True),
    ("95", "100", True),  # 5 % exactly
    ("105", "100", True),
    ("94.9", "100", False),
    ("5%", "5%", True),
    ("5%", "0.05", True),
    ("5", "5%", False),  # 5 % is 0.05
    ("0", "0", True),
    ("0.0", "0", False),  # zero is compared as text
    ("-10", "-10.4", True),
    ("10", "-10", False),
    ("Yes", "yes", True),
    ("yes.", "yes", False),
    ("1,000", "1000", False),  # a comma makes it text
    ("1e3", "1000", True),
    ("nan", "5", False),
    ("two", "2", False),
    (" 42 ", "42", True),
    ("", "5", False),
  ],
)
def test_chartqa_is_relaxed_for_numbers_only(answer, truth, right):
  assert answers.relaxed(answer, truth) is right


# --- Multiple choice

OPTIONS = {"A": "cat", "B": "dog", "C": "a red car", "D": "none"}


@pytest.mark.parametrize(
  "answer, letter",
  [
    ("A", "A"),
    ("A.", "A"),
    ("A)", "A"),
    ("(B)", "B"),
    ("B. dog", "B"),
    ("The answer is C.", "C"),
    ("b", "Z"),  # letters are upper case
    ("A or B", "Z"),
    ("dog", "B"),
    ("a Red Car", "C"),
    ("A red car", "A"),  # an article at the beginning is taken for a letter
    ("cat and dog", "Z"),
    ("", "Z"),
    ("E", "Z"),
    ("A large one is what I can see here", "Z"),  # the letter stands more than four words from the end
    ("Z", "Z"),
    ("I'm sorry, but without the image provided I choose A", "Z"),
    ("cat " * 30, "Z"),  # far longer than the options
    ("{D}", "D"),
    ("Answer:D", "D"),
  ],
)
def test_an_option_is_read_from_letter_or_text(answer, letter):
  assert answers.option(answer, OPTIONS) == letter


# --- Whole benchmarks


def test_pope_counts_a_row_once_per_category():
  rows = [
    {"answer": "Yes", "said": "Yes", "category": "random,popular"},
    {"answer": "No", "said": "Yes", "category": "random"},
    {"answer": "Yes", "said": "Unknown", "category": "popular"},
    {"answer": "No", "said": "No", "category": "adversarial"},
    {"answer": "No", "said": "Unknown", "category": "adversarial"},
  ]
  out = f1_and_accuracy(rows)
  # Of six: two yes found, one found wrongly, one missed.
  assert out["precision"].value == pytest.approx(200 / 3) and out["recall"].value == pytest.approx(200 / 3)
  assert out["F1"].value == pytest.approx(200 / 3)
  assert out["accuracy"].value == pytest.approx(50)
  assert out["random F1"].value == pytest.approx(200 / 3)  # precision 1/2, recall 1
  assert out["popular F1"].value == pytest.approx(200 / 3)  # precision 1, recall 1/2
  assert out["adversarial F1"].value == 0 and out["adversarial accuracy"].value == 50
  assert out["F1"].low <= out["F1"].value <= out["F1"].high


def test_pope_draws_whole_pictures():
  """Ten copies of every question about a picture say no more than one: the intervals stay as wide."""
  rng = np.random.default_rng(0)
  once = [
    {"answer": "Yes", "said": "Yes" if rng.random() < 0.7 else "No", "category": "random", "picture": str(i)}
    for i in range(50)
  ] + [{"answer": "No", "said": "No", "category": "random", "picture": str(i)} for i in range(50)]
  few, many = f1_and_accuracy(once), f1_and_accuracy([row for row in once for _ in range(10)])
  apart = f1_and_accuracy([row | {"picture": f"{row['picture']}/{i}"} for row in once for i in range(10)])
  for name in ("F1", "accuracy"):
    width = lambda out, name=name: out[name].high - out[name].low
    assert few[name].value == many[name].value == apart[name].value
    assert width(many) == pytest.approx(width(few), rel=0.1) and width(apart) < 0.5 * width(few)


def test_the_f1_of_groups_is_that_of_their_questions():
  rng = np.random.default_rng(1)
  groups = [[(bool(rng.random() < 0.5), bool(rng.random() < 0.5)) for _ in range(n)] for n in rng.integers(1, 5, 40)]
  truth, said = np.array([pair for group in groups for pair in group]).T
  out = scores.f1_of_yes(groups, 100)
  assert out.value == pytest.approx(100 * scores.f1(truth, said)["f1"]) and out.count == len(truth)
  assert out.low < out.value < out.high
  never = scores.f1_of_yes([[(True, False), (False, False)]] * 20)  # no draw says more
  assert never.value == 0 and never.low is None and never.high is None


def test_f1_is_zero_without_a_yes():
  none = np.zeros(3, bool)
  assert scores.f1(none, none) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}


def mme_rows(categories, judged):
  return [
    {"category": category, "picture": f"{i}", "right": right}
    for category in categories
    for i, pair in enumerate(judged)
    for right in pair
  ]


def test_mme_adds_accuracy_and_accuracy_plus():
  out = mme.accuracies(mme_rows(mme.PERCEPTION, [(True, True), (True, False)]))
  assert out["OCR"].value == pytest.approx(75 + 50)
  assert out["perception"].value == pytest.approx(10 * 125)
  assert 0 < out["OCR"].low < 125 < out["OCR"].high < 200
  assert out["OCR"].count == 4 and out["perception"].count == 40
  # Ten independent categories: the standard error of a sum grows with the root of their number.
  width = lambda score: score.high - score.low
  assert width(out["perception"]) == pytest.approx(10**0.5 * width(out["OCR"]))
  assert "reasoning" not in out
  whole = mme_rows(mme.PERCEPTION + mme.REASONING, [(True, True)])
  assert mme.accuracies(whole)["perception"].value == 2000 and mme.accuracies(whole)["reasoning"].value == 800
  assert mme.accuracies(whole)["OCR"].low < 200 == mme.accuracies(whole)["OCR"].high  # one picture proves little


def test_mme_refuses_single_questions_and_missing_categories():
  with refused("OCR", "'0'"):
    mme.accuracies(mme_rows(mme.PERCEPTION, [(True, True)])[1:])
  with refused("perception"):
    mme.accuracies(mme_rows(mme.PERCEPTION[1:], [(True, True)]))


def test_a_circular_question_needs_every_order_right():
  rows = [
    {"index": 7, "right": True, "category": "x"},
    {"index": 1_000_007, "right": True, "category": "x"},
    {"index": 8, "right": True, "category": "y"},
    {"index": 2_000_008, "right": False, "category": "y"},
    {"index": 9, "right": False, "category": "y"},
    {"index": 10, "right": True, "category": "x"},
  ]
  out = mmbench.circular(rows)
  assert out["overall"].value == 50 and out["overall"].count == 4
  assert out["x"].value == 100 and out["y"].value == 0


def test_questions_about_one_picture_count_as_alike_as_they_are():
  alike = [{"right": i < 6, "category": "x", "picture": i} for i in range(10) for _ in range(4)]
  apart = [row | {"picture": i} for i, row in enumerate(alike)]
  shares = lambda rows: [row | {"right": 0.9 * row["right"]} for row in rows]
  for change in (lambda rows: rows, shares):
    one, other = scores.by_category(change(alike))["overall"], scores.by_category(change(apart))["overall"]
    assert one.value == other.value and one.high - one.low > 1.5 * (other.high - other.low)
  unnamed = [{name: row[name] for name in ("right", "category")} for row in alike]
  assert scores.by_category(unnamed) == scores.by_category(apart)


# --- Intervals


@pytest.mark.parametrize("right, count", [(0, 10), (3, 10), (10, 10), (617, 1000)])
def test_wilson_is_scipys(right, count):
  expected = stats.binomtest(right, count).proportion_ci(method="wilson")
  assert scores.wilson(right, count) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_clustered_intervals_lie_between_those_of_groups_and_of_samples():
  alike = [[True] * 4] * 6 + [[False] * 4] * 4
  assert scores.clustered(alike)[1:3] == pytest.approx(scores.wilson(6, 10), abs=0.02)
  spread = [[True, True, False, False]] * 10
  assert scores.clustered(spread)[1:3] == pytest.approx(scores.wilson(20, 40))
  uneven = scores.clustered([[True] * 100] + [[True]] * 9)  # a group of nearly all is nearly one sample
  assert uneven.low < 0.4 < scores.clustered([[True] * 10] * 10).low
  shares = scores.clustered([[0.9]] * 5, scale=100)
  assert shares.value == pytest.approx(90) and 40 < shares.low < 90 < shares.high < 100
  none = scores.clustered([[False] * 4] * 10)
  assert none.value == 0 and none.high == pytest.approx(scores.wilson(0, 10)[1])


def test_intervals_hold_the_truth_about_95_times_of_100():
  """Prompts of varying difficulty, four pictures each; the mean of three categories as well."""
  rng = np.random.default_rng(0)
  single, together = 0, 0
  for _ in range(400):
    difficulty = rng.beta(2, 3, (3, 60, 1))
    parts = [scores.clustered((rng.random((60, 4)) < d).tolist()) for d in difficulty]
    single += parts[0].low <= 0.4 <= parts[0].high
    mean = scores.average(parts)
    together += mean.low <= 0.4 <= mean.high
  assert 0.91 <= single / 400 <= 0.98 and 0.91 <= together / 400 <= 0.98


def test_the_average_of_one_score_is_that_score():
  score = Score(0.5, 0.4, 0.7, 10, 0.1)
  assert scores.average([score]) == pytest.approx(score)


def test_bootstrap_of_a_mean_is_near_the_normal_interval():
  values = np.random.default_rng(1).normal(3, 1, 400)
  drawn = scores.bootstrap(lambda i: float(values[i].mean()), values)
  normal = scores.mean(values)
  assert drawn[:3] == pytest.approx(normal[:3], abs=0.02)
