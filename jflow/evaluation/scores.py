"""Scores of whole benchmarks from judged records, with confidence intervals."""

import collections
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

CONFIDENCE_Z = 1.959963984540054  # of 95 %, two-sided
DRAWS = 1000  # of a bootstrap


class Score(NamedTuple):
  """One number of a report."""

  value: float
  low: float | None = None  # ends of the 95 % interval
  high: float | None = None
  count: int | None = None  # samples behind it
  chance: float | None = None  # score of images for other prompts
  beside: Mapping[str, float] | None = None  # further values to compare with: name -> value


def wilson(right: float, count: float) -> tuple[float, float]:
  """The 95 % Wilson interval of a share of independent samples."""
  if not count:
    return 0.0, 1.0
  z2, share = CONFIDENCE_Z**2, right / count
  middle = (share + z2 / (2 * count)) / (1 + z2 / count)
  half = CONFIDENCE_Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
  return max(0.0, middle - half), min(1.0, middle + half)


def accuracy(judged: Iterable[bool], scale: float = 1.0) -> Score:
  """The share of correct samples, times `scale`, with its Wilson interval."""
  judged = [bool(one) for one in judged]
  low, high = wilson(sum(judged), len(judged))
  value = sum(judged) / len(judged) if judged else 0.0
  return Score(scale * value, scale * low, scale * high, len(judged))


def mean(values: Sequence[float], scale: float = 1.0) -> Score:
  """The mean of independent unbounded values, times `scale`, with a normal interval."""
  values = np.asarray(values, np.float64)
  half = CONFIDENCE_Z * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
  value = float(values.mean())
  return Score(scale * value, scale * float(value - half), scale * float(value + half), len(values))


def clustered(groups: Sequence[Sequence[float]], chance: float | None = None, scale: float = 1.0) -> Score:
  """The mean of values in [0, 1], times `scale`, where values of one group correlate, such as images of one prompt.

  The Wilson interval for the effective number of independent samples, estimated from the spread between groups: at
  least the number if each group were one sample (the number of groups, if they are equally large), at most the number
  of values. Unlike a bootstrap it does not shrink to nothing at 0 or 1, and it stays within them.

  Args:
    groups: values in [0, 1], 1 for right.
    chance: see `Score`.
    scale: of all that is returned.
  """
  sizes = np.array([len(group) for group in groups], np.float64)
  sums = np.array([sum(map(float, group)) for group in groups], np.float64)
  count, share = sizes.sum(), sums.sum() / sizes.sum()
  least = count**2 / np.square(sizes).sum()
  effective = least
  if 0 < share < 1 and len(groups) > 1:
    variance = len(groups) / (len(groups) - 1) * float(((sums - share * sizes) ** 2).sum()) / count**2
    effective = min(max(share * (1 - share) / variance, least), count) if variance > 0 else count
  low, high = wilson(share * effective, effective)
  return Score(scale * float(share), scale * low, scale * high, int(count), chance)


def average(parts: Sequence[Score]) -> Score:
  """The unweighted mean of independent scores; its interval from theirs (Zou and Donner's MOVER)."""
  value = float(np.mean([part.value for part in parts]))
  below = math.sqrt(sum((part.value - part.low) ** 2 for part in parts)) / len(parts)
  above = math.sqrt(sum((part.high - part.value) ** 2 for part in parts)) / len(parts)
  chances = [part.chance for part in parts]
  chance = None if None in chances else float(np.mean(chances))
  names = set.intersection(*(set(part.beside or ()) for part in parts))
  mean_of = lambda name: float(np.mean([part.beside[name] for part in parts]))
  beside = {name: mean_of(name) for name in parts[0].beside or () if name in names}
  return Score(value, value - below, value + above, sum(part.count for part in parts), chance, beside or None)


def bootstrap(statistic: Callable[[np.ndarray], float], groups: Sequence[Any], seed: int = 0) -> Score:
  """A statistic of independent groups of samples, with its 95 % percentile interval.

  Args:
    statistic: takes the indices of groups, int[n], with repetitions, and returns a number.
    groups: that `statistic` indexes, such as the images of one prompt or the questions about one image.
    seed: of the draws.
  """
  rng, count = np.random.default_rng(seed), len(groups)
  drawn = [statistic(rng.integers(0, count, count)) for _ in range(DRAWS)]
  low, high = np.percentile(drawn, [2.5, 97.5])
  return Score(float(statistic(np.arange(count))), float(low), float(high), count)


def jackknife(statistic: Callable[[np.ndarray], float], groups: Sequence[Any], blocks: int = 10) -> Score:
  """A statistic of independent groups with a delete-block jackknife interval, for statistics biased by repetitions.

  Args:
    statistic: takes indices of groups, int[n], without repetitions, and returns a number.
    groups: as in `bootstrap`.
    blocks: number of contiguous blocks of groups, each left out once; where categories alternate, every block holds
      them in about the same shares.
  """
  count = len(groups)
  value, blocks = float(statistic(np.arange(count))), min(blocks, count)
  if blocks < 3:
    return Score(value, count=count)
  left = [statistic(np.flatnonzero(np.arange(count) * blocks // count != block)) for block in range(blocks)]
  half = CONFIDENCE_Z * math.sqrt((blocks - 1) * float(np.var(left)))
  return Score(value, value - half, value + half, count)


def f1(truth: np.ndarray, said: np.ndarray) -> dict[str, float]:
  """F1, precision and recall of "yes"; 0 where a denominator is 0.

  Args:
    truth, said: bool[n], True is a yes.
  """
  both = int(np.sum(truth & said))
  precision = both / int(said.sum()) if said.any() else 0.0
  recall = both / int(truth.sum()) if truth.any() else 0.0
  total = precision + recall
  return {"f1": 2 * precision * recall / total if total else 0.0, "precision": precision, "recall": recall}


def f1_of_yes(groups: Sequence[Sequence[tuple[bool, bool]]], scale: float = 1.0) -> Score:
  """F1 of "yes", times `scale`; its bootstrap draws whole groups, such as the questions about one image.

  Args:
    groups: (truth, said) of each question of a group, True is a yes.
  """
  # Per group: found, said, true. F1 is 2 found / (said + true).
  counts = np.array([[sum(t and s for t, s in g), sum(s for _, s in g), sum(t for t, _ in g)] for g in groups], float)

  def statistic(chosen: np.ndarray) -> float:
    found, said, true = counts[chosen].sum(0)
    return scale * 2 * found / (said + true) if said + true else 0.0

  score = bootstrap(statistic, groups)._replace(count=sum(map(len, groups)))
  return score if score.low < score.high else score._replace(low=None, high=None)  # no draw differs: nothing is known


def grouped(rows: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
  """The rows grouped by "picture", where given: questions about one image are not independent."""
  groups: dict[Any, list[Mapping[str, Any]]] = collections.defaultdict(list)
  for number, row in enumerate(rows):
    groups[row.get("picture", number)].append(row)
  return list(groups.values())


def by_category(rows: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
  """Accuracy in percent, over all rows and per category.

  Args:
    rows: {"right": bool or a share, "category", "picture"}; the interval accounts for the correlation of questions
      about one image.
  """
  categories: dict[str, list[Mapping[str, Any]]] = collections.defaultdict(list)
  for row in rows:
    categories[str(row["category"])].append(row)
  score = lambda part: clustered([[row["right"] for row in group] for group in grouped(part)], scale=100)
  out = {"overall": score(rows)}
  if len(categories) > 1:
    out |= {name: score(part) for name, part in sorted(categories.items())}
  return out
