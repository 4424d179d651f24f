"""The benchmarks `shapes` and `lone`: pictures painted for prompts of the world, and questions about true ones."""

import collections
import dataclasses
import itertools
import pathlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jflow.data.sequences import IMAGE_MARK
from jflow.errors import UserError
from jflow.evaluation import answers, distances, samples, scores
from jflow.evaluation.benchmark import GenerationBenchmark
from jflow.evaluation.report import Result
from jflow.evaluation.scores import Score
from jflow.evaluation.settings import Settings
from jflow.evaluation.tasks import Generation, Question, RoundTrip
from jflow.inference.sheet import contact_sheet
from jflow.world import features, judge, questions, references, scenes, source
from jflow.world.questions import Question as Asked
from jflow.world.scenes import TAGS

SPLITS = {"val": "seen", "held_out": "held-out"}  # split of the world -> name in the report
SIDE = 96  # pixels of the pictures that questions are about; the model resizes them like any other
REFERENCE = 1500  # renders to compare pictures with, or ten per picture if that is fewer
RULES = {"strict": judge.strict, "lenient": judge.lenient}
CEILING = 60  # true pictures per category to encode and decode with the VAE
FLOORS = 3  # sets of other renders, each as large as the set of generated pictures
LEAST_FLOOR = 2  # pictures per feature, below which true pictures can be farther from each other than generated ones
_SEES = {
  "tex": "FD-tex (Gabor filters) sees noise and blur",
  "state": "FD-state (what the judge finds) sees content",
}
_SHOWN = 8  # successes and failures per category on a sheet


class Generated(NamedTuple):
  """A generated picture with its judgement."""

  tag: str
  prompt: int  # number of its prompt
  file: pathlib.Path
  text: str
  detections: list[judge.Detection]
  metadata: dict[str, Any]


