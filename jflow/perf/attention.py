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
      told = [_error(g, w) for g, w in zip(got, want, strict=True)]
      for key, of in (("error", 0), ("error_worst", 1)):
        out[name][key] = {
          part: float(one[of]) for part, one in zip(("out", "query", "key", "value"), told, strict=True)
        }
  return out


def _error(got: Any, want: Any) -> tuple[Any, Any]:
  """The relative L2 error of [B, S, N, H], and the largest of one position, beside the mean magnitude of a position."""
  import jax
  import jax.numpy as jnp

  @jax.jit
  def compared(got, want):
    square = lambda x: jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(2, 3))
    off, size = square(got.astype(jnp.float32) - want.astype(jnp.float32)), square(want)
    return jnp.sqrt(off.sum() / size.sum()), jnp.sqrt(off.max() / size.mean())

  return compared(got, want)


def _measured(name: str, inputs: Any, segments: Any, repeats: int) -> tuple[dict[str, Any], tuple[Any, ...]]:
  """The report of a kernel, and its output and gradients, zero at padding."""
  import jax
  import jax.numpy as jnp

  from jflow.models.attention import packed_attention
  from jflow.perf.timing import spread

  attend = lambda q, k, v: packed_attention(q, k, v, segments, name)

  def both(d_out, q, k, v):
    out, back = jax.vjp(attend, q, k, v)
    return out, *back(d_out)

  keep = jax.jit(lambda mask, x: jnp.where(mask[..., None, None], x, jnp.zeros((), x.dtype)))
  d_out = jax.random.normal(jax.random.key(1), inputs[0].shape, inputs[0].dtype)
  of_real, of_second = keep(segments > 0, d_out), keep(segments == 2, d_out)
  forward = jax.jit(attend).lower(*inputs).compile()
  compiled = jax.jit(both).lower(d_out, *inputs).compile()

  def timed(call):
    seconds = []
    for _ in range(4):  # calls are queued, so that their start costs nothing
      started = time.perf_counter()
      for _ in range(repeats):
        result = call()
      jax.block_until_ready(result)
      seconds.append((time.perf_counter() - started) / repeats)
    return spread(seconds[1:])

  elsewhere = jax.jit(lambda x: jnp.any(jnp.where((segments != 2)[..., None, None], x, 0) != 0))
  finite = jax.jit(lambda x: jnp.isfinite(x).all())
  result = compiled(of_real, *inputs)
  report = {
    "seconds_forward": timed(lambda: forward(*inputs)),
    "seconds_with_gradients": timed(lambda: compiled(of_real, *inputs)),
    "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    # None: no row holds a second segment.
    "leaks": any(bool(elsewhere(g)) for g in compiled(of_second, *inputs)[1:]) if int(segments.max()) > 1 else None,
    "finite": all(bool(finite(keep(segments > 0, x))) for x in result),
  }
  return report, tuple(keep(segments > 0, x) for x in result)
