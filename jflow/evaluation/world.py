"""The benchmark `shapes`: pictures of the built-in world judged by program, and questions about its pictures."""

import collections
import pathlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jflow.data import scenes, shapes
from jflow.data.examples import IMAGE_MARK
from jflow.data.shapes import TAGS, Question as Asked
from jflow.evaluation import answers, distances, judge, scores
from jflow.evaluation.recipes import Recipe
from jflow.evaluation.report import Result
from jflow.evaluation.samples import need_all
from jflow.evaluation.scores import Score
from jflow.evaluation.tasks import Painting, Question
from jflow.inference.sheet import contact_sheet

SPLITS = {"val": "seen", "held_out": "held-out"}  # split of the world -> name in the report
PROMPTS_PER_TAG = {"val": 60, "held_out": 40}
QUESTIONS = 1500  # per split
SIDE = 96  # pixels of the pictures that questions are about: the model resizes them as it does all others
REFERENCE = 1500  # renders that pictures are compared with, or ten per picture if that is fewer
_LEARNED = 6000  # training questions that the model without eyes has seen
_SHOWN = 8  # successes and failures per category on a sheet


class Painted(NamedTuple):
  """A picture of the model, judged."""

  tag: str
  prompt: int  # number of its prompt
  file: pathlib.Path
  text: str
  detections: list[judge.Detection]
  metadata: dict[str, Any]


class ShapesBenchmark:
  """Six categories after GenEval, questions, distances; combinations that training showed apart from held-out ones."""

  def __init__(self, recipe: Recipe, output: pathlib.Path, limit: int | None, seed: int):
    """`limit`: the first prompts and the first questions of each split."""
    self._recipe, self._output, self._seed = recipe, output, seed
    self._prompts, self._questions = {}, {}
    for split, each in PROMPTS_PER_TAG.items():
      tags = sum(bool(scenes.combinations(tag, split == "held_out")) for tag in TAGS)
      self._prompts[split] = shapes.evaluation_prompts(split, each * tags, 0)[:limit]
      self._questions[split] = shapes.evaluation_questions(split, min(QUESTIONS, limit or QUESTIONS), 0)

  def tasks(self) -> list[Painting | Question]:
    """All pictures to paint, then all questions."""
    out: list[Painting | Question] = []
    for split, prompts in self._prompts.items():
      for number, (text, _) in enumerate(prompts):
        for j in range(self._recipe.pictures):
          file = f"pictures/{split}/{number:04d}_{j}.png"
          out.append(Painting(f"paint/{split}/{number:04d}/{j}", text, self._seed + j, file))
    for split, asked in self._questions.items():
      for number, (scene, question) in enumerate(asked):
        picture = lambda scene=scene: [scene.render(SIDE)]
        out.append(Question(f"ask/{split}/{number:04d}", prompt_of(question), picture, max_tokens=16))
    return out

  def score(self, records: Mapping[str, Mapping[str, Any]]) -> Result:
    """Judges pictures and answers."""
    need_all([task.key for task in self.tasks()], records, "shapes", "run the same command again")
    out, sheets = {}, []
    chance = _without_eyes(self._questions)
    for split, name in SPLITS.items():
      painted = list(self._painted(split))
      for rule in ("strict", "lenient"):
        out |= _painting_scores(painted, rule, name)
      out |= _distances(painted, split, name)
      sheets += [(f"{name}: {tag}", sheet) for tag, sheet in _sheets(painted)]
      said = [records[f"ask/{split}/{i:04d}"]["answer"] for i in range(len(self._questions[split]))]
      out |= _question_scores(self._questions[split], said, chance[split], name)
    for kind in ("pictures", "questions"):
      out |= _gap(out, kind)
    notes = [
      "Pictures: strict means exactly what was asked and nothing else; lenient is GenEval's rule, which allows for more. "
      "Chance is the judge on pictures painted for other prompts of the same category. Intervals: Wilson's, with the pictures of a prompt counted as alike as they are.",
      "Questions: chance is the better of the most frequent answer of the kind and of a model that has read the "
      "questions of training and sees no picture.",
      "FD-tex (Gabor filters) sees noise and blur, FD-state (what the judge finds) sees content; floor is what other "
      "renders of the same number give, and no less can be had. Neither is comparable with an FID.",
    ]
    return Result(out, notes, sheets)

  def _painted(self, split: str) -> Iterator[Painted]:
    for number, (text, metadata) in enumerate(self._prompts[split]):
      for j in range(self._recipe.pictures):
        file = self._output / f"pictures/{split}/{number:04d}_{j}.png"
        yield Painted(metadata["tag"], number, file, text, judge.detect(_read(file)), metadata)


