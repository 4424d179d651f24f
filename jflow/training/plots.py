"""Metrics of runs as curves: smoothing, paired differences, and the picture of them."""

import math
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jflow.errors import UserError, need_extra
from jflow.training.metrics import FILE, Row, read_metrics

FORMATS = ("png", "pdf", "svg")
_MOST = 16  # panels below each other
_NORMAL = 1.96  # standard errors on each side of a mean that hold it in 95 % of cases


class Curve(NamedTuple):
  """A metric along a run, where it is a finite number.

  Attributes:
    steps: int64[n], rising.
    values: f64[n].
  """

  steps: np.ndarray
  values: np.ndarray


def read_run(workdir: pathlib.Path) -> list[Row]:
  """Returns the steps that a run has logged so far, also while it is running; see `metrics.read_metrics`.

  Raises:
    UserError: there is no such run, or it has no step yet.
  """
  path = workdir / FILE
  if not path.exists():
    raise UserError(f"{workdir} is not a run: it has no {FILE}")
  rows = read_metrics(workdir)
  if not rows:
    raise UserError(f"{path} holds no step yet")
  return rows


def curve(rows: Sequence[Row], metric: str) -> Curve:
  """Returns a metric of a run, at the steps where it is a finite number."""
  found = sorted((row["step"], row[metric]) for row in rows if _is_number(row.get(metric)))
  return Curve(np.array([at for at, _ in found], np.int64), np.array([value for _, value in found], np.float64))


def _is_number(value: Any) -> bool:
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return False
  return abs(value) < 1e300 and not math.isnan(value)


def losses_of(runs: Sequence[Sequence[Row]]) -> list[str]:
  """Returns the names of the total loss and its parts, also of held-out records, that any run has."""
  names = {name for rows in runs for row in rows for name, value in row.items() if _is_number(value)}
  return sorted(name for name in names if name.removeprefix("val_").partition("_")[0] == "loss")


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
  """f64[n]; the mean of each value and those before it, `window` of them at most."""
  total, count = _sums(values, window)
  return total / count


def standard_error(values: np.ndarray, window: int) -> np.ndarray:
  """f64[n], of the means that `smoothed` returns, where the values do not depend on each other; nan for a single
  one."""
  centred = values - np.median(values) if len(values) else values
  (total, count), (squares, _) = _sums(centred, window), _sums(centred**2, window)
  spread = np.maximum(squares - total**2 / count, 0.0)
  return np.sqrt(np.where(count > 1, spread, np.nan) / np.maximum(count - 1, 1) / count)


def _sums(values: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
  """Sum and number of the last `window` values at each place.

  Sums of 1, 2, 4, ... values make up a window, so that a huge value leaves no rounding error behind it.
  """
  window = min(window, len(values))
  total, block, behind, size = np.zeros(len(values)), np.array(values, np.float64), 0, 1
  while size <= window:
    if window & size:
      total[behind:] += block[: len(block) - behind]
      behind += size
    block[size:] += block[:-size].copy()
    size *= 2
  return total, np.minimum(np.arange(1, len(values) + 1), window)


def difference(first: Curve, second: Curve) -> Curve:
  """Returns the second curve minus the first, at the steps that both have."""
  steps, at_first, at_second = np.intersect1d(first.steps, second.steps, return_indices=True)
  return Curve(steps, second.values[at_second] - first.values[at_first])


class Difference(NamedTuple):
  """How two runs differ in a metric over the last steps: the mean of paired differences, and its 95 % interval."""

  step: int
  mean: float
  low: float
  high: float


def last_difference(first: Curve, second: Curve, window: int) -> Difference | None:
  """The difference over the last `window` steps that both have; None where there are none."""
  steps, values = difference(first, second)
  if not len(steps):
    return None
  mean, error = smoothed(values, window)[-1], _NORMAL * standard_error(values, window)[-1]
  return Difference(int(steps[-1]), float(mean), float(mean - error), float(mean + error))


def check_metrics(runs: Mapping[str, Sequence[Row]], metrics: Sequence[str]) -> None:
  """Checks that the metrics can be drawn.

  Raises:
    UserError: no run has a metric (the message lists those that there are), or there are too many.
  """
  if not 1 <= len(metrics) <= _MOST:
    raise UserError(f"--metric must name 1 to {_MOST} metrics, got {len(metrics)}")
  for metric in metrics:
    if not any(len(curve(rows, metric).steps) for rows in runs.values()):
      known = sorted({name for rows in runs.values() for row in rows for name in row if _is_number(row[name])})
      raise UserError(f"--metric={metric[:80]!r} is a number in no step of these runs; there are {', '.join(known)}")


def figure(runs: Mapping[str, Sequence[Row]], metrics: Sequence[str], window: int) -> Any:
  """A panel per metric with a curve per run; of two runs beside it their paired differences with a 95 % band.

  Args:
    runs: name -> its steps.
    metrics: see `check_metrics`.
    window: steps that a point of a smoothed curve is the mean of; 1 leaves them as they are.
  """
  need_extra("plots", "matplotlib")
  from matplotlib.figure import Figure

  columns = 2 if len(runs) == 2 else 1
  fig = Figure(figsize=(6.4 * columns, 0.6 + 3.0 * len(metrics)), layout="constrained")
  for metric, panels in zip(metrics, fig.subplots(len(metrics), columns, squeeze=False), strict=True):
    curves = [curve(rows, metric) for rows in runs.values()]
    for one in curves:
      _draw(panels[0], one, 1 if metric.startswith("val_") else window)  # each is a mean over all held-out records
    panels[0].set_title(_plain(metric), parse_math=False)
    if columns == 2:
      delta = difference(*curves)
      mean, error = smoothed(delta.values, window), _NORMAL * standard_error(delta.values, window)
      panels[1].axhline(0.0, color="gray", linewidth=0.8)
      panels[1].fill_between(delta.steps, mean - error, mean + error, alpha=0.25, linewidth=0, color="C2")
      _draw(panels[1], Curve(delta.steps, mean), 1, color="C2")
      panels[1].set_title(_plain(f"{metric}: second minus first"), parse_math=False)
    for panel in panels:
      panel.set_xlabel("step")
      panel.grid(alpha=0.3)
  lines = [line for line in fig.axes[0].get_lines() if line.get_alpha() is None]
  legend = fig.legend(lines, [_plain(name) for name in runs], loc="outside upper center", frameon=False)
  for text in legend.get_texts():
    text.set_parse_math(False)
  return fig


def _draw(panel: Any, one: Curve, window: int, **style: Any) -> None:
  (line,) = panel.plot(one.steps, smoothed(one.values, window), marker="o" if len(one.steps) == 1 else "", **style)
  if window > 1:
    panel.plot(one.steps, one.values, color=line.get_color(), alpha=0.25, linewidth=0.7, zorder=1)


def _plain(name: str) -> str:
  return "".join(c if c.isprintable() else "?" for c in name)


def save(fig: Any, path: pathlib.Path, form: str) -> None:
  """Writes a figure in one of FORMATS; raises OSError."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # a character that the font lacks is drawn as a box
    fig.savefig(path, format=form, dpi=120)
