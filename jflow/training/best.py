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
from jflow.training import hosts


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


def found(best: Best | None, workdir: pathlib.Path) -> Best | None:
  """The best as a state holds it, or none where its step is not kept: a run without patience keeps no such step.

  Nothing is waited for then, and the next loss is the best. All processes call it, and get the same.
  """
  if best is None or hosts.from_first([_is_sealed(workdir, int(best.step))])[0]:
    return best
  return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), Best.none(), best)


def _is_sealed(workdir: pathlib.Path, step: int) -> bool:
  return step > 0 and (workdir / "checkpoints" / str(step) / MANIFEST).exists()


def told(best: Best | None, patience: int, workdir: pathlib.Path) -> str:
  """The end of a message that names the best step of a run that stops early; "" for another run, or without the
  step."""
  if best is None or not patience or not _is_sealed(workdir, int(best.step)):
    return ""
  return f": held-out records had their lowest loss, {float(best.loss):.4f}, at step {int(best.step)}, which is loaded"


def write(workdir: pathlib.Path, best: Best | None) -> None:
  """Writes best.json of a run that stops early, or removes it: `best` is None, or its step was not kept."""
  if best is None or not _is_sealed(workdir, int(best.step)):
    with contextlib.suppress(FileNotFoundError):
      (workdir / FILE).unlink()
    return
  files.write_text(workdir / FILE, json.dumps({"step": int(best.step), "val_loss": float(best.loss)}) + "\n")
