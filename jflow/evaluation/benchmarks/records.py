"""One's own records, as `prepare` wrote them: their loss, and what the model says or paints beside the truth."""

import functools
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from jflow.data import images
from jflow.data.held_out import held_out
from jflow.data.records import Record, RecordError
from jflow.data.sequences import IMAGE_MARK
from jflow.data.store.prepared import SUMMARY, PreparedSource, read_summary
from jflow.errors import UserError
from jflow.evaluation import answers, scores
from jflow.evaluation.benchmark import GenerationBenchmark
from jflow.evaluation.page import Shown
from jflow.evaluation.report import Result
from jflow.evaluation.samples import need_all, read_picture
from jflow.evaluation.scores import Score
from jflow.evaluation.settings import Settings
from jflow.evaluation.tasks import Generation, Loss, Question, Task

if TYPE_CHECKING:
  from jflow.evaluation.runs import Run
  from jflow.interop.checkpoints import Described

_MOST = 64  # records without --limit
_SIDE = 160  # pixels of a picture on the page
_SMALL = 16  # pixels of a picture that is compared with others
_HELD_OUT = re.compile(r"held-out(?::(0?\.\d{1,9}))?")


class Records(GenerationBenchmark):
  """Records of one prepared data set, evenly spread over it."""

  name = "records"
  what = "one's own records: their loss, answers and pictures beside the truth, on one page"
  where = (
    "a directory that `jflow prepare` wrote; --split=held-out takes the records that the run in --checkpoint held out "
    "(data.validation), --split=held-out:0.05 those of a share, for a checkpoint of another"
  )
  flags = GenerationBenchmark.flags | {"split"}

  def __init__(self, settings: Settings):
    """Opens the data set and chooses the records."""
    super().__init__(settings)
    self._directory = settings.data
    self._task = read_summary(str(settings.data))["task"]
    if settings.sampling and self._task != "generation":
      name = next(iter(settings.sampling))
      raise UserError(
        f"--{name} must be left out: {settings.data} holds {self._task} records, of which none is painted"
      )
    self._source = PreparedSource(str(settings.data), self._task)
    self._outlines = list(self._source.outlines())
    self._too_long = 0
    self._share = _share(settings.split)
    if self._share is not None:
      self._choose(self._share)

  def _choose(self, share: float) -> None:
    """Chooses records evenly spread over those of a share that is held out; 0: over all."""
    chosen = np.flatnonzero(held_out(self._source, share)).tolist() if share else list(range(len(self._outlines)))
    if not chosen:
      raise UserError(
        f"--split={self.settings.split}: none of the {len(self._outlines):,} records of {self._directory} is held out"
      )
    self._all = len(chosen)
    count = min(self.settings.limit or _MOST, len(chosen))
    places = np.linspace(0, len(chosen) - 1, count).round().astype(int)
    self._records = {f"{chosen[i]:08d}": self._outlines[chosen[i]] for i in places.tolist()}

  def meet_run(self, run: "Run", described: Callable[[], "Described"]) -> None:
    """Chooses by the run's share of held-out records where --split names none, and leaves out what is too long."""
    from jflow.evaluation.losses import fits

    super().meet_run(run, described)
    if self._share is None:
      if not run.validation:
        raise UserError(
          f"--split=held-out needs the run of {self.settings.checkpoint} to have data.validation above 0; name the "
          "share, as --split=held-out:0.05"
        )
      self._choose(run.validation)
    found, before = described(), len(self._records)
    self._records = {name: one for name, one in self._records.items() if fits(found, one, self._task, run)}
    self._too_long = before - len(self._records)
    if not self._records:
      raise UserError(
        f"each of {before:,} records of {self._directory} is longer than the context of "
        f"{found.config.language_model.max_length} tokens"
      )

  def data_files(self) -> list[pathlib.Path]:
    """The summary of the data set, which holds the hash of its records."""
    return [self._directory / SUMMARY]

  def identity(self) -> dict[str, Any]:
    return {"caption_prompt": self.run.caption_prompt}

  def tasks(self) -> list[Task]:
    """A loss for each record, and what is asked or painted of it."""
    made: list[Task] = []
    for name, outline in self._records.items():
      seed, record = self.settings.seed + int(name), functools.partial(self._record, name)
      made.append(Loss(f"loss/{name}", record, self._task, seed))
      if self._task == "generation":
        made.append(Generation(f"paint/{name}", outline.text.strip(), seed, f"pictures/{name}.png"))
      elif self._task == "understanding" and (asked := _asked(outline, self.run.caption_prompt)):
        made.append(Question(f"ask/{name}", asked[0], functools.partial(self._pictures, name, asked[0])))
    return made

  def _record(self, name: str) -> Record:
    try:
      return self._source[int(name)]
    except RecordError as error:
      raise UserError(f"{error}: run `jflow prepare` on the source again") from None

  def _pictures(self, name: str, question: str) -> list[Any]:
    """The pictures of a question, those of its marks, as training gets them."""
    found = self._record(name).images[: question.count(IMAGE_MARK)]
    return list(found)

  def score(self, records: Mapping[str, Any]) -> Result:
    """Scores, and the table of all records."""
    need_all([task.key for task in self.tasks()], records, self.name, "run the same command again")
    sums = {name: records[f"loss/{name}"]["answer"] for name in self._records}
    each = {name: total / max(count, 1.0) for name, (total, count) in sums.items()}
    if self._task == "generation":
      out = {"loss of a picture": scores.mean(list(each.values()))}
    else:
      total, count = np.sum(list(sums.values()), axis=0)
      out = {"loss of a token": Score(float(total / max(count, 1.0)), count=int(count))}
    of = {"generation": self._painted, "understanding": self._answered, "text": self._read}[self._task]
    more, shown, notes = of(records, each)
    if self._too_long:
      notes.append(f"{self._too_long:,} more are left out, longer than the context, as training leaves them out.")
    if self._all > len(self._records) + self._too_long:
      notes.append(f"{len(self._records):,} of {self._all:,} records, evenly spread; --limit takes more.")
    return Result(out | more, notes, shown=[shown])

  def _painted(
    self, records: Mapping[str, Any], each: Mapping[str, float]
  ) -> tuple[dict[str, Score], Shown, list[str]]:
    side, true, made, rows = 0, {}, {}, []
    for name, outline in self._records.items():
      painted = read_picture(self.settings.output / records[f"paint/{name}"]["file"])
      side = painted.width
      pixels = images.for_generation(self._record(name).images[0], side, np.random.default_rng(0), self.run.crop)
      truth = Image.fromarray(pixels)
      true[name], made[name] = _thumbnail(truth), _thumbnail(painted)
      rows.append([_page_size(truth), _page_size(painted), outline.text, f"{each[name]:.4f}"])
    stack = np.stack(list(true.values()))
    nearest = [int(np.argmin(np.square(stack - x).mean(axis=(1, 2, 3)))) == i for i, x in enumerate(made.values())]
    found = scores.accuracy(nearest)._replace(chance=1 / len(nearest)) if len(nearest) > 1 else None
    notes = [
      "Nearest: of all true pictures of this report, the one of the same caption is the most alike, by the squared "
      f"difference of {_SMALL} x {_SMALL} pixels. Pictures with the same caption share it by chance.",
      "The loss of a picture is the mean over draws of time and noise that are the same for every checkpoint.",
    ]
    return {"nearest": found} if found else {}, Shown("Pictures", ("Truth", "Painted", "Caption", "Loss"), rows), notes

  def _answered(
    self, records: Mapping[str, Any], each: Mapping[str, float]
  ) -> tuple[dict[str, Score], Shown, list[str]]:
    rows, same, shared, skipped = [], [], [], 0
    for name, outline in self._records.items():
      asked = _asked(outline, self.run.caption_prompt)
      if not asked:
        skipped += 1
        continue
      said, truth = records[f"ask/{name}"]["answer"], asked[1]
      same.append(answers.normal_answer(said) == answers.normal_answer(truth))
      shared.append(words_shared(said, truth))
      pictures = self._pictures(name, asked[0])
      question = asked[0].replace(IMAGE_MARK, "").strip()
      shown = _page_size(Image.fromarray(images.decode(pictures[0]))) if pictures else ""
      rows.append([shown, question, truth, said, f"{each[name]:.4f}"])
    out = {"same answer": scores.accuracy(same), "words shared": scores.mean(shared)} if same else {}
    notes = [
      "Same answer: equal in the VQA challenge's normal form. Words shared: F1 of the words of answer and truth. Of a "
      "conversation the first question is asked; the loss is that of all its answers.",
    ]
    if skipped:
      notes.append(f"{skipped} interleaved documents ask nothing: they have a loss alone.")
    return out, Shown("Answers", ("Picture", "Question", "Truth", "Answer", "Loss"), rows), notes

  def _read(self, records: Mapping[str, Any], each: Mapping[str, float]) -> tuple[dict[str, Score], Shown, list[str]]:
    texts = [record.text or " / ".join(turn.text for turn in record.turns) for record in self._records.values()]
    rows = [[text[:300], f"{loss:.4f}"] for text, loss in zip(texts, each.values(), strict=True)]
    return {}, Shown("Texts", ("Text", "Loss"), rows), []


