"""Reading benchmarks as the TSV files of VLMEvalKit, with the prompts that JanusFlow's figures were made with.

Columns: index, image (base64; several as a list; or the index of the row that holds it), question, A to Z, hint,
answer, category, split. The images stay in the file until their question is asked.
"""

import ast
import base64
import csv
import hashlib
import io
import pathlib
import re
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from jflow.data import images
from jflow.data.examples import IMAGE_MARK
from jflow.errors import UserError
from jflow.evaluation import answers, scores, truths
from jflow.evaluation.recipes import Recipe
from jflow.evaluation.report import Result
from jflow.evaluation.samples import need, need_all
from jflow.evaluation.tasks import Question

_LONGEST_REFERENCE = 64  # characters of an image field that names another row
_YES_OR_NO = " Please answer yes or no."
_SHORT = "\nAnswer the question using a single word or phrase."
_LETTER = "\n\nAnswer with the option's letter from the given choices directly."
_OPEN = "\nAnswer the question directly. "
_OTHER = "Other Answers"  # second option of MMMU's open questions, the first being the answer


class Table:
  """Rows of a TSV file without their images, and a way to get at these."""

  def __init__(self, path: pathlib.Path):
    """Reads all rows once.

    Raises:
      UserError: no file, no header, or a row with another number of columns.
    """
    csv.field_size_limit(sys.maxsize)
    self._path, self._offsets, self._images, self._first = path, {}, {}, {}
    self.rows: list[dict[str, str]] = []
    try:
      self._read()
    except (UnicodeDecodeError, csv.Error) as error:
      raise UserError(f"{path}, row {len(self.rows) + 1}, is no tab-separated UTF-8 text: {error}") from error
    except OSError as error:
      raise UserError(f"{path} cannot be read: {error.strerror}") from error

  def _read(self) -> None:
    path, firsts = self._path, {}
    with open(path, "rb") as file:
      lines = _lines(file)
      self._header = next(csv.reader(lines, delimiter="\t"), [])
      for column in ("index", "question"):
        if column not in self._header:
          raise UserError(f"{path} has no column {column!r}; it has {', '.join(self._header)[:200]}")
      twice = [name for name in self._header if self._header.count(name) > 1]
      if twice:
        raise UserError(f"{path} has the column {twice[0]!r} more than once: which one counts is not known")
      offset = file.tell()
      for number, cells in enumerate(csv.reader(lines, delimiter="\t"), 1):
        if len(cells) != len(self._header):
          raise UserError(
            f"{path}, row {number}, has {len(cells)} columns, its header {len(self._header)}: is it whole?"
          )
        row = dict(zip(self._header, cells))
        image = row.pop("image", "")
        index = row["index"]
        if index in self._offsets:
          raise UserError(f"{path}, row {number}: index {index} comes twice")
        self._offsets[index] = offset
        if len(image) <= _LONGEST_REFERENCE:
          self._images[index] = image
        else:
          digest = hashlib.sha256(image.encode()).digest()
          self._first[index] = firsts.setdefault(digest, index)
        self.rows.append(row)
        offset = file.tell()

  def picture(self, index: str) -> str:
    """The index of the first row with the images of this one: rows with the same ask about the same pictures."""
    index = self._images.get(index) or index
    return self._first.get(index, index)

  def holder(self, index: str) -> str:
    """The index of the row that holds the image of this one: itself, or the one that it refers to.

    Raises:
      UserError: the row has no image, or refers to a row that holds none.
    """
    reference = self._images.get(index)
    if reference is None:
      return index
    if reference not in self._offsets or self._images.get(reference) is not None:
      raise UserError(f"{self._path}, index {index}: its image {reference!r} is no row with an image")
    return reference

  def images(self, index: str) -> list[Image.Image]:
    """Decodes the images of a row, following a reference to another one.

    Raises:
      UserError: see `holder`, or the image cannot be decoded.
    """
    index = self.holder(index)
    with open(self._path, "rb") as file:
      file.seek(self._offsets[index])
      cells = next(csv.reader(_lines(file), delimiter="\t"))
    field = dict(zip(self._header, cells))["image"]
    try:
      texts = ast.literal_eval(field) if field.startswith("[") else [field]
      return [images.as_published(base64.b64decode(text)) for text in texts]
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, images.ImageError) as error:
      reason = str(error) or type(error).__name__
      raise UserError(f"{self._path}, index {index}: its image cannot be decoded: {reason}") from error


