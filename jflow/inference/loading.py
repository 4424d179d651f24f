"""`jflow.load`: opens an official or a jflow checkpoint directory for inference."""

import pathlib

import jax
import jax.numpy as jnp

from jflow.data import templates
from jflow.errors import UserError
from jflow.inference.pipeline import Pipeline
from jflow.interop.checkpoints import describe
from jflow.models.unified import UnifiedModel, cast_for_inference


def load(
  path: str | pathlib.Path,
  *,
  vae: str | pathlib.Path | None = None,
  dtype: str | None = None,
  weights: str = "ema",
  template: str | None = None,
) -> Pipeline:
  """Opens a checkpoint and returns a `Pipeline` with `generate` and `understand`.

  Args:
    path: an official directory (config.json and safetensors, no conversion needed) or a jflow one: a workdir,
      its checkpoints/ folder or one step; or the name of either on the Hugging Face hub, ORG/NAME or ORG/NAME@REVISION; or
      "world", the small model of the built-in world that comes with jflow.
    vae: directory of the SDXL-VAE, for a checkpoint without one; without a VAE the model can answer but not generate.
    dtype: compute dtype, "float32" or "bfloat16"; default: float32 on a CPU, bfloat16 elsewhere.
    weights: "ema" or "raw", for a checkpoint of jflow's own training.
    template: of turns, in place of the checkpoint's: "plain", "chat" or "pro", see `data.templates`. A published Janus does
      not name its own: "pro" is assumed where the tokenizer has the speakers of Janus-Pro.

  Raises:
    UserError: a file is missing or wrong, in one line.
  """
  if dtype not in (None, "float32", "bfloat16"):
    raise UserError(f"dtype={dtype!r} must be 'float32' or 'bfloat16'")
  if weights not in ("ema", "raw"):
    raise UserError(f"weights={weights!r} must be 'ema' or 'raw'")
  if template is not None:
    templates.check(template)
  found = describe(path, vae=vae, weights=weights, tokenizer=True)
  if template is not None:
    templates.check(template, found.tokenizer)
  compute = jnp.dtype(dtype or usual_dtype())
  model = UnifiedModel(found.config, compute, remat="none", unroll=1, attention="xla")
  params = found.read_params()
  cast_for_inference(params, compute)
  return Pipeline(model, params, found.tokenizer, template or found.template, found.has_vae)


def usual_dtype() -> str:
  """The default compute dtype: "float32" on a CPU, "bfloat16" elsewhere."""
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"
