"""AdamW with linear warm-up and a constant rate; EMA, and freezing by pattern (paper table 1).

Not in the paper: a cool-down, Muon for matrices that patterns name, and rates by part.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax.traverse_util import flatten_dict, unflatten_dict

from jflow.config import OptimizerConfig
from jflow.errors import UserError
from jflow.models import lora
from jflow.values import path_pattern

Params = dict[str, Any]


def partition(params: Params, trained: Iterable[str], frozen: Iterable[str]) -> tuple[Params, Params]:
  """Cuts a nested tree of parameters into (trained, frozen) by patterns.

  A pattern is a regular expression that must match the beginning of a parameter's path
  ("language_model/layers/mlp/up/kernel") up to a "/" or its end. Every parameter must match exactly one of
  the two lists, and every pattern at least one parameter. Adapters need no pattern: they are trained, their scales and
  the matrices beside them frozen.

  Raises:
    UserError: a parameter that matches neither or both, a pattern that matches nothing or is invalid, a matrix that is
      trained beside its adapter.
  """
  flat = flatten_dict(params, sep="/")
  lists = {"trained": tuple(trained), "frozen": tuple(frozen)}
  compiled = {(name, p): _compiled(name, p) for name, patterns in lists.items() for p in patterns}
  out: dict[str, dict[str, Any]] = {"trained": {}, "frozen": {}}
  used = set()
  for path, value in flat.items():
    if lora.is_adapter(path):
      out["frozen" if path.endswith(lora.SCALE) else "trained"][path] = value
      continue
    hits = [key for key, pattern in compiled.items() if pattern.match(path)]
    used.update(hits)
    names = {name for name, _ in hits}
    if len(names) != 1:
      which, word = ("both", "and") if names else ("neither", "nor")
      which = f"{which} optimizer.trained {word} optimizer.frozen"
      raise UserError(f"parameter {path} matches {which}; every parameter must match exactly one")
    which = names.pop()
    if which == "trained" and path.endswith("/kernel") and path.removesuffix("kernel") + lora.SCALE in flat:
      raise UserError(
        f"config.lora.patterns names {path}, which optimizer.trained trains: it must be in optimizer.frozen"
      )
    out[which][path] = value
  for name, patterns in lists.items():
    for p in patterns:
      if (name, p) not in used:
        top = sorted({path.split("/")[0] for path in flat})
        raise UserError(f"optimizer.{name} pattern {p!r} matches no parameter; parts are {', '.join(top)}")
  return unflatten_dict(out["trained"], sep="/"), unflatten_dict(out["frozen"], sep="/")


def _compiled(field: str, pattern: str) -> re.Pattern[str]:
  """Compiles a pattern of parameter paths, see `partition`; raises UserError for an invalid regular expression."""
  try:
    return path_pattern(pattern)
  except re.error as error:
    raise UserError(f"optimizer.{field} pattern {pattern!r} is not a regular expression: {error}") from None


def merge(first: Params, second: Params) -> Params:
  """The inverse of `partition`."""
  return unflatten_dict({**flatten_dict(first), **flatten_dict(second)})


def schedule(config: OptimizerConfig) -> optax.Schedule:
  """Learning rate by step: linear to `learning_rate` in the warm-up, constant, to 0 in the cool-down by its shape.

  The first step has a rate above 0, and so has the last of the cool-down; after it the rate is 0.
  `config` is the section `optimizer`.
  """
  warmup, cooldown = max(config.warmup_steps, 1), config.cooldown_steps
  end = config.cooldown_start + cooldown

  def rate(step):
    share = jnp.minimum(1.0, (step + 1) / warmup)
    if cooldown:
      left = jnp.maximum(0.0, (end - step) / cooldown)
      if config.cooldown_shape == "cosine":
        left = 0.5 - 0.5 * jnp.cos(jnp.pi * jnp.minimum(left, 1.0))
      share = jnp.minimum(share, left)
    return config.learning_rate * share

  return rate


# The run's rate, a function of the step -> what updates with it, as `optax.lion`.
Rule = Callable[[optax.Schedule], optax.GradientTransformation]


def make_optimizer(config: OptimizerConfig, rule: Rule | None = None) -> optax.GradientTransformation:
  """AdamW after clipping by global norm, or where `muon` names matrices, Muon for them and NAdamW for the rest.

  `config` is the section `optimizer`; its `beta1` and `beta2` do not apply to Muon, whose momentum is optax's 0.95.
  A `rule` replaces AdamW, see `check_rule`. `rates` multiply the updates, and so the weight decay, as a rate does.
  Muon's updates are scaled to the root mean square of AdamW's, 0.2 of the rate (https://arxiv.org/abs/2502.16982), so
  that one rate serves both.
  """
  rate, decay = schedule(config), config.weight_decay
  if rule:
    optimizer = rule(rate)
  elif config.muon:
    optimizer = optax.contrib.muon(
      rate,
      eps=config.epsilon,
      weight_decay=decay,
      adam_b1=config.beta1,
      adam_b2=config.beta2,
      adam_weight_decay=decay,
      muon_weight_dimension_numbers=lambda params: muon_axes(cast("Params", params), config.muon),
      consistent_rms=0.2,
    )
  else:
    optimizer = optax.adamw(rate, b1=config.beta1, b2=config.beta2, eps=config.epsilon, weight_decay=decay)
  whole = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
  return _scaled(whole, config.rates) if config.rates else whole


def _scaled(
  optimizer: optax.GradientTransformation, rates: Iterable[tuple[str, float]]
) -> optax.GradientTransformation:
  """An optimizer whose updates are multiplied by part; the state is the optimizer's own."""
  rates = tuple(rates)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    updates, state = optimizer.update(updates, state, params)
    flat: dict[str, Any] = flatten_dict(updates, sep="/")
    factors = rate_factors(flat, rates)
    return unflatten_dict({path: x * factors.get(path, 1.0) for path, x in flat.items()}, sep="/"), state

  return optax.GradientTransformation(optimizer.init, update)


def rate_factors(paths: Iterable[str], rates: Iterable[tuple[str, float]]) -> dict[str, float]:
  """The factor of each trained parameter that a pattern of `rates` names, see `partition`.

  Args:
    paths: of the trained parameters.
    rates: (pattern, factor) pairs.

  Raises:
    UserError: a pattern that matches no trained parameter, or a parameter that two match.
  """
  paths, found = tuple(paths), {}
  for pattern, factor in rates:
    compiled = _compiled("rates", pattern)
    hits = [path for path in paths if compiled.match(path)]
    if not hits:
      parts = ", ".join(sorted({path.split("/")[0] for path in paths}))
      raise UserError(f"optimizer.rates pattern {pattern!r} matches no trained parameter; trained are {parts}")
    if twice := [path for path in hits if path in found]:
      raise UserError(f"optimizer.rates pattern {pattern!r} matches {twice[0]}, which another pattern matches too")
    found |= dict.fromkeys(hits, factor)
  return found


def check_rule(config: OptimizerConfig, rule: Rule | None) -> None:
  """Checks that the config asks for nothing that a rule of one's own does not read.

  Raises:
    UserError: it has a weight decay or names matrices for Muon.
  """
  for name in ("weight_decay", "muon"):
    if rule and (value := getattr(config, name)):
      raise UserError(
        f"optimizer.{name}={value!r} must be {type(value)()!r} with an update rule of your own, which says it itself"
      )


def muon_axes(params: Params, patterns: Iterable[str]) -> Params:
  """The tree of `params` with (rows, columns) of every matrix that Muon updates, and None for the others.

  A matrix is a parameter named "kernel" of two axes, or of three where the first counts layers, each a matrix of its
  own. Its path matches a pattern, see `partition`.
  """
  compiled = [_compiled("muon", pattern) for pattern in patterns]

  def axes(path: tuple[str, ...], value: Any) -> optax.contrib.MuonDimensionNumbers | None:
    ranks = [len(leaf.shape) for leaf in jax.tree.leaves(value)]  # missing where optax has masked a parameter
    if path[-1] == "kernel" and ranks in ([2], [3]) and any(p.match("/".join(path)) for p in compiled):
      return optax.contrib.MuonDimensionNumbers(ranks[0] - 2, ranks[0] - 1)
    return None

  return unflatten_dict({path: axes(path, value) for path, value in flatten_dict(params).items()})


def check_muon(params: Params, patterns: Iterable[str]) -> None:
  """Raises UserError for a pattern that matches no matrix of `params`, or is invalid.

  A matrix may be frozen: one list serves all stages.
  """
  for pattern in patterns:
    if not any(flatten_dict(muon_axes(params, (pattern,))).values()):
      raise UserError(
        f"optimizer.muon pattern {pattern!r} matches no parameter named kernel with 2 or 3 axes; parts are "
        f"{', '.join(sorted(params))}"
      )


def update_ema(ema: Params, params: Params, decay: float) -> Params:
  """ema <- decay * ema + (1 - decay) * params, in f32."""
  return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)
