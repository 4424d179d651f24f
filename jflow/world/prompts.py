"""Prompts of the world with the metadata that the judge needs, and pairs of pictures, for learning from preferences."""

import random
from collections.abc import Mapping
from typing import Any

from jflow.errors import UserError
from jflow.world import scenes, source
from jflow.world.scenes import DEFAULT_TAGS, TAGS

_EACH = 240  # prompts of a kind; those of a small kind repeat


def for_rewards(shapes: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
  """The prompts of training's combinations of the kinds that `shapes["tags"]` names, as many of each; none held out.

  Args:
    shapes: the section data.shapes of a config; None as its tags stands for all kinds.

  Raises:
    UserError: it names no kind that a prompt can describe.
  """
  tags = _tags(shapes)
  return source.evaluation_prompts("train", _EACH * len(tags), shapes["seed"], tags)


def pairs(shapes: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
  """Prompts as `for_rewards`, each with a true scene as "better" and one of another prompt of its kind as "worse"."""
  rng, out = random.Random(f"{shapes['seed']}/pairs"), []
  for tag in (tag for tag in _tags(shapes) for _ in range(_EACH)):
    better, combination = scenes.sample(tag, "train", rng, shapes["large"], shapes["spread"])
    worse, other = scenes.sample(tag, "train", rng, shapes["large"], shapes["spread"])
    while other == combination:
      worse, other = scenes.sample(tag, "train", rng, shapes["large"], shapes["spread"])
    out.append((source.prompt(combination)[0], {"better": better, "worse": worse}))
  return out


def _tags(shapes: Mapping[str, Any]) -> list[str]:
  named = DEFAULT_TAGS if shapes["tags"] is None else shapes["tags"]
  tags = [tag for tag in TAGS if named.get(tag)]
  if not tags:
    raise UserError(f"data.shapes.tags must give one of {', '.join(TAGS)} a share above 0, got {dict(named)}")
  return tags