def prompt_of(question: Asked) -> str:
  """The user's turn: picture, question, and the instruction for short answers unless it has options."""
  suffix = "" if question.kind == "choice" else shapes.SHORT_ANSWER
  return f"{IMAGE_MARK}\n{question.question}{suffix}"


def right(question: Asked, answer: str) -> bool:
  """Whether an answer is the right one: as text after normalisation, as a yes or no, as a letter."""
  if question.kind in shapes.PAIRED:
    return answers.yes_or_no(answer).lower() == question.answer
  if question.kind == "choice":
    lines = [line.split(". ", 1) for line in question.question.splitlines() if line[1:3] == ". "]
    return answers.option(answer, dict(lines)) == question.answer
  return answers.normal_answer(answer) == answers.normal_answer(question.answer)


def _painting_scores(painted: Sequence[Painted], rule: str, name: str) -> dict[str, Score]:
  """Share of accepted pictures per category and their mean, with the chance of pictures for other prompts."""
  accept = {"strict": judge.strict, "lenient": judge.lenient}[rule]
  suffix = "" if rule == "strict" else " (lenient)"
  out = {}
  for tag in TAGS:
    rows = [p for p in painted if p.tag == tag]
    groups = collections.defaultdict(list)
    for p in rows:
      groups[p.prompt].append(accept(p.detections, p.metadata))
    others = [accept(p.detections, metadata) for p, metadata in _others(rows)]
    if rows:
      chance = float(np.mean(others)) if others else None
      out[f"{name} pictures: {tag}{suffix}"] = scores.clustered(list(groups.values()), chance)
  return out | {f"{name} pictures: overall{suffix}": scores.average(list(out.values()))} if out else {}


def _others(rows: Sequence[Painted]) -> list[tuple[Painted, dict[str, Any]]]:
  """Each picture with what three other prompts of its category ask for."""
  asked = list({str(p.metadata): p.metadata for p in rows}.values())
  rng = random.Random(0)
  pairs = []
  for p in rows:
    pool = [metadata for metadata in asked if metadata["include"] != p.metadata["include"]]
    pairs += [(p, metadata) for metadata in rng.sample(pool, min(3, len(pool)))]
  return pairs


def _distances(painted: Sequence[Painted], split: str, name: str) -> dict[str, Score]:
  if len(painted) < 2:
    return {}
  pictures = [_read(p.file) for p in painted]
  side, tags = len(pictures[0]), [p.tag for p in painted]
  reference = _renders(split, tags, min(REFERENCE, 10 * len(painted)), side, "reference")
  floor = _renders(split, tags, len(painted), side, "floor")
  out = {}
  found = [p.detections for p in painted]
  for what, measure, feature, own in (
    ("tex", distances.between, distances.texture, np.stack([distances.texture(p) for p in pictures])),
    ("state", distances.between_states, _state, np.stack([distances.state(d) for d in found])),
  ):
    target = np.stack([feature(image) for image in reference])
    fd, kernel = measure(own, target)
    least, _ = measure(np.stack([feature(image) for image in floor]), target)
    out[f"{name} pictures: FD-{what}"] = Score(fd, count=len(painted))
    out[f"{name} pictures: FD-{what}, floor"] = Score(least, count=len(painted))
    out[f"{name} pictures: kernel distance, {what}"] = Score(kernel, count=len(painted))
  return out


def _read(path: pathlib.Path) -> np.ndarray:
  """uint8[S, S, 3]; a picture too small for the judge is enlarged."""
  image = Image.open(path).convert("RGB")
  if image.width < judge.LEAST_SIDE:
    image = image.resize((judge.LEAST_SIDE,) * 2, Image.Resampling.BICUBIC)
  return np.asarray(image)


def _state(image: np.ndarray) -> np.ndarray:
  return distances.state(judge.detect(image))


def _renders(split: str, tags: Sequence[str], count: int, side: int, name: str) -> list[np.ndarray]:
  """True pictures with the categories in the same shares."""
  rng = random.Random(f"evaluation/{split}/{name}")
  return [scenes.sample(tags[i % len(tags)], split, rng)[0].render(side) for i in range(count)]


