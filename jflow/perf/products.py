"""bench products: what a device reaches on matrix products of a step's shapes, and on a copy."""

import dataclasses
import time
from typing import Any

from jflow.errors import UserError


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of `bench products`."""

  config: str
  rows: int = 4
  repeats: int = 10
  fields: tuple[str, ...] = ()  # "config.FIELD=VALUE"


def run(args: Settings) -> dict[str, Any]:
  """Times each product [tokens, D] x [D, F] of the LLM forward and by its weights, in bf16 and fp8, and a copy."""
  import jax
  import jax.numpy as jnp

  from jflow import chips
  from jflow.perf.train import load

  if args.repeats < 1:
    raise UserError("--repeats must be at least 1")
  config, device = load(args.config, args.fields, args.rows), jax.devices()[0]
  lm, tokens = config.model.language_model, args.rows * config.data.row_tokens
  square = 8192 if device.platform != "cpu" else 256
  sizes = {
    "square": (square, square, square),
    "attention": (tokens, lm.embed_dim, lm.num_heads * lm.head_dim),
    "mlp": (tokens, lm.embed_dim, lm.mlp_dim),
    "mlp_weights": (lm.embed_dim, tokens, lm.mlp_dim),
  }
  dtypes = {"bfloat16": jnp.bfloat16}
  if device.platform == "gpu":
    dtypes["float8_e4m3fn"] = jnp.float8_e4m3fn
  out: dict[str, Any] = {"workload": "products", "device": device.device_kind, "tokens": tokens}
  peak, keys = chips.peak_flops(device.device_kind), jax.random.split(jax.random.key(0))
  for name, dtype in dtypes.items():
    for shape, (m, k, n) in sizes.items():
      a, b = (jax.random.normal(key, s).astype(dtype) for key, s in zip(keys, ((m, k), (k, n))))
      product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.bfloat16))
      seconds = _fastest(product, (a, b), args.repeats)
      out[f"{name}_{shape}"] = {
        "flops_per_second": 2 * m * k * n / seconds,
        "of_peak": peak and 2 * m * k * n / seconds / peak,
      }
  x = jax.random.normal(keys[0], (tokens, lm.embed_dim))
  out["copy_bytes_per_second"] = 2 * x.nbytes / _fastest(jax.jit(lambda x: x + 1.0), (x,), args.repeats)
  return out


def _fastest(function: Any, args: tuple[Any, ...], repeats: int) -> float:
  """Seconds of a call, the least of three runs of `repeats` calls, after one that compiles."""
  import jax

  jax.block_until_ready(function(*args))
  runs = []
  for _ in range(3):
    started = time.perf_counter()
    for _ in range(repeats):
      result = function(*args)
    jax.block_until_ready(result)
    runs.append((time.perf_counter() - started) / repeats)
  return min(runs)
