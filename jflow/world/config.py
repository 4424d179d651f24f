"""The world's sections of a run config: `data.shapes`, the options of its source, and `world`, the start of stage 0."""

from jflow.config import RunConfig, constraint
from jflow.sections import Section, field
from jflow.values import MOST, number, text, weighted, whole


class ShapesConfig(Section):
  """Options of `WorldSource`."""

  size: int = field(whole(1, 10**8))
  seed: int = field(whole(-MOST, 2**63 - 1))
  split: str = field(text)
  tags: dict | None = field(number(0.0), before=None)
  long_captions: float = field(number(0.0, 1.0), before=0.25)
  named_colors: float = field(number(0.0, 1.0), before=0.0)
  in_order: float = field(number(0.0, 1.0), before=0.0)
  large: float = field(number(0.0, 1.0), before=0.5)
  spread: float = field(number(0.0, 0.5), before=0.5)
  asked: tuple = field(weighted("(kind of question, weight) pairs, as (('relation', 4.0),)"), before=())


class WorldConfig(Section):
  """Fits of `jflow.world.start` before the first step of fresh parameters."""

  fit_labels: int = field(whole(0, 10**7, "; 0 leaves SigLIP fresh"), before=0)
  fit_images: int = field(whole(1, 10**6))


@constraint("world.fit_labels")
def _only_a_fresh_siglip_is_fitted(c: RunConfig) -> str:
  if not c.world.fit_labels:
    return ""
  if c.model.reader.kind != "siglip":
    return "must be 0 with another model.reader.kind than 'siglip'"
  if c.lora.rank:
    return f"must be 0 with lora.rank={c.lora.rank}, whose adapters belong to weights that are there"
  return "must be 0 with train.init_from, whose SigLIP is not fresh" if c.train.init_from else ""
