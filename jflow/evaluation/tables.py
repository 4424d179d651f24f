"""Benchmarks that are TSV files of VLMEvalKit.

Columns: index, image (base64; several as a list; or the index of the row that holds it), question, A to Z, hint,
answer, category, split. Images are read only when their question is asked.
"""

import abc
import ast
import base64
import csv
import functools
import hashlib
import io
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from PIL import Image

from jflow.data import images
from jflow.errors import UserError
from jflow.evaluation.benchmark import ReadingBenchmark
from jflow.evaluation.report import Result
from jflow.evaluation.samples import need, need_all
from jflow.evaluation.settings import Settings
from jflow.evaluation.tasks import Question

_LONGEST_REFERENCE = 64  # characters of an image field that names another row


class Table:
  """The rows of a TSV file without their images, which are read on demand."""

  def __init__(self, path: pathlib.Path):
    """Reads all rows once.

    Raises:
      UserError: the file or its header is missing, or a row has another number of columns.
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
    """The index of the first row with the same images: equal for all questions about the same images."""
    index = self._images.get(index) or index
    return self._first.get(index, index)

  def holder(self, index: str) -> str:
    """The index of the row that holds this row's image: itself, or the one that it refers to.

    Raises:
      UserError: the row has no image, or refers to a row without one.
    """
    reference = self._images.get(index)
    if reference is None:
      return index
    if reference not in self._offsets or self._images.get(reference) is not None:
      raise UserError(f"{self._path}, index {index}: its image {reference!r} is no row with an image")
    return reference

  def images(self, index: str) -> list[Image.Image]:
    """The decoded images of a row, following a reference to another row.

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


class TableBenchmark(ReadingBenchmark):
  """A benchmark of a VLMEvalKit TSV file with a closed rule, or with a file of answers to submit.

  Attributes:
    file: its name inside the data folder.
    fields: required in every row.
  """

  file: ClassVar[str]
  fields: ClassVar[tuple[str, ...]] = ("index", "question", "answer")

  def __init__(self, settings: Settings):
    """Reads the file and checks that its rows can be asked and scored."""
    super().__init__(settings)
    data = settings.data
    self._path = path = data / self.file if data.is_dir() else data
    if not path.is_file():
      raise UserError(f"{path} does not exist: {self.where}")
    self._table = Table(path)
    rows = [row for row in self._table.rows if not self.split or row.get("split") == self.split]
    self._rows = self.chosen(rows, path)
    if not self._rows:
      raise UserError(f"{path} has no rows{f' of the split {self.split!r}' if self.split else ''}")
    for row in self._rows:
      need(row, self.fields, f"{path}, index {row['index']},")
      self._table.holder(row["index"])
    if "answer" in self.fields:
      self._rows = [row | {"answer": self._truth(row)} for row in self._rows]

  def chosen(self, rows: list[dict[str, str]], path: pathlib.Path) -> list[dict[str, str]]:
    """The rows to use: all, or those of the first --limit questions."""
    return rows[: self.settings.limit]

  def truth(self, row: Mapping[str, str]) -> str:
    """The true answer of a row as the rule expects it.

    Raises:
      ValueError: no prediction could be right.
    """
    return row["answer"]

  @abc.abstractmethod
  def judge(self, rows: Sequence[Mapping[str, str]]) -> Result:
    """Scores of rows with the model's "prediction"; "picture" is the first row with the same images."""

  def _truth(self, row: Mapping[str, str]) -> str:
    try:
      return self.truth(row)
    except ValueError as error:
      where = f"{self._path}, index {row['index']}"
      raise UserError(f"{where}: answer={row['answer']!r:.80} {error}; no answer could be right") from None

  def data_files(self) -> list[pathlib.Path]:
    return [self._path]

  def tasks(self) -> list[Question]:
    """The questions, in the order of the file."""
    return [
      Question(
        row["index"],
        self.prompt(row),
        functools.partial(self._table.images, row["index"]),
        self.system,
        self.max_tokens,
      )
      for row in self._rows
    ]

  def score(self, records: Mapping[str, Mapping[str, Any]]) -> Result:
    need_all([row["index"] for row in self._rows], records, self.name, "run the same command again")
    return self.judge(
      [
        row | {"prediction": records[row["index"]]["answer"], "picture": self._table.picture(row["index"])}
        for row in self._rows
      ]
    )


def kit(name: str, folder: str = "VLMEval") -> str:
  """Instructions to download a file of VLMEvalKit."""
  return (
    f"download https://opencompass.openxlab.space/utils/{folder}/{name} and name its folder (or the file) with --data"
  )


def _lines(file: io.BufferedReader) -> Iterator[str]:
  """Yields lines of text, without a byte order mark; the file position is right after the lines yielded."""
  first = file.tell() == 0
  while line := file.readline():
    yield line.decode("utf-8-sig" if first else "utf-8")
    first = False
