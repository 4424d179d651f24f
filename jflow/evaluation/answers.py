"""The closed rules that turn one answer of a model into right or wrong, as the official scorers have them.

Pure text in, numbers out. Where an official rule is odd, the oddity is kept and documented: scores are compared with
the paper's, and a better rule would be another benchmark.
"""

import math
import re
from collections.abc import Mapping, Sequence

# The VQA challenge's punctuation: deleted beside a space (or where the text holds "1,000"), else replaced by a space.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA = re.compile(r"\d,\d")
# A point before a digit stays. The official pattern also looks for "<=\d" behind the point, which never matches.
_POINT = re.compile(r"\.(?!\d)")
_MOST_POINTS = int(re.UNICODE)  # the official call passes this flag as the number of replacements: 32
_NUMBERS = {
  word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
# Contractions: written without one of their apostrophes, they get it back.
_CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
_WITH_APOSTROPHES = {
  word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the one entry of the official table that goes the other way

# VLMEvalKit's lists: refusals, and the characters removed from an answer before its letter is searched.
_REFUSALS = (
  "Sorry, I can't help with images of people yet.",
  "I can't process this file.",
  "I'm sorry, but without the image provided",
  "Cannot determine the answer",
)
_AROUND_LETTERS = ".()[],:;!*#{}"
_LAST_WORDS = 4  # a letter further from the end is a word of the explanation
UNDECIDED = "Z"  # no option can be read from the answer


def without_punctuation(text: str) -> str:
  """The text without punctuation, by the VQA challenge's rule; apostrophes and decimal points stay."""
  out = text
  for mark in _PUNCTUATION:
    joined = f"{mark} " in text or f" {mark}" in text or _COMMA.search(text)
    out = out.replace(mark, "" if joined else " ")
  return _POINT.sub("", out, count=_MOST_POINTS)


def normal_words(text: str) -> str:
  """The text in lower case, with digits for numbers up to ten, without articles, contractions with apostrophes."""
  words = [_NUMBERS.get(word, word) for word in text.lower().split()]
  return " ".join(_WITH_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def normal_answer(text: str) -> str:
  """The VQA challenge's (EvalAI's) normal form of an answer."""
  return normal_words(without_punctuation(_one_line(text)))


def vqa_score(answer: str, people: Sequence[str], unanimous_as_written: bool = False) -> float:
  """The VQA score: min(1, people who agree / 3), averaged over leaving out each of the people once.

  Args:
    answer: of the model.
    people: the annotators' answers, ten as a rule.
    unanimous_as_written: True is the VQA challenge's rule: where the people agree word for word, their answers are not
      normalised (upper case included). The model's answer then counts if it agrees either normalised, as in the first
      version of the official code, or as written, as in later ones, so every spelling can be matched. False is
      VLMEvalKit's rule for TextVQA; TextVQA's own evaluator also splits "'s" from words and drops every comma and
      question mark first.

  Returns:
    In [0, 1]: 0, 0.3, 0.6, 0.9 or 1 for ten people.
  """
  right, people = {normal_answer(answer)}, [_one_line(one) for one in people]
  if unanimous_as_written and len(set(people)) == 1:
    right.add(_one_line(answer))
  else:
    people = [normal_answer(one) for one in people]
  agree = [one in right for one in people]
  return sum(min(1.0, (sum(agree) - own) / 3) for own in agree) / len(people)


def exact(answer: str, truth: str) -> bool:
  """GQA's rule in VLMEvalKit: equality up to case and outer spaces. "Yes." does not equal "yes"."""
  return answer.strip().lower() == truth.strip().lower()


def relaxed(answer: str, truth: str, tolerance: float = 0.05) -> bool:
  """ChartQA's relaxed accuracy: numbers within 5 %, both ends included; other answers equal up to case.

  "5%" is read as 0.05, so "5" for "5%" is wrong. A true value of 0, or one that is not finite, is compared as text.
  Spaces around either side do not count.
  """
  number, wanted = _number(answer.strip()), _number(truth.strip())
  if number is not None and wanted and math.isfinite(wanted):
    return abs(number - wanted) / abs(wanted) <= tolerance
  return exact(answer, truth)


def yes_or_no(answer: str) -> str:
  """VLMEvalKit's yes/no parser: "Yes" or "No" if exactly one of them is among the words, else "Unknown"."""
  words = without_punctuation(answer.lower()).split()
  yes, no = "yes" in words, "no" in words
  return "Unknown" if yes == no else "Yes" if yes else "No"


def option(answer: str, choices: Mapping[str, str]) -> str:
  """VLMEvalKit's parser of multiple choice, without its language model.

  Returns the only letter among the words, if it is one of the last four; else the only option whose text is in the
  answer.

  Args:
    answer: of the model.
    choices: text by letter.

  Returns:
    One of the letters, or UNDECIDED.
  """
  if "Failed to obtain answer via API" not in answer:
    if any(refusal in answer for refusal in _REFUSALS):
      return UNDECIDED
    words = answer.translate(str.maketrans(_AROUND_LETTERS, " " * len(_AROUND_LETTERS))).split()
    letters = [letter for letter in choices if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - _LAST_WORDS:
      return letters[0]
    if not letters and UNDECIDED in words:
      return UNDECIDED
  lower = answer.lower()
  if len(lower) > 2 * sum(len(text) for text in choices.values()):
    return UNDECIDED
  named = [letter for letter, text in choices.items() if text.lower() in lower]
  return named[0] if len(named) == 1 else UNDECIDED


def _one_line(text: str) -> str:
  return text.replace("\n", " ").replace("\t", " ").strip()


def _number(text: str) -> float | None:
  try:
    return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
  except ValueError:
    return None
