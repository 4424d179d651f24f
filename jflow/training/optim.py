"""AdamW with linear warm-up, a constant rate and, if asked for, a cool-down; EMA, and freezing by pattern (001 table 1)."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from jflow.errors import UserError

Params = dict[str, Any]


def partition(params: Params, trained: Iterable[str], frozen: Iterable[str]) -> tuple[Params, Params]:
  """Cuts a nested tree of parameters into (trained, frozen) by patterns.

  A pattern is a regular expression that must match the beginning of a parameter's path
  ("language_model/layers/mlp/up/kernel") up to a "/" or its end. Every parameter must match exactly one of
  the two lists, and every pattern at least one parameter.

  Raises:
    UserError: a parameter that matches neither or both, a pattern that matches nothing or is none.
  """
  flat = flatten_dict(params, sep="/")
  lists = {"trained": tuple(trained), "frozen": tuple(frozen)}
  compiled = {}
  for name, patterns in lists.items():
    for p in patterns:
      try:
        compiled[name, p] = re.compile(f"(?:{p})(?:/|$)")
      except re.error as error:
        raise UserError(f"optimizer.{name} pattern {p!r} is not a regular expression: {error}") from None
  out: dict[str, dict[str, Any]] = {"trained": {}, "frozen": {}}
  used = set()
  for path, value in flat.items():
    hits = [key for key, pattern in compiled.items() if pattern.match(path)]
    used.update(hits)
    names = {name for name, _ in hits}
    if len(names) != 1:
      which, word = ("both", "and") if names else ("neither", "nor")
      which = f"{which} optimizer.trained {word} optimizer.frozen"
      raise UserError(f"parameter {path} matches {which}; every parameter must match exactly one")
    out[names.pop()][path] = value
  for name, patterns in lists.items():
    for p in patterns:
      if (name, p) not in used:
        top = sorted({path.split("/")[0] for path in flat})
        raise UserError(f"optimizer.{name} pattern {p!r} matches no parameter; parts are {', '.join(top)}")
  return unflatten_dict(out["trained"], sep="/"), unflatten_dict(out["frozen"], sep="/")


def merge(first: Params, second: Params) -> Params:
  """The inverse of `partition`."""
  return unflatten_dict({**flatten_dict(first), **flatten_dict(second)})


def schedule(config: Mapping[str, Any]) -> optax.Schedule:
  """Rate of step 0, 1, ...: linear to `learning_rate` in the warm-up, constant, linear to 0 in the cool-down.

  The first step moves, and so does the last of the cool-down; behind it the rate is 0.
  `config` is the section `optimizer` of configs/base.py.
  """
  warmup, cooldown = max(config["warmup_steps"], 1), config["cooldown_steps"]
  end = config["cooldown_start"] + cooldown

  def rate(step):
    share = jnp.minimum(1.0, (step + 1) / warmup)
    if cooldown:
      share = jnp.minimum(share, jnp.maximum(0.0, (end - step) / cooldown))
    return config["learning_rate"] * share

  return rate


def make_optimizer(config: Mapping[str, Any]) -> optax.GradientTransformation:
  """AdamW after clipping by global norm. `config` is the section `optimizer` of configs/base.py."""
  return optax.chain(
    optax.clip_by_global_norm(config["clip_norm"]),
    optax.adamw(
      schedule(config),
      b1=config["beta1"],
      b2=config["beta2"],
      eps=config["epsilon"],
      weight_decay=config["weight_decay"],
    ),
  )


def update_ema(ema: Params, params: Params, decay: float) -> Params:
  """ema <- decay * ema + (1 - decay) * params, in f32."""
  return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)
