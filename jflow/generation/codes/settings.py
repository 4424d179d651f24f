"""The sampling settings of codes."""

import dataclasses

from jflow import checks, values
from jflow.errors import UserError
from jflow.generation.base import setting
from jflow.strict_json import shown

PRECISIONS = ("exact", "release")
MOST = 1e6  # of guidance and temperature


@dataclasses.dataclass(frozen=True)
class Settings:
  """The sampling settings of one call; the constructor checks every value.

  Attributes:
    guidance: w in l = l_u + w (l_c - l_u), on logits: 1 follows the prompt without guidance, 0 ignores it.
    temperature: of the draw from all codes; 0 takes the most likely.
    precision: "exact" (logits and guidance in f32) or "release" (in bf16, as the published loop).

  Raises:
    UserError: a value out of its range.
  """

  guidance: float = setting(
    5.0, "w of the guidance on logits: 1 is none, 5 the paper's", most=MOST, served=(0, 1000), page=(1, 10, 0.5)
  )
  temperature: float = setting(
    1.0, "of each code's draw; 0: the most likely", most=MOST, served=(0, 100), page=(0, 2, 0.05)
  )
  precision: str = setting("exact", "f32 logits, or release: bf16, as published", choices=PRECISIONS, served=False)

  def __post_init__(self) -> None:
    checks.need("guidance", self.guidance, values.number(most=MOST))
    if not (self.guidance >= 1 or self.guidance == 0):
      raise UserError(f"guidance={self.guidance} must be at least 1 (1: none), or 0 (ignore the prompt)")
    checks.need("temperature", self.temperature, values.number(0.0, MOST))
    if not isinstance(self.precision, str) or self.precision not in PRECISIONS:
      raise UserError(f"precision={shown(self.precision)} must be 'exact' or 'release'")
    for name in ("guidance", "temperature"):  # NumPy's numbers are no keys of a program
      object.__setattr__(self, name, float(getattr(self, name)))