class TableBenchmark:
  """One benchmark that is a TSV file and a closed rule (or, without a rule, a file of answers to hand in)."""

  def __init__(self, recipe: Recipe, data: pathlib.Path, limit: int | None):
    """Reads the file and checks that the rule's fields are there; `limit`: questions to ask, all if None."""
    self._recipe = recipe
    self._path = path = data / recipe.file if data.is_dir() else data
    if not path.is_file():
      raise UserError(f"{path} does not exist: {recipe.data}")
    self._table = Table(path)
    rows = self._table.rows
    if recipe.split:
      rows = [row for row in rows if row.get("split") == recipe.split]
    if limit and recipe.rule == "mme":
      raise UserError(f"--limit={limit}: MME adds up whole categories; leave --limit out")
    if recipe.rule == "circular":
      for number, row in enumerate(rows, 1):
        if not re.fullmatch("[0-9]{1,18}", row["index"]):
          raise UserError(f"{path}, row {number}: the index {row['index']!r} is no number: is it MMBench's file?")
      question = lambda row: int(row["index"]) % scores.ROTATION
      kept = set(list(dict.fromkeys(map(question, rows)))[:limit])
      self._rows = [row for row in rows if question(row) in kept]  # with every order of its options
    else:
      self._rows = rows[:limit]
    if not self._rows:
      raise UserError(f"{path} has no rows{f' of the split {recipe.split!r}' if recipe.split else ''}")
    for row in self._rows:
      need(row, recipe.fields, f"{path}, index {row['index']},")
      self._table.holder(row["index"])
    if recipe.rule in truths.RULES:
      self._rows = [row | {"answer": self._truth(row)} for row in self._rows]

  def _truth(self, row: Mapping[str, str]) -> str:
    try:
      return truths.RULES[self._recipe.rule](row, choices(row))
    except ValueError as error:
      where = f"{self._path}, index {row['index']}"
      raise UserError(f"{where}: answer={row['answer']!r:.80} {error}; no answer could be right") from None

  def data_files(self) -> list[pathlib.Path]:
    """What the predictions and scores depend on."""
    return [self._path]

  def tasks(self) -> list[Question]:
    """The questions, in the order of the file."""
    make, recipe = PROMPTS[self._recipe.prompt], self._recipe
    pictures = lambda index: lambda: self._table.images(index)
    return [
      Question(row["index"], make(row), pictures(row["index"]), recipe.system, recipe.max_tokens) for row in self._rows
    ]

  def score(self, records: Mapping[str, Mapping[str, Any]]) -> Result:
    """Applies the rule to all answers."""
    need_all([row["index"] for row in self._rows], records, self._recipe.name, "run the same command again")
    judged = [
      row | {"prediction": records[row["index"]]["answer"], "picture": self._table.picture(row["index"])}
      for row in self._rows
    ]
    return RULES[self._recipe.rule](judged, self._recipe)


def choices(row: Mapping[str, str]) -> dict[str, str]:
  """The options of a row by letter."""
  return {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter) not in (None, "")}


def yes_no_prompt(row: Mapping[str, str]) -> str:
  """POPE and MME."""
  return f"{IMAGE_MARK}\n{row['question']}{_SHORT}"


def pope_prompt(row: Mapping[str, str]) -> str:
  """POPE: the hint at yes and no is left out."""
  return yes_no_prompt({"question": row["question"].replace(_YES_OR_NO, "")})


def short_prompt(row: Mapping[str, str]) -> str:
  """GQA, ChartQA, TextVQA: the kit's default, in which no line break follows the image."""
  return f"{IMAGE_MARK}{row['question']}{_SHORT}"


def choice_prompt(row: Mapping[str, str]) -> str:
  """MMBench, SEED, MMMU."""
  hint = f"Hint: {row['hint']}\n" if row.get("hint") else ""
  options = "".join(f"\n{letter}. {text}" for letter, text in choices(row).items())
  return f"{IMAGE_MARK}\n{hint}{row['question']}{options}{_LETTER if options else _OPEN}"


