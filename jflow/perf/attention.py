"""bench attention: the kernels of packed attention on a step's segments: seconds, memory, error and leaks."""

import dataclasses
import time
from typing import Any

from jflow.errors import UserError
from jflow.models.kernels import KERNELS, table_for


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of `bench attention`."""

  config: str
  rows: int = 4
  repeats: int = 10
  kernels: tuple[str, ...] = ()  # none: all; cudnn with its smallest and its largest table
  fields: tuple[str, ...] = ()  # "config.FIELD=VALUE"


def run(args: Settings) -> dict[str, Any]:
  """Measures each kernel beside plain attention; one that cannot run here, or fails, says why."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from jflow.data.mixture import assumed
  from jflow.models import kernels
  from jflow.perf.rows import synthetic
  from jflow.perf.train import load
  from jflow.training import setup

  if args.repeats < 1:
    raise UserError("--repeats must be at least 1")
  config, device = load(args.config, args.fields, args.rows), jax.devices()[0]
  lm, dtype = config.model.language_model, jnp.dtype(config.compute.dtype)
  batch = synthetic(args.rows, setup.row_shape(config, config.model), assumed(config.data)[-1][1], lm.vocab_size)
  segments = jnp.asarray(batch.segment_ids)
  shape = (*segments.shape, lm.num_heads, lm.head_dim)
  inputs = tuple(jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 3))
  table = table_for(int(batch.segment_ids.max()))
  names = args.kernels or ("xla", *(name for name in KERNELS if name != "cudnn"), f"cudnn:{table}", "cudnn:128")
  out: dict[str, Any] = {
    "workload": "attention",
    "device": device.device_kind,
    "dtype": dtype.name,
    "shape": list(shape),
  }
  want = None
  for name in names:
    base = name.partition(":")[0]
    why = "" if base == "xla" else kernels.obstacle(base, device, dtype, lm.head_dim)
    if why:
      out[name] = {"skipped": why}
      continue
    try:
      out[name], got = _measured(name, inputs, segments, args.repeats)
    except Exception as error:  # jax raises several kinds; the other kernels are worth their time
      out[name] = {"failed": str(error).splitlines()[0][:200]}
      continue
    if base == "xla":
      want = got
    elif want is not None:
      norm = lambda x: float(np.linalg.norm(np.asarray(x, np.float64)))
      errors = [norm(np.asarray(g, np.float64) - np.asarray(w, np.float64)) / norm(w) for g, w in zip(got, want)]
      out[name]["error"] = dict(zip(("out", "query", "key", "value"), errors))
  return out


def _measured(name: str, inputs: Any, segments: Any, repeats: int) -> tuple[dict[str, Any], tuple[Any, ...]]:
  """The report of a kernel, and its outputs and gradients at real positions."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from jflow.models.attention import packed_attention
  from jflow.perf.timing import spread

  attend = lambda q, k, v: packed_attention(q, k, v, segments, name)

  def loss(q, k, v, mask):
    return jnp.sum(jnp.where(mask, attend(q, k, v).astype(jnp.float32), 0.0) ** 2)

  real = (segments > 0)[..., None, None]
  forward = jax.jit(attend).lower(*inputs).compile()
  both = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*inputs, real).compile()

  def timed(call):
    seconds = []
    for _ in range(repeats + 1):
      started = time.perf_counter()
      jax.block_until_ready(call())
      seconds.append(time.perf_counter() - started)
    return spread(seconds[1:])

  gradients = both(*inputs, real)
  of_second = both(*inputs, (segments == 2)[..., None, None])
  elsewhere = np.asarray(segments != 2)
  report = {
    "seconds_forward": timed(lambda: forward(*inputs)),
    "seconds_with_gradients": timed(lambda: both(*inputs, real)),
    "temporary_bytes": both.memory_analysis().temp_size_in_bytes,
    "leaks": bool(any(np.asarray(g, np.float32)[elsewhere].any() for g in of_second)),
    "finite": all(bool(np.isfinite(np.asarray(g, np.float32)).all()) for g in gradients),
  }
  return report, tuple(np.where(np.asarray(real), np.asarray(x, np.float32), 0) for x in (forward(*inputs), *gradients))