def _share(split: str) -> float | None:
  """The share of held-out records that --split names, 0 for all records; None: that of the run."""
  if not split:
    return 0.0
  found = _HELD_OUT.fullmatch(split)
  if not found:
    raise UserError(f"--split={split} must be held-out, or held-out:SHARE, as held-out:0.05")
  return float(found[1]) if found[1] else None


def words_shared(said: str, truth: str) -> float:
  """The F1 of the words of an answer and the truth, in [0, 1], in the VQA challenge's normal form."""
  ours, theirs = answers.normal_answer(said).split(), answers.normal_answer(truth).split()
  common = sum(min(ours.count(word), theirs.count(word)) for word in set(ours))
  return 2 * common / (len(ours) + len(theirs)) if ours or theirs else 1.0


def _asked(record: Record, caption_prompt: str) -> tuple[str, str] | None:
  """The first question of a record with its marks, and the true answer; None for an interleaved document."""
  if record.turns:
    return record.turns[0].text, record.turns[1].text
  if IMAGE_MARK in record.text:
    return None
  return f"{IMAGE_MARK * len(record.images)}\n{caption_prompt}", record.text


def _thumbnail(image: Image.Image) -> np.ndarray:
  return np.asarray(image.resize((_SMALL, _SMALL), Image.Resampling.BOX), np.float32)


def _page_size(image: Image.Image) -> Image.Image:
  shown = image.copy()
  shown.thumbnail((_SIDE, _SIDE))
  return shown
