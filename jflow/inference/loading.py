"""`jflow.load`: opens an official or a jflow checkpoint directory for inference."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jflow.data import templates
from jflow.errors import UserError
from jflow.inference.pipeline import Pipeline
from jflow.interop import adapters as adapter_folders
from jflow.interop import transfer
from jflow.interop.checkpoints import Described, describe
from jflow.models.unified import UnifiedModel, cast_for_inference


def load(
  path: str | pathlib.Path,
  *,
  vae: str | pathlib.Path | None = None,
  dtype: str | None = None,
  weights: str = "ema",
  template: str | None = None,
  adapter: str | pathlib.Path | None = None,
) -> Pipeline:
  """Opens a checkpoint and returns a `Pipeline` with `generate` and `understand`.

  Args:
    path: an official directory (config.json and safetensors, no conversion needed) or a jflow one: a workdir,
      its checkpoints/ folder or one step; or the name of either on the Hugging Face hub, ORG/NAME or ORG/NAME@REVISION;
      or "world" or "world-codes", the small models of the built-in world that come with jflow.
    vae: directory of the SDXL-VAE, for a checkpoint without one; without a VAE the model can answer but not generate.
    dtype: compute dtype, "float32" or "bfloat16"; default: float32 on a CPU, bfloat16 elsewhere.
    weights: "ema" or "raw", for a checkpoint of jflow's own training.
    template: of turns, in place of the adapter's and the checkpoint's: "plain", "chat" or "pro", see `data.templates`.
      A published Janus does not name its own: "pro" is assumed where the tokenizer has the speakers of Janus-Pro.
    adapter: folder, or name on the hub, of an adapter of this checkpoint, which is merged into it: one that `convert
      --adapter` wrote, or one in PEFT's format over transformers' names.

  Raises:
    UserError: a file is missing or wrong, in one line.
  """
  _check(dtype)
  found = described(path, vae=vae, weights=weights, template=template, adapter=adapter)
  compute, params = jnp.dtype(dtype or usual_dtype()), found.read_params()
  cast_for_inference(params, compute, found.config)
  return Pipeline(
    _model(found, compute), params, found.tokenizer, found.template, found.has_vae, sampling=found.sampling
  )


def load_with_adapters(
  path: str | pathlib.Path,
  adapters: Mapping[str, str | pathlib.Path],
  *,
  vae: str | pathlib.Path | None = None,
  dtype: str | None = None,
  weights: str = "ema",
  template: str | None = None,
) -> tuple[Pipeline, dict[str, Pipeline]]:
  """Opens a checkpoint, and once more with each adapter merged; see `load`.

  Args:
    adapters: name -> folder.

  Returns:
    (the base, name -> its model). On the device each has the matrices that its adapter changes for itself, and shares
    all others with the base.

  Raises:
    UserError: see `load`.
  """
  _check(dtype)
  found = described(path, vae=vae, weights=weights, template=template)
  given = {name: adapter_folders.describe(folder, found.config) for name, folder in adapters.items()}
  usual = {name: adapter_folders.template_of(adapter, found) for name, adapter in given.items()}
  compute = jnp.dtype(dtype or usual_dtype())
  model, params, changed = _model(found, compute), found.read_params(), {}
  for name, adapter in given.items():  # from the numbers of the files, before they are cast
    nested = transfer.nest(adapter_folders.changed(params, found.config, adapter))
    cast_for_inference(nested, compute, found.config)
    changed[name] = transfer.flatten(nested)
  cast_for_inference(params, compute, found.config)
  base = Pipeline(model, params, found.tokenizer, found.template, found.has_vae, sampling=found.sampling)
  flat = transfer.flatten(params)
  opened = lambda name, own: Pipeline(
    model,
    transfer.nest(flat | own),
    found.tokenizer,
    template or usual[name],
    found.has_vae,
    sampling=adapter_folders.sampling_of(given[name], found.sampling),
    beside=base,
  )
  return base, {name: opened(name, own) for name, own in changed.items()}


def described(
  path: str | pathlib.Path,
  *,
  vae: str | pathlib.Path | None = None,
  weights: str = "ema",
  template: str | None = None,
  adapter: str | pathlib.Path | None = None,
) -> Described:
  """A checkpoint with its tokenizer and template, whose weights, not yet read, have the adapter merged.

  Arguments as of `load`.

  Raises:
    UserError: as `load`.
  """
  if not isinstance(path, str | pathlib.Path):
    raise UserError(f"a checkpoint must be named by its folder or hub name, got {path!r:.80}")
  if not isinstance(adapter, str | pathlib.Path | None):
    raise UserError(f"an adapter must be named by its folder or hub name, got {adapter!r:.80}")
  if weights not in ("ema", "raw"):
    raise UserError(f"weights={weights!r} must be 'ema' or 'raw'")
  if template is not None:
    templates.check(template)
  found = describe(path, vae=vae, weights=weights, tokenizer=True)
  if template is not None:
    templates.check(template, found.tokenizer)
  if adapter is None:
    return found._replace(template=template or found.template)
  beside = adapter_folders.describe(adapter, found.config)
  usual = adapter_folders.template_of(beside, found)

  def merged() -> dict[str, Any]:
    params = found.read_params()
    return transfer.nest(transfer.flatten(params) | adapter_folders.changed(params, found.config, beside))

  sampling = adapter_folders.sampling_of(beside, found.sampling)
  return found._replace(template=template or usual, read_params=merged, sampling=sampling)


def _check(dtype: str | None) -> None:
  if dtype not in (None, "float32", "bfloat16"):
    raise UserError(f"dtype={dtype!r} must be 'float32' or 'bfloat16'")


def _model(found: Described, compute: Any) -> UnifiedModel:
  return UnifiedModel(found.config, compute, remat="none", unroll=1, attention="xla")


def usual_dtype() -> str:
  """The default compute dtype: "float32" on a CPU, "bfloat16" elsewhere."""
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"
