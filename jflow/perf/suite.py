"""bench train --suite: everything that decides the settings of a GPU, measured in one run.

Ceilings of the machine, attention kernels with their errors and leaks, chunks of the head's loss, and the whole
step for remat policies and row counts with predicted and real memory. A setting that runs out of memory is
reported as such and the run goes on. Its sizes are those of the config, so that a tiny config is a quick check.
"""

import gc
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow import chips
from jflow.models import kernels
from jflow.models.attention import packed_attention
from jflow.objectives import head_loss
from jflow.perf.timing import interleaved
from jflow.perf.train import measure, with_rows
from jflow.training import setup

_REMAT = (
  "full",
  "save:attended",
  "save:query,key,value,attended",
  "save:query,key,value,attended,gate,up",
  "none",
)
_ROWS = (1, 2, 4)  # multiples of the config's rows per step
_CHUNKS = (256, 512, 1024)
_SEGMENTS = 6


def run_suite(config: dict[str, Any], steps: int, chosen: Sequence[str]) -> dict[str, Any]:
  """Measures the chosen sections; `steps` timed calls each. Rows per step are the config's, and multiples of them."""
  model = setup.check(config)
  device = jax.devices()[0]
  dtype = jnp.dtype(config["compute"]["dtype"])
  report: dict[str, Any] = {"workload": "train --suite", "device": device.device_kind, "dtype": dtype.name}
  sections = {
    "ceiling": lambda: ceiling(steps, dtype, large=device.platform != "cpu"),
    "attention": lambda: attention(config, model.language_model, dtype, steps),
    "head_loss": lambda: head_losses(config, model.language_model, dtype, steps),
    "steps": lambda: sweep(config, steps),
  }
  for name in chosen:
    print(f"bench: {name} ...", file=sys.stderr, flush=True)
    report[name] = sections[name]()
  return report


def ceiling(steps: int, dtype: Any, large: bool) -> dict[str, float]:
  """FLOP/s of a square product and bytes/s of a copy (read and write)."""
  n = 8192 if large else 256
  a = jnp.ones((n, n), dtype)
  product, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + jnp.ones((), x.dtype))
  calls = {"product": lambda: product(a).block_until_ready(), "copy": lambda: copy(a).block_until_ready()}
  seconds = {name: times["median"] for name, times in interleaved(calls, steps).items()}
  out = {"size": n, "flops_per_second": 2.0 * n**3 / seconds["product"]}
  peak = chips.peak_flops(jax.devices()[0].device_kind)
  share = {"share_of_peak": out["flops_per_second"] / peak} if peak else {}
  return out | share | {"bytes_per_second": 2.0 * a.nbytes / seconds["copy"]}


