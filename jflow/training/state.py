"""The state of a training run, which a step updates and a checkpoint holds."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jflow.training.best import Best
from jflow.training.spikes import Recent


class TrainState(struct.PyTreeNode):
  """Everything that changes from step to step, and the frozen parameters beside it."""

  step: jax.Array  # int32[]; steps done
  trained: Any  # f32 masters
  frozen: Any  # no optimizer state, no gradient, no EMA
  ema: Any  # f32, the shape of `trained`; {} without an average
  optimizer: Any
  skipped: jax.Array  # int32[]; steps skipped since the start: not finite, or a spike
  skipped_in_a_row: jax.Array  # int32[]
  recent: Recent | None  # recent values for the guard against spikes; None: no guard
  best: Best | None  # of the held-out records; None: there are none
  reference: Any = None  # the trained parameters of step 0, where reinforcement learning keeps close to them

  @property
  def averaged(self) -> Any:
    """The weights for inference and the next stage: the averaged weights, or the trained ones where there is no
    average."""
    return self.ema or self.trained

  @classmethod
  def create(
    cls,
    trained: Any,
    frozen: Any,
    optimizer: Any,
    spike_window: int = 0,
    average: bool = True,
    validated: bool = False,
    referred: bool = False,
  ) -> "TrainState":
    """Returns the state of step 0.

    Args:
      trained: parameters.
      frozen: parameters.
      optimizer: an `optax.GradientTransformation`.
      spike_window: number of steps that the guard against spikes keeps; 0: no guard.
      average: whether the trained weights have an average.
      validated: whether the run has held-out records.
      referred: whether it holds a copy of `trained` as `reference`.
    """
    zero = lambda: jnp.zeros((), jnp.int32)
    copy = lambda: jax.tree.map(lambda x: x + 0.0, trained)
    recent = Recent.empty(spike_window) if spike_window else None
    best = Best.none() if validated else None
    return cls(
      zero(),
      trained,
      frozen,
      copy() if average else {},
      optimizer.init(trained),
      zero(),
      zero(),
      recent,
      best,
      copy() if referred else None,
    )