class WorldBenchmark(GenerationBenchmark):
  """GenEval's six categories, questions and distances, each for seen and for held-out combinations."""

  name = "shapes"
  what = "the built-in world: pictures judged by program after GenEval's rules, questions, distances; needs no data"
  where = "made by jflow itself"
  flags = frozenset({"only", "sampling", "pictures"})
  pictures = 4
  scope = references.Scope()
  prompts_per_tag: Mapping[str, int] = {"val": 60, "held_out": 40}
  question_count = 1500  # per split
  distance_kinds: tuple[str, ...] = ("tex", "state")  # features on which distances to true pictures are measured
  goals = {
    "seen pictures: single_object": 0.95,
    "seen pictures: colors": 0.9,
    "seen pictures: counting": 0.7,
    "seen pictures: position": 0.8,
    "seen pictures: two_object": 0.8,
    "seen pictures: color_attr": 0.7,
    "seen questions: overall": 0.95,
  }

  def __init__(self, settings: Settings):
    """Draws prompts and questions."""
    super().__init__(settings)
    self._output, self._seed = settings.output, settings.seed
    self._cache = pathlib.Path(settings.cache).expanduser() if settings.cache else None
    limit, only = settings.limit, settings.only
    if only == "questions":
      of_pictures = [*settings.sampling] + ["pictures"] * (settings.pictures is not None)
      if of_pictures:
        raise UserError(f"--{of_pictures[0]} is for pictures, and --only=questions paints none: leave one of them out")
    self._prompts, self._questions = {}, {}
    scope, tags = self.scope, self.scope.prompts
    for split, each in self.prompts_per_tag.items():
      there = sum(bool(scenes.combinations(tag, split == "held_out")) for tag in tags)
      prompts = source.evaluation_prompts(split, each * there, 0, tags)[:limit]
      self._prompts[split] = [] if only == "questions" else prompts
      count = 0 if only == "pictures" else min(self.question_count, limit or self.question_count)
      self._questions[split] = references.asked_of(scope, split, count, 0) if count else []
    self._true = []
    for i in range(0 if only == "questions" else min(CEILING * len(tags), limit or CEILING * len(tags))):
      rng = random.Random(f"evaluation/codec/{i}")
      scene, combination = scenes.sample(tags[i % len(tags)], "val", rng, scope.large, scope.spread)
      self._true.append((scene, source.prompt(combination)[1]))

  def identity(self) -> dict[str, Any]:
    return super().identity() | {"noise": "of its own for every picture"}

  @classmethod
  def swept(cls, settings: Settings) -> Settings:
    if settings.only == "questions":
      raise UserError(
        "--only=questions: answers do not depend on how pictures are sampled, so there is nothing to sweep"
      )
    return dataclasses.replace(settings, only="pictures")

  def data_files(self) -> list[pathlib.Path]:
    """The world's source files, since prompts, questions and true answers depend on them."""
    return list(source.CODE)

  def tasks(self) -> list[Generation | RoundTrip | Question]:
    """All images to generate, true ones to encode and decode where the model does so, then all questions."""
    out: list[Generation | RoundTrip | Question] = []
    seeds = itertools.count(self._seed)  # shared noise would correlate the pictures
    for split, prompts in self._prompts.items():
      for number, (text, _) in enumerate(prompts):
        for j in range(self.pictures):
          file = f"pictures/{split}/{number:04d}_{j}.png"
          out.append(Generation(f"paint/{split}/{number:04d}/{j}", text, next(seeds), file))
    for number, (scene, _) in enumerate(self._true if self.encodes else ()):
      out.append(RoundTrip(f"codec/{number:04d}", scene.render, f"pictures/codec/{number:04d}.png"))
    for split, asked in self._questions.items():
      for number, (scene, question) in enumerate(asked):
        picture = lambda scene=scene: [scene.render(SIDE)]
        out.append(Question(f"ask/{split}/{number:04d}", prompt_of(question), picture, max_tokens=16))
    return out

  def _ceiling(self) -> dict[str, dict[str, float]]:
    """Rule -> category -> share of true pictures accepted after encoding and decoding by the VAE."""
    found: dict[str, dict[str, list[bool]]] = {rule: collections.defaultdict(list) for rule in RULES}
    for number, (_, metadata) in enumerate(self._true if self.encodes else ()):
      detections = judge.detect(judged_picture(self._output / f"pictures/codec/{number:04d}.png"))
      for rule, accept in RULES.items():
        found[rule][metadata["tag"]].append(accept(detections, metadata))
    return {rule: {tag: float(np.mean(judged)) for tag, judged in by_tag.items()} for rule, by_tag in found.items()}

  def score(self, records: Mapping[str, Mapping[str, Any]]) -> Result:
    """Scores of pictures and answers."""
    samples.need_all([task.key for task in self.tasks()], records, self.name, "run the same command again")
    out, sheets, ceiling = {}, [], self._ceiling()
    for split, name in SPLITS.items():
      generated = list(self._generated(split))
      for rule in RULES:
        out |= _generation_scores(generated, rule, name, ceiling[rule])
      out |= _distances(generated, split, name, self._cache, self.scope, self.distance_kinds)
      sheets += [(f"{name}: {tag}", sheet) for tag, sheet in _sheets(generated)]
      said = [records[f"ask/{split}/{i:04d}"]["answer"] for i in range(len(self._questions[split]))]
      out |= _question_scores(self._questions[split], said, name, self.scope)
    for kind in ("pictures", "questions"):
      out |= _gap(out, kind)
    painted, asked = (self.settings.only != other for other in ("questions", "pictures"))
    notes = {
      "Pictures: strict means exactly what was asked and nothing else; lenient is GenEval's rule, which allows for more. "
      "Chance is the judge on pictures generated for other prompts of the same category; the ceiling, on true pictures "
      "that the model's autoencoder has encoded and decoded. Intervals: Wilson's, with the pictures of a prompt counted as "
      "alike as they are.": painted,
      "Questions: their intervals count a yes and a no about one picture, and the orders of one choice, as alike as they are. "
      "Beside each score stand the most frequent answer of the kind; a model that has read the questions of "
      "training and sees no picture; and what was right for the nearest picture of training.": asked,
      f"{', '.join(_SEES[kind] for kind in self.distance_kinds)}; not comparable with an FID. MMD: the unbiased kernel "
      "distance on the same features. Floor: what other renders of the same number give, mean, least and most of "
      f"{FLOORS} sets; no less can be had, and fewer than {LEAST_FLOOR} pictures per feature give none. Other intervals: "
      "jackknife over prompts.": painted,
    }
    return Result(out, [note for note, told in notes.items() if told], sheets)

  def _generated(self, split: str) -> Iterator[Generated]:
    for number, (text, metadata) in enumerate(self._prompts[split]):
      for j in range(self.pictures):
        file = self._output / f"pictures/{split}/{number:04d}_{j}.png"
        yield Generated(metadata["tag"], number, file, text, judge.detect(judged_picture(file)), metadata)


class LoneBenchmark(WorldBenchmark):
  """The part of the world that size `quick` learns: one large object near the middle, its color and shape."""

  name = "lone"
  what = "the built-in world's lone large objects, which the quickstart learns: pictures by the same judge, questions"
  scope = references.Scope(
    ("colors",), ("colors",), ("existence", "existence_adversarial", "existence_shape", "color", "shape"), 1.0, 0.12
  )
  prompts_per_tag: Mapping[str, int] = {"val": 68, "held_out": 12}  # every pair
  question_count = 600
  distance_kinds = ("state",)  # FD-tex would be that of the corners, which are nearly the same gray in every picture
  goals = {}


