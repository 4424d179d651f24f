"""The sampling settings of rectified flow."""

import dataclasses
import operator
from typing import Any

from jflow import checks, values
from jflow.errors import UserError
from jflow.generation.base import setting
from jflow.strict_json import shown

SOLVERS = ("euler", "heun", "midpoint")  # the keys of equations.SOLVERS, which imports jax
PRECISIONS = ("exact", "release")
MOST_STEPS, MOST_GUIDANCE, MOST_SHIFT = 10_000, 1e6, 1e6


@dataclasses.dataclass(frozen=True)
class Settings:
  """The sampling settings of one call; the constructor checks every value.

  Attributes:
    steps: solver steps.
    guidance: w of eq. 5: 1 follows the prompt without guidance, 0 ignores it.
    solver: a key of `equations.SOLVERS`.
    shift: of the time grid, see `equations.time_grid`.
    interval: guidance acts at these times only, in [0, 1].
    precision: "exact" (f32 state and time) or "release" (bf16 state, time and step, as the published loop).

  Raises:
    UserError: a value out of its range.
  """

  steps: int = setting(30, "solver steps, as in the paper", most=MOST_STEPS, served=(1, 200), page=(1, 100, 1))
  guidance: float = setting(
    2.0, "w of eq. 5: 1 is none, 2 the paper's for FID", most=MOST_GUIDANCE, served=(0, 1000), page=(1, 10, 0.5)
  )
  solver: str = setting("euler", "how the ODE is solved", choices=SOLVERS, page=True)
  shift: float = setting(1.0, "of the time grid; 1 is even", most=MOST_SHIFT, served=(0.01, 100))
  interval: tuple[float, float] = setting(
    (0.0, 1.0), "guidance acts at these times only", metavar=("FROM", "TO"), served=False
  )
  precision: str = setting(
    "exact", "f32 state and time, or release: bf16, as published", choices=PRECISIONS, served=False
  )

  def __post_init__(self) -> None:
    if hasattr(self.interval, "tolist"):  # NumPy's
      object.__setattr__(self, "interval", self.interval.tolist())
    checks.need("steps", self.steps, values.whole(1, MOST_STEPS))
    checks.need("guidance", self.guidance, values.number(most=MOST_GUIDANCE))
    _need(
      self.guidance >= 1 or self.guidance == 0,
      f"guidance={self.guidance} must be at least 1 (1: none), or 0 (ignore the prompt)",
    )
    _need(
      isinstance(self.solver, str) and self.solver in SOLVERS,
      f"solver={shown(self.solver)} must be one of {', '.join(SOLVERS)}",
    )
    checks.need("shift", self.shift, values.number(1 / MOST_SHIFT, MOST_SHIFT))
    _check_interval(self.interval)
    plain_types = dict(  # NumPy's whole numbers wrap around, and its arrays are no keys of a program
      steps=operator.index(self.steps),
      guidance=float(self.guidance),
      shift=float(self.shift),
      interval=tuple(map(float, self.interval)),
    )
    for name, value in plain_types.items():
      object.__setattr__(self, name, value)
    _need(
      isinstance(self.precision, str) and self.precision in PRECISIONS,
      f"precision={shown(self.precision)} must be 'exact' or 'release'",
    )
    plain = self.solver == "euler" and self.shift == 1.0
    _need(
      self.precision == "exact" or plain,
      f"precision='release' goes with solver='euler' and shift=1, not with solver={self.solver!r} and "
      f"shift={self.shift:g}: leave these, or set precision='exact'",
    )

  @property
  def evaluations(self) -> int:
    """Evaluations of the velocity for one image, guidance aside."""
    return self.steps * (1 if self.solver == "euler" else 2)


def _check_interval(interval: Any) -> None:
  two = isinstance(interval, (tuple, list)) and len(interval) == 2
  _need(two, f"interval={shown(interval)} must hold two times in [0, 1], in order")
  for time in interval:
    checks.number("interval", time)
  ordered = 0 <= interval[0] <= interval[1] <= 1
  _need(ordered, f"interval={shown(interval)} must hold two times in [0, 1], in order")


def _need(ok: bool, message: str) -> None:
  if not ok:
    raise UserError(message)