def attention(config: dict[str, Any], lm: Any, dtype: Any, steps: int) -> dict[str, Any]:
  """Each kernel that runs here: forward and backward time, error against the plain one, leak across segments."""
  b, s, n, h = config["train"]["batch_size"], config["data"]["row_tokens"], lm.heads, lm.head_width
  rng = np.random.default_rng(0)
  q, k, v, weight = (jnp.asarray(rng.standard_normal((b, s, n, h)), dtype) for _ in range(4))
  segments = jnp.broadcast_to(jnp.minimum(jnp.arange(s) // -(-s // _SEGMENTS), _SEGMENTS - 1) + 1, (b, s))
  device, out, compiled = jax.devices()[0], {}, {}

  def gradients(name: str, only: int | None = None) -> Callable[..., Any]:
    counted = segments > 0 if only is None else segments == only
    plain = lambda *x: jnp.sum(jnp.where(counted[..., None, None], packed_attention(*x, segments, name) * weight, 0))
    return jax.jit(jax.grad(lambda *x: plain(*x).astype(jnp.float32), argnums=(0, 1, 2)))

  want = [np.asarray(x, np.float32) for x in gradients("xla")(q, k, v)]
  for name in ("xla", *kernels.KERNELS):
    why = "" if name == "xla" else kernels.obstacle(name, device, dtype, h)
    if why:
      out[name] = {"skipped": why}
      continue
    try:
      run = gradients(name)
      got = [np.asarray(x, np.float32) for x in run(q, k, v)]
      leak = [np.asarray(x, np.float32)[np.asarray(segments) != 2] for x in gradients(name, 2)(q, k, v)]
    except Exception as error:  # a kernel that does not compile is a result, too
      out[name] = {"failed": str(error).splitlines()[0][:200]}
      continue
    relative = max(float(np.linalg.norm(a - w) / np.linalg.norm(w)) for a, w in zip(got, want, strict=True))
    out[name] = {"gradient_error": relative, "leak": max(float(np.abs(x).max()) for x in leak)}
    compiled[name] = lambda run=run: jax.block_until_ready(run(q, k, v))
  for name, seconds in interleaved(compiled, steps).items():
    out[name]["seconds"] = seconds
  return out


def head_losses(config: dict[str, Any], lm: Any, dtype: Any, steps: int) -> dict[str, Any]:
  """The head's loss and gradients by chunk, on all positions and on one in eight, with its temporaries.

  "scan" is the usual way beside it: all positions, a chunk at a time, its logits made again for the gradient.
  """
  b, s = config["train"]["batch_size"], config["data"]["row_tokens"]
  hidden = jnp.ones((b, s, lm.width), dtype)
  kernel = jnp.full((lm.width, lm.vocabulary_size), 0.01, jnp.float32)
  targets = jnp.zeros((b, s), jnp.int32)
  masks = {"all": jnp.ones((b, s), bool), "one in 8": jnp.broadcast_to(jnp.arange(s) % 8 == 0, (b, s))}
  out, calls = {}, {}
  for chunk in _CHUNKS:
    step = jax.value_and_grad(lambda x, w, m, c=chunk: head_loss.next_token(x, w, targets, m, c), argnums=(0, 1))
    program = jax.jit(step).lower(hidden, kernel, masks["all"]).compile()
    temporaries = program.memory_analysis().temp_size_in_bytes
    for share, mask in masks.items():
      name = f"chunk {chunk}, {share}"
      out[name] = {"temporary_bytes": temporaries}
      calls[name] = lambda p=program, m=mask: jax.block_until_ready(p(hidden, kernel, m))
  scan = jax.jit(jax.value_and_grad(_by_scan, argnums=(0, 1)))
  program = scan.lower(hidden, kernel, targets, masks["all"]).compile()
  out["scan, all"] = {"temporary_bytes": program.memory_analysis().temp_size_in_bytes}
  calls["scan, all"] = lambda p=program: jax.block_until_ready(p(hidden, kernel, targets, masks["all"]))
  for name, seconds in interleaved(calls, steps).items():
    out[name]["seconds"] = seconds
  return out


def _by_scan(hidden_BSD: jax.Array, kernel_DV: jax.Array, targets_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
  """`head_loss.next_token` by a scan whose body is rematerialised."""
  chunk = math.gcd(head_loss.CHUNK, targets_BS.size)
  cut = lambda x: x.reshape(-1, chunk, *x.shape[2:])

  @jax.checkpoint
  def body(loss: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
    x_CD, ids_C, mask_C = part
    logits_CV = jnp.dot(x_CD, kernel_DV.astype(x_CD.dtype), preferred_element_type=jnp.float32)
    picked_C = jnp.take_along_axis(logits_CV, ids_C[:, None], axis=1)[:, 0]
    return loss + jnp.sum(jnp.where(mask_C, jax.nn.logsumexp(logits_CV, axis=1) - picked_C, 0.0)), None

  return jax.lax.scan(body, jnp.zeros(()), tuple(map(cut, (hidden_BSD, targets_BS, mask_BS))))[0]


def sweep(config: dict[str, Any], steps: int) -> list[dict[str, Any]]:
  """The whole step for each remat policy and number of rows, the first with its parts; one policy on a CPU."""
  out: list[dict[str, Any]] = []
  rows, quick = config["train"]["batch_size"], jax.default_backend() == "cpu"
  for remat in _REMAT[:1] if quick else _REMAT:
    for factor in _ROWS[:1] if quick else _ROWS:
      one = with_rows({**config, "compute": {**config["compute"], "remat": remat}}, rows * factor)
      print(f"bench: remat {remat}, {rows * factor} rows ...", file=sys.stderr, flush=True)
      try:
        out.append(measure(one, steps, parts=not out))
      except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
          raise
        out.append({"remat": remat, "rows": rows * factor, "failed": "out of memory"})
        break  # more rows do not fit either
      finally:
        gc.collect()
  return out
