"""Runs with adapters as training leaves them, made without training: random adapters beside given weights."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from orbax.checkpoint import v1 as ocp

from jflow.data.tokenizer import Tokenizer
from jflow.interop import native, transfer
from jflow.models import lora
from jflow.models.config import ModelConfig
from jflow.models.unified import cast_matrices
from jflow.values import path_pattern

RANK, ALPHA = 2, 6.0


def leaves(params: Mapping[str, np.ndarray], patterns: Sequence[str], seed: int) -> dict[str, np.ndarray]:
  """Adapters that change something, beside the matrices of flat parameters that patterns name."""
  rng, out = np.random.default_rng(seed), {}
  for path, x in params.items():
    if path.endswith("/kernel") and any(path_pattern(pattern).match(path) for pattern in patterns):
      place, (*stack, into, columns) = path.removesuffix("kernel"), x.shape
      out[place + "lora_a"] = rng.standard_normal((*stack, into, RANK)).astype(np.float32)
      out[place + "lora_b"] = 0.1 * rng.standard_normal((*stack, RANK, columns)).astype(np.float32)
      out[place + "lora_scale"] = np.full(stack, ALPHA / RANK, np.float32)
  return out


def save_run(
  workdir: pathlib.Path,
  config: ModelConfig,
  params: Mapping[str, Any],
  tokenizer: Tokenizer,
  patterns: Sequence[str],
  *,
  template: str = "plain",
  frozen_dtype: str = "float32",
  whole: Sequence[str] = (),
  seed: int = 0,
  sampling: Mapping[str, Any] = {},
  **data: str,
) -> pathlib.Path:
  """Writes a run at step 1: nested `params` frozen but for those of `whole`, which are trained, and adapters."""
  flat = {path: np.asarray(x) for path, x in transfer.flatten(params).items()}
  made = leaves(flat, patterns, seed)
  trained = {path: flat.pop(path) + np.float32(0.1) for path in whole}
  trained |= {path: x for path, x in made.items() if not path.endswith(lora.SCALE)}
  exact = {path: x for path, x in flat.items() if path.startswith(("vae/", "vq/"))}
  frozen = transfer.flatten(cast_matrices(transfer.nest(flat), np.dtype(frozen_dtype), config)) | exact
  frozen |= {path: x for path, x in made.items() if path.endswith(lora.SCALE)}
  own = {"rank": RANK, "alpha": ALPHA, "patterns": list(patterns), "frozen_dtype": frozen_dtype}
  values = {"model": config.to_dict(), "data": {"template": template, **data}, "lora": own, "sampling": dict(sampling)}
  tokenizer.save(workdir / "tokenizer")
  (workdir / "config.json").write_text(json.dumps(values))
  step = (workdir / "checkpoints" / "1").absolute()
  ocp.save_checkpointables(step, {"frozen": transfer.nest(frozen), "ema": transfer.nest(trained)})
  native.seal(step, {"step": 1})
  return workdir
