"""bench products: what a device reaches on matrix products of a step's shapes, and on a copy."""

import dataclasses
import functools
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
  """Times each product [tokens, D] x [D, F] of the LLM forward and by its weights, in bf16 and fp8, and a copy.

  Of fp8 both kinds: e4m3 forward, and with one side in e5m2, as in the products of gradients, which add up in f32.
  """
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
  kinds = {"bfloat16": (jnp.bfloat16, jnp.bfloat16, None)}
  if device.platform == "gpu":
    kinds["float8_e4m3fn"] = (jnp.float8_e4m3fn, jnp.float8_e4m3fn, None)
    kinds["float8_e5m2"] = (jnp.float8_e5m2, jnp.float8_e4m3fn, jax.lax.Precision.HIGHEST)
  out: dict[str, Any] = {"workload": "products", "device": device.device_kind, "tokens": tokens}
  peak, keys = chips.peak_flops(device.device_kind), jax.random.split(jax.random.key(0))
  for name, (*dtypes, precision) in kinds.items():
    product = jax.jit(functools.partial(jnp.dot, precision=precision, preferred_element_type=jnp.bfloat16))
    for shape, (m, k, n) in sizes.items():
      a, b = (jax.random.normal(key, s).astype(kind) for key, s, kind in zip(keys, ((m, k), (k, n)), dtypes))
      seconds = _fastest(product, (a, b), args.repeats)
      out[f"{name}_{shape}"] = {
        "flops_per_second": 2 * m * k * n / seconds,
        "of_peak": peak and 2 * m * k * n / seconds / peak,
      }
  x = jnp.ones(2**29 if device.platform != "cpu" else tokens * lm.embed_dim)  # 2 GiB: no cache holds a part of it
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