def plain_prompt(row: Mapping[str, str]) -> str:
  """MM-Vet: the question alone."""
  return f"{IMAGE_MARK}\n{row['question']}"


def _pope(rows: Sequence[Mapping[str, str]], recipe: Recipe) -> Result:
  judged = [row | {"said": answers.yes_or_no(row["prediction"])} for row in rows]
  return Result(scores.pope(judged), [_unknown(judged)])


def _mme(rows: Sequence[Mapping[str, str]], recipe: Recipe) -> Result:
  judged = [row | {"said": answers.yes_or_no(row["prediction"]), "picture": row["image_path"]} for row in rows]
  return Result(scores.mme([row | {"right": row["said"] == row["answer"]} for row in judged]), [_unknown(judged)])


def _unknown(judged: Sequence[Mapping[str, str]]) -> str:
  count = sum(row["said"] == "Unknown" for row in judged)
  return f"{count} of {len(judged)} answers hold no clear yes or no; they count as wrong."


def _letters(rows: Sequence[Mapping[str, str]]) -> tuple[list[dict[str, Any]], str]:
  judged = []
  for row in rows:
    options, answer = choices(row), row["answer"]
    if not options:  # MMMU's open questions
      options, answer = {"A": answer, "B": _OTHER}, "A"
    said = answers.option(row["prediction"], options)
    judged.append(row | {"said": said, "right": said == answer, "category": row.get("category") or "all"})
  count = sum(row["said"] == answers.UNDECIDED for row in judged)
  note = f"From {count} of {len(judged)} answers no option can be read; they count as wrong (no language model judges)."
  return judged, note


def _choice(rows: Sequence[Mapping[str, str]], recipe: Recipe) -> Result:
  judged, note = _letters(rows)
  return Result(scores.by_category(judged), [note])


def _circular(rows: Sequence[Mapping[str, str]], recipe: Recipe) -> Result:
  judged, note = _letters(rows)
  return Result(scores.circular(judged), [note, "A question counts if all orders of its options are answered right."])


def _by_rule(rows, judge) -> Result:
  judged = [row | {"right": judge(row), "category": row.get("split") or "all"} for row in rows]
  return Result(scores.by_category(judged))


def _vqa(rows: Sequence[Mapping[str, str]], recipe: Recipe) -> Result:
  return _by_rule(rows, lambda row: answers.vqa_score(row["prediction"], truths.people_of(row["answer"])))


def _exact(rows: Sequence[Mapping[str, str]], recipe: Recipe) -> Result:
  return _by_rule(rows, lambda row: answers.exact(row["prediction"], row["answer"]))


def _relaxed(rows: Sequence[Mapping[str, str]], recipe: Recipe) -> Result:
  return _by_rule(
    rows, lambda row: any(answers.relaxed(row["prediction"], one) for one in truths.people_of(row["answer"]))
  )


def _hand_in(rows: Sequence[Mapping[str, str]], recipe: Recipe) -> Result:
  ids = {f"v1_{row['index']}": row["prediction"] for row in rows}
  note = (
    "Graded by a language model: hand answers.json to the benchmark's own evaluator. The paper has 30.9 at 384 and "
    "27.4 at 256 by GPT-4."
  )
  return Result({}, [note], files={"answers.json": ids})


PROMPTS = {
  "yes or no": yes_no_prompt,
  "pope": pope_prompt,
  "short": short_prompt,
  "choice": choice_prompt,
  "plain": plain_prompt,
}
RULES = {
  "pope": _pope,
  "mme": _mme,
  "choice": _choice,
  "circular": _circular,
  "vqa": _vqa,
  "exact": _exact,
  "relaxed": _relaxed,
  "hand in": _hand_in,
}


def _lines(file: io.BufferedReader) -> Iterator[str]:
  """Lines of text, without a byte order mark; the file stands exactly behind those that were taken."""
  first = file.tell() == 0
  while line := file.readline():
    yield line.decode("utf-8-sig" if first else "utf-8")
    first = False
