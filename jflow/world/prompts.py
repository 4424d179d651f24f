"""Prompts of the world with the metadata that the judge needs, and pairs of pictures, for learning from preferences."""

import random
from collections.abc import Mapping
from typing import Any

from jflow.errors import UserError
from jflow.world import scenes, source
from jflow.world.scenes import DEFAULT_TAGS, TAGS

_EACH = 240  # prompts of a kind on average; those of a small kind repeat


def for_rewards(shapes: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
  """The prompts of training's combinations of the kinds that `shapes["tags"]` names, in their shares; none held out.

  Args:
    shapes: the section data.shapes of a config; None as its tags stands for `scenes.DEFAULT_TAGS`, as in training.

  Raises:
    UserError: it names no kind that a prompt can describe.
  """
  shares = _shares(shapes)
  whole = sum(shares.values())
  return [
    one
    for tag, share in shares.items()
    for one in source.evaluation_prompts(
      "train", max(1, round(_EACH * len(shares) * share / whole)), shapes["seed"], [tag]
    )
  ]


def pairs(shapes: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
  """As many prompts of each kind, each with a true scene as "better", one of another prompt of its kind as "worse"."""
  rng, out = random.Random(f"{shapes['seed']}/pairs"), []
  for tag in (tag for tag in _shares(shapes) for _ in range(_EACH)):
    better, combination = scenes.sample(tag, "train", rng, shapes["large"], shapes["spread"])
    worse, other = scenes.sample(tag, "train", rng, shapes["large"], shapes["spread"])
    while other == combination:
      worse, other = scenes.sample(tag, "train", rng, shapes["large"], shapes["spread"])
    out.append((source.prompt(combination)[0], {"better": better, "worse": worse}))
  return out


def _shares(shapes: Mapping[str, Any]) -> dict[str, float]:
  """Kind of prompts -> share, above 0."""
  named = DEFAULT_TAGS if shapes["tags"] is None else shapes["tags"]
  shares = {tag: float(named[tag]) for tag in TAGS if named.get(tag, 0) > 0}
  if not shares:
    raise UserError(f"data.shapes.tags must give one of {', '.join(TAGS)} a share above 0, got {dict(named)}")
  return shares
