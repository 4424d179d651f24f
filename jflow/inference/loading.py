"""`jflow.load`: opens an official or a jflow checkpoint directory for inference."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from flax.traverse_util import flatten_dict

from jflow import sharding
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.inference.pipeline import Pipeline
from jflow.interop.checkpoints import read_checkpoint
from jflow.models.janusflow import JanusFlow
from jflow.training.setup import initial_params

# May be missing: heads that serve training only, and the VAE, which `Pipeline.generate` asks for.
_NOT_NEEDED = ("vae/", "alignment_head/")


def load(
  path: str | pathlib.Path,
  *,
  vae: str | pathlib.Path | None = None,
  dtype: str | None = None,
  weights: str = "ema",
) -> Pipeline:
  """Opens a checkpoint and returns a `Pipeline` with `generate` and `understand`.

  Args:
    path: an official directory (config.json and safetensors, no conversion needed) or a jflow one: a workdir,
      its checkpoints/ folder or one step.
    vae: directory of the SDXL-VAE, for a checkpoint that holds none; without one it can only answer.
    dtype: compute dtype, "float32" or "bfloat16"; default: float32 on a CPU, bfloat16 elsewhere.
    weights: "ema" or "raw", for a checkpoint of jflow's own training.

  Raises:
    UserError: what is missing or wrong, in one line.
  """
  if dtype not in (None, "float32", "bfloat16"):
    raise UserError(f"dtype={dtype!r} must be 'float32' or 'bfloat16'")
  if weights not in ("ema", "raw"):
    raise UserError(f"weights={weights!r} must be 'ema' or 'raw'")
  found = read_checkpoint(path, vae=vae, weights=weights)
  tokenizer = Tokenizer.load(found.tokenizer)
  tokenizer.check_fits(found.config.language_model.vocabulary_size)
  compute = jnp.dtype(dtype or usual_dtype())
  model = JanusFlow(found.config, compute, remat="none", unroll=1, attention="xla")
  _check_params(path, model, found.params)
  return Pipeline(model, found.params, tokenizer, found.template, found.has_vae)


def usual_dtype() -> str:
  """What is computed in where nothing else is asked for: "float32" on a CPU, "bfloat16" elsewhere."""
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _check_params(path: str | pathlib.Path, model: JanusFlow, params: Any) -> None:
  """Compares names and shapes of the parameters with what config.json describes."""
  present = flatten_dict(params, sep="/")
  wanted = flatten_dict(sharding.unbox(jax.eval_shape(lambda: initial_params(model, 0))), sep="/")
  for name, want in wanted.items():
    if name not in present and not name.startswith(_NOT_NEEDED):
      raise UserError(f"checkpoint {path} lacks {name}, which its config.json asks for: another model?")
    if name in present and present[name].shape != want.shape:
      shape = tuple(present[name].shape)
      raise UserError(
        f"checkpoint {path}: {name} has shape {shape}, its config.json asks for {want.shape}: another model?"
      )