def painted(
  output: pathlib.Path, split: str, scope: references.Scope
) -> Iterator[tuple[int, dict[str, Any], pathlib.Path]]:
  """Yields (number of its prompt, its metadata, file) for the pictures of an evaluation that are there, in order."""
  files = sorted((output / "pictures" / split).glob("*_*.png"))
  numbers = [int(file.stem.split("_")[0]) for file in files]
  prompts = source.evaluation_prompts(split, 1 + max(numbers, default=-1), 0, scope.prompts)
  for number, file in zip(numbers, files, strict=True):
    yield number, prompts[number][1], file


def prompt_of(question: Asked) -> str:
  """The user's turn: picture, question, and the instruction for short answers unless the question has options."""
  suffix = "" if question.kind == "choice" else questions.SHORT_ANSWER
  return f"{IMAGE_MARK}\n{question.question}{suffix}"


def right(question: Asked, answer: str) -> bool:
  """Whether an answer is right, compared as normalised text, as a yes or no, or as a letter."""
  if question.kind in questions.PAIRED:
    return answers.yes_or_no(answer).lower() == question.answer
  if question.kind == "choice":
    lines = [line.split(". ", 1) for line in question.question.splitlines() if line[1:3] == ". "]
    return answers.option(answer, dict(lines)) == question.answer
  return answers.normal_answer(answer) == answers.normal_answer(question.answer)


def _generation_scores(
  generated: Sequence[Generated], rule: str, name: str, ceiling: Mapping[str, float]
) -> dict[str, Score]:
  """Share of accepted pictures per category and the mean; chance is the share for pictures of other prompts."""
  accept = RULES[rule]
  suffix = "" if rule == "strict" else " (lenient)"
  out = {}
  for tag in TAGS:
    rows = [p for p in generated if p.tag == tag]
    groups = collections.defaultdict(list)
    for p in rows:
      groups[p.prompt].append(accept(p.detections, p.metadata))
    others = [accept(p.detections, metadata) for p, metadata in _others(rows)]
    if rows:
      chance = float(np.mean(others)) if others else None
      beside = {"ceiling of the autoencoder": ceiling[tag]} if tag in ceiling else None
      out[f"{name} pictures: {tag}{suffix}"] = scores.clustered(list(groups.values()), chance)._replace(beside=beside)
  return out | {f"{name} pictures: overall{suffix}": scores.average(list(out.values()))} if out else {}


def _others(rows: Sequence[Generated]) -> list[tuple[Generated, dict[str, Any]]]:
  """Each picture with the metadata of three other prompts of its category."""
  asked = list({str(p.metadata): p.metadata for p in rows}.values())
  rng = random.Random(0)
  pairs = []
  for p in rows:
    pool = [metadata for metadata in asked if metadata["include"] != p.metadata["include"]]
    pairs += [(p, metadata) for metadata in rng.sample(pool, min(3, len(pool)))]
  return pairs


def _distances(
  generated: Sequence[Generated],
  split: str,
  name: str,
  cache: pathlib.Path | None,
  scope: references.Scope,
  kinds: Sequence[str],
) -> dict[str, Score]:
  """Frechet and kernel distances to true pictures on kinds of features, each with its floor between true ones."""
  if len(generated) < 2:
    return {}
  pictures = [judged_picture(p.file) for p in generated]
  own = features.stacked(kinds, pictures, [p.detections for p in generated])
  tags, count, side = [p.tag for p in generated], len(generated), len(pictures[0])
  true = lambda many, set_name: references.features_of_renders(split, tags, many, side, set_name, cache, scope, kinds)
  target = true(min(REFERENCE, 10 * count), "reference")
  floors = [true(count, f"floor {i}") for i in range(FLOORS)]
  prompts = collections.defaultdict(list)
  for i, p in enumerate(generated):
    prompts[p.prompt].append(i)
  groups = list(prompts.values())
  out = {}
  for what in kinds:
    least = {"tex": 1e-6, "state": features.LEAST_STATE}[what]
    a, b, *others = (distances.normalised(x[what], target[what], least) for x in (own, target, *floors))

    def of_prompts(chosen: Sequence[int], a: np.ndarray = a, b: np.ndarray = b) -> float:
      return distances.frechet(b, a[np.concatenate([groups[i] for i in chosen])])

    out[f"{name} pictures: FD-{what}"] = scores.jackknife(of_prompts, groups)._replace(count=count)
    out[f"{name} pictures: MMD-{what}"] = Score(distances.kernel_distance(a, b), count=count)
    if count >= LEAST_FLOOR * a.shape[1]:
      out[f"{name} pictures: FD-{what}, floor"] = _spread([distances.frechet(b, x) for x in others], count)
      out[f"{name} pictures: MMD-{what}, floor"] = _spread([distances.kernel_distance(x, b) for x in others], count)
  return out


