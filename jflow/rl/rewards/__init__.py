"""Rewards of pictures; one file each.

A reward is a function (images, prompts, metadata) -> scores:

  images    uint8[N, H, W, 3], read-only: the next reward is given the same
  prompts   N texts
  metadata  N mappings, the objects of the prompts' lines
  scores    N finite numbers, the higher the better; the same for the same arguments, or a resumed run differs

An attribute `needs` may list the names that the metadata of every prompt must have, and an attribute `refuses`, a
function of the metadata of a prompt, say why it cannot be scored ("" if it can). A run names a reward by its name
here, by an import path "package.module:function", or by the address of a server (`http`).
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jflow import registry
from jflow.errors import Unscored, UserError, one_line
from jflow.rl.config import RlConfig
from jflow.rl.rewards import http

Reward = Callable[[np.ndarray, Sequence[str], Sequence[Mapping[str, Any]]], Any]

REWARDS = registry.Registry(
  "rl.rewards",
  "jflow.rewards",
  {
    "strict": "jflow.world.rewards:strict",
    "lenient": "jflow.world.rewards:lenient",
    "true": "jflow.world.rewards:true",
  },
)


@dataclasses.dataclass(frozen=True)
class Weighted:
  """A reward of a run."""

  name: str
  weight: float
  function: Reward


def opened(config: RlConfig, metadata: Sequence[Mapping[str, Any]]) -> list[Weighted]:
  """The rewards of a run, checked against its prompts.

  Raises:
    UserError: a reward that does not exist, an address that is none, or metadata that a prompt lacks or a reward
      refuses.
  """
  out = []
  for name, weight in config.rewards:
    function = _function(name, config)
    for needed in getattr(function, "needs", ()):
      without = sum(needed not in about for about in metadata)
      if without:
        raise UserError(
          f"rl.rewards: {name} needs {needed!r} beside every prompt, and {without:,} of {len(metadata):,} prompts of "
          "rl.prompts have none"
        )
    refuses = getattr(function, "refuses", None)
    for about in metadata if refuses else ():
      why = refuses(about)
      if why:
        raise UserError(f"rl.rewards: {name} cannot score {str(about.get('prompt', ''))[:60]!r}: {why}")
    out.append(Weighted(name, weight, function))
  if len({one.name for one in out}) < len(out):
    raise UserError(f"rl.rewards must name each reward once, got {', '.join(one.name for one in out)}")
  return out


def _function(name: str, config: RlConfig) -> Reward:
  if name.startswith(("http://", "https://")):
    http.check(name)
    return functools.partial(http.score, name, config.timeout, config.retries)
  if ":" not in name:
    return REWARDS.get(name)
  return registry.imported("rl.rewards", name, "a function of images, prompts and metadata")


def scores(
  rewards: Sequence[Weighted], images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> np.ndarray:
  """The scores of pictures by every reward, f32[N, R].

  Raises:
    Unscored: a reward raises, or gives another number of scores, or one that is no number or not finite.
  """
  images = images.view()
  images.flags.writeable = False
  out = np.zeros((len(images), len(rewards)), np.float32)
  for column, reward in enumerate(rewards):
    try:
      given = np.asarray(reward.function(images, prompts, copy.deepcopy(metadata)))  # it may write into its own
      if given.dtype.kind in "cmMSU":  # a cast would drop what is imaginary, or read texts
        raise TypeError(f"it must give numbers, got {given.dtype}")
      with np.errstate(over="ignore"):  # infinity, which is refused below
        given = given.astype(np.float32)
    except (Exception, SystemExit) as error:  # of the reward: whatever it raises
      raise Unscored(f"reward {reward.name} failed: {type(error).__name__}: {one_line(error, 300)}") from error
    if given.shape != (len(images),):
      raise Unscored(f"reward {reward.name} must give {len(images)} scores, got an array of shape {given.shape}")
    if not np.isfinite(given).all():
      place = int(np.flatnonzero(~np.isfinite(given))[0])
      raise Unscored(f"reward {reward.name} must give finite scores, got {given[place]} for {prompts[place][:80]!r}")
    out[:, column] = given
  return out
