"""The state of a training run: what a step takes and gives, and what a checkpoint holds."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


class TrainState(struct.PyTreeNode):
  """Everything that changes from step to step, and the frozen parameters beside it."""

  step: jax.Array  # int32[]; steps done
  trained: Any  # f32 masters
  frozen: Any  # no optimizer state, no gradient, no EMA
  ema: Any  # f32, the shape of `trained`
  optimizer: Any
  skipped: jax.Array  # int32[]; steps whose gradient was not finite, since the start
  skipped_in_a_row: jax.Array  # int32[]

  @classmethod
  def create(cls, trained: Any, frozen: Any, optimizer: Any) -> "TrainState":
    zero = lambda: jnp.zeros((), jnp.int32)
    copy = jax.tree.map(lambda x: x + 0.0, trained)
    return cls(zero(), trained, frozen, copy, optimizer.init(trained), zero(), zero())
