"""The best loss of held-out records so far, part of the state, so that a resumed run makes the same decisions.

WORKDIR/best.json names the step for those that load the run: only a run with `train.early_stop` has one.
"""

import contextlib
import json
import pathlib

import jax
import jax.numpy as jnp
from flax import struct

from jflow import files
from jflow.interop.best import FILE
from jflow.interop.steps import MANIFEST


class Best(struct.PyTreeNode):
  """The step with the lowest loss of held-out records."""

  loss: jax.Array  # f32[]; infinite before the first
  step: jax.Array  # int32[]
  waited: jax.Array  # int32[]; losses since then, none of them lower

  @classmethod
  def none(cls) -> "Best":
    return cls(jnp.full((), jnp.inf, jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

  def judged(self, loss: jax.Array, step: jax.Array) -> "Best":
    """Returns the best after the loss of another step; one that is not finite is never better."""
    better = loss < self.loss
    choose = lambda new, old: jnp.where(better, new, old)
    return Best(choose(loss, self.loss), choose(step, self.step), choose(0, self.waited + 1))


def is_over(best: Best | None, patience: int) -> bool:
  """Whether the loss has not been lower for `patience` times; 0: never."""
  return best is not None and 0 < patience <= int(best.waited)


def is_kept(best: Best | None, patience: int, step: int) -> bool:
  """Whether a run that stops early keeps this step, the best so far."""
  return best is not None and patience > 0 and int(best.step) == step


def told(best: Best | None, patience: int) -> str:
  """The end of a message that names the best step of a run that stops early; "" for another run."""
  if best is None or not patience or not int(best.step):
    return ""
  return f": held-out records had their lowest loss, {float(best.loss):.4f}, at step {int(best.step)}, which is loaded"


def write(workdir: pathlib.Path, best: Best | None) -> None:
  """Writes best.json of a run that stops early, or removes it: `best` is None, or its step was not kept."""
  if best is None or not (workdir / "checkpoints" / str(int(best.step)) / MANIFEST).exists():
    with contextlib.suppress(FileNotFoundError):
      (workdir / FILE).unlink()
    return
  files.write_text(workdir / FILE, json.dumps({"step": int(best.step), "val_loss": float(best.loss)}) + "\n")