def _sheets(painted: Sequence[Painted]) -> Iterator[tuple[str, Image.Image]]:
  """Per category a sheet: the first successes in the first row, the first failures in the second."""
  for tag in TAGS:
    rows = [p for p in painted if p.tag == tag]
    if not rows:
      continue
    chosen = []
    for accepted in (True, False):
      part = [p for p in rows if judge.strict(p.detections, p.metadata) == accepted]
      part = list({p.prompt: p for p in reversed(part)}.values())[::-1]
      chosen.append([(p, accepted) for p in part[:_SHOWN]])
    columns = max(len(part) for part in chosen)
    images, captions = [], []
    for part in chosen:
      for p, accepted in part:
        images.append(Image.open(p.file).convert("RGB"))
        found = ", ".join(f"{d.color} {d.shape}" for d in p.detections) or "nothing"
        asked = p.text.removeprefix("a picture of ")
        captions.append(asked if accepted else f"{asked}: found {found}")
      blank = columns - len(part)
      if part and part is not chosen[-1]:
        images += [Image.new("RGB", images[0].size, "white")] * blank
        captions += [""] * blank
    yield f"{tag}, right above, wrong below", contact_sheet(images, captions, columns, side=112, lines=4)


def _question_scores(
  asked: Sequence[tuple[Any, Asked]], said: Sequence[str], chance: Mapping[str, float], name: str
) -> dict[str, Score]:
  """Accuracy per kind and their mean; F1 of the yes as POPE's; groups as MME's accuracy+ and MMBench's circles."""
  kinds: dict[str, list[bool]] = collections.defaultdict(list)
  groups: dict[str, dict[int, list[bool]]] = collections.defaultdict(lambda: collections.defaultdict(list))
  yes: dict[str, tuple[list[bool], list[bool]]] = collections.defaultdict(lambda: ([], []))
  for (number, (_, question)), answer in zip(_grouped(asked), said, strict=True):
    good = right(question, answer)
    kinds[question.kind].append(good)
    groups[question.kind][number].append(good)
    if question.kind in shapes.PAIRED:
      yes[question.kind][0].append(question.answer == "yes")
      yes[question.kind][1].append(answers.yes_or_no(answer) == "Yes")
  prefix = f"{name} questions: "
  out = {f"{prefix}{kind}": scores.accuracy(judged, chance=chance[kind]) for kind, judged in kinds.items()}
  for kind, (truth, positive) in yes.items():
    out[f"{prefix}{kind}, F1"] = Score(scores.f1(np.array(truth), np.array(positive))["f1"], count=len(truth))
  for kind in ("relation", "existence", "choice"):
    if kind in groups:
      label = "all four orders" if kind == "choice" else "both of a pair"
      out[f"{prefix}{kind}, {label}"] = scores.accuracy([all(group) for group in groups[kind].values()])
  out[f"{prefix}overall"] = scores.average([out[f"{prefix}{kind}"] for kind in kinds])
  return out


def _grouped(asked: Sequence[tuple[Any, Asked]]) -> Iterator[tuple[int, tuple[Any, Asked]]]:
  """Each question with the number of its group: neighbours of one kind about one scene."""
  number, last = -1, None
  for scene, question in asked:
    if (scene, question.kind) != last:
      number, last = number + 1, (scene, question.kind)
    yield number, (scene, question)


def _without_eyes(questions: Mapping[str, Sequence[tuple[Any, Asked]]]) -> dict[str, dict[str, float]]:
  """Split -> kind -> accuracy of the best that can be said without the picture."""
  read: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  for _, question in shapes.evaluation_questions("train", _LEARNED, 1):
    read[question.question][question.answer] += 1
  out: dict[str, dict[str, float]] = {}
  for split, asked in questions.items():
    kinds: dict[str, list[Asked]] = collections.defaultdict(list)
    for _, question in asked:
      kinds[question.kind].append(question)
    out[split] = {}
    for kind, group in kinds.items():
      frequent, count = collections.Counter(q.answer for q in group).most_common(1)[0]
      guess: Callable[[Asked], str] = lambda q: (
        read[q.question].most_common(1)[0][0] if read[q.question] else frequent
      )
      blind = np.mean([guess(q) == q.answer for q in group])
      out[split][kind] = max(count / len(group), float(blind))
  return out


def _gap(out: Mapping[str, Score], kind: str) -> dict[str, Score]:
  """Mean difference over the categories that both splits have."""
  names = [name.removeprefix(f"held-out {kind}: ") for name in out if name.startswith(f"held-out {kind}: ")]
  names = [name for name in names if name in (TAGS if kind == "pictures" else shapes.KINDS)]
  differences = [out[f"seen {kind}: {name}"].value - out[f"held-out {kind}: {name}"].value for name in names
                 if f"seen {kind}: {name}" in out]  # fmt: skip
  name = f"{kind}: seen less held-out, same categories"
  return {name: Score(float(np.mean(differences)), count=len(differences))} if differences else {}