def _spread(values: Sequence[float], count: int) -> Score:
  return Score(float(np.mean(values)), min(values), max(values), count)


def judged_picture(path: pathlib.Path) -> np.ndarray:
  """Reads a picture, uint8[S, S, 3], enlarged if it is too small for the judge."""
  image = samples.read_picture(path)
  if image.width < judge.LEAST_SIDE:
    image = image.resize((judge.LEAST_SIDE,) * 2, Image.Resampling.BICUBIC)
  return np.asarray(image)


def _sheets(generated: Sequence[Generated]) -> Iterator[tuple[str, Image.Image]]:
  """Yields (title, sheet) per category: the first successes in the first row, the first failures in the second."""
  for tag in TAGS:
    rows = [p for p in generated if p.tag == tag]
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
        images.append(samples.read_picture(p.file))
        found = ", ".join(f"{d.color} {d.shape}" for d in p.detections) or "nothing"
        asked = p.text.removeprefix("a picture of ")
        captions.append(asked if accepted else f"{asked}: found {found}")
      blank = columns - len(part)
      if part and part is not chosen[-1]:
        images += [Image.new("RGB", images[0].size, "white")] * blank
        captions += [""] * blank
    above, below = map(len, chosen)
    told = "right above, wrong below" if above and below else "all of them right" if above else "none of them right"
    yield f"{tag}, {told}", contact_sheet(images, captions, columns, side=112, lines=4)


def _question_scores(
  asked: Sequence[tuple[Any, Asked]], said: Sequence[str], name: str, scope: references.Scope
) -> dict[str, Score]:
  """Accuracy per kind and the mean; F1 of "yes" as in POPE; groups as in MME's accuracy+ and MMBench's circular score.

  Intervals account for the correlation within a group (a yes and a no, the orders of a choice).
  """
  if not asked:
    return {}
  by_group = lambda: collections.defaultdict(lambda: collections.defaultdict(list))
  groups: dict[str, dict[int, list[bool]]] = by_group()
  yes: dict[str, dict[int, list[tuple[bool, bool]]]] = by_group()
  for (number, (_, question)), answer in zip(grouped(asked), said, strict=True):
    groups[question.kind][number].append(right(question, answer))
    if question.kind in questions.PAIRED:
      yes[question.kind][number].append((question.answer == "yes", answers.yes_or_no(answer) == "Yes"))
  prefix, beside = f"{name} questions: ", references.baselines(asked, scope)
  out = {}
  for kind, judged in groups.items():
    out[f"{prefix}{kind}"] = scores.clustered(list(judged.values()))._replace(beside=beside[kind])
  for kind, pairs in yes.items():
    out[f"{prefix}{kind}, F1"] = scores.f1_of_yes(list(pairs.values()))
  for kind in ("relation", "existence", "choice"):
    if kind in groups:
      label = "all four orders" if kind == "choice" else "both of a pair"
      out[f"{prefix}{kind}, {label}"] = scores.accuracy([all(group) for group in groups[kind].values()])
  out[f"{prefix}overall"] = scores.average([out[f"{prefix}{kind}"] for kind in groups])
  return out


def grouped(asked: Sequence[tuple[Any, Asked]]) -> Iterator[tuple[int, tuple[Any, Asked]]]:
  """Yields (group number, question); a group is consecutive questions of one kind about one scene."""
  number, last = -1, None
  for scene, question in asked:
    if (scene, question.kind) != last:
      number, last = number + 1, (scene, question.kind)
    yield number, (scene, question)


def _gap(out: Mapping[str, Score], kind: str) -> dict[str, Score]:
  """The mean difference of the splits over the categories that both have."""
  names = [name.removeprefix(f"held-out {kind}: ") for name in out if name.startswith(f"held-out {kind}: ")]
  names = [name for name in names if name in (TAGS if kind == "pictures" else questions.KINDS)]
  differences = [
    out[f"seen {kind}: {name}"].value - out[f"held-out {kind}: {name}"].value
    for name in names
    if f"seen {kind}: {name}" in out
  ]
  name = f"{kind}: seen less held-out, same categories"
  return {name: Score(float(np.mean(differences)), count=len(differences))} if differences else {}
