"""Ahead-of-time compilation of generating and answering for an absent GPU, and the bytes of one step of their loops.

Legend: a step is one token of every row, or one step of the solver for every picture.
"""

import pathlib
import time
import types
from typing import Any

import jax
import jax.numpy as jnp

from jflow import compilation, outputs, registry, sharding
from jflow.config import RunConfig
from jflow.generation.base import Loop, family
from jflow.inference import reading
from jflow.models import build, flops, kernels
from jflow.models.unified import UnifiedModel, for_inference, inference_model
from jflow.perf import hlo, targets
from jflow.perf.aot_report import RATES

_PROMPT = 32  # slots of a prompt for a picture


def compile_report(
  config: RunConfig,
  topology: targets.Topology,
  program: str,
  rows: int,
  context: int,
  keep_text: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Compiles the loop of generating or of answering, and reports the memory traffic of one step of it.

  Args:
    config: whose model is compiled, in bfloat16.
    topology: one GPU.
    program: "generate" or "understand".
    rows: pictures generated or answers decoded at once.
    context: slots of the cache that decoding covers; generating covers a prompt of 32.
    keep_text: file for the compiled program as text; None: none.

  Returns:
    The report as plain values. `step_bytes` is the traffic of one step of the compiled program; `step_bytes_needed`
    counts once each matrix that a step multiplies by, and the keys and values of all rows; `step_seconds_by_launch` is
    the roofline of each launch, one after the other, at what a device reaches.
  """
  device = targets.devices(topology)[0]
  on_chip = jax.sharding.SingleDeviceSharding(device)
  model = UnifiedModel(config.model, jnp.dtype("bfloat16"), remat="none", unroll=1, attention="xla")
  whole = sharding.unbox(jax.eval_shape(lambda: build.initial_params(model, 0)))
  inferring = inference_model(model, gpu=True)
  if program == "generate" and kernels.fuses_causal(model.dtype, config.model.language_model.head_dim):
    inferring = inferring.clone(attention="fused")  # also where no device has shown it right yet
  params = jax.eval_shape(lambda params: for_inference(model, params, gpu=True)[1], whole)
  loop = (
    _answering(inferring, params, rows, context) if program == "understand" else _generating(inferring, params, rows)
  )
  placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_chip), (params, *loop.args))
  started = time.monotonic()
  # Triton's tiles for large products are chosen by trying them on the device; steps of a few rows have none.
  options = {"xla_gpu_enable_triton_gemm": not loop.large}
  with targets.absent_gpu(topology), compilation.said(f"{program} for {topology.name}"):
    compiled = loop.program.jitted(inferring, **loop.static).lower(*placed).compile(options)
  text = compiled.as_text()
  if keep_text:
    outputs.replace(keep_text, text)
  rates = RATES[topology.chip.platform](topology.chip)
  once, twice = (hlo.count(text, {}, lambda loop, n=n: n, rates) for n in (1, 2))
  size, work = twice.memory_bytes - once.memory_bytes, twice.flops - once.flops
  analysis = compiled.memory_analysis()
  return {
    "program": program,
    "topology": topology.name,
    "rows": rows,
    "slots": context if program == "understand" else _PROMPT,
    "step": loop.step,
    "step_bytes": size,
    "step_bytes_needed": _needed(inferring, params, loop, program),
    "step_flops": work,
    "step_launches": twice.launches - once.launches,
    "step_seconds_by_launch": twice.seconds - once.seconds,
    "step_seconds_at_least": max(size / topology.chip.memory_bandwidth, work / topology.chip.peak_flops),
    "memory_gib": {
      "arguments": analysis.argument_size_in_bytes / 2**30,
      "temporaries": analysis.temp_size_in_bytes / 2**30,
    },
    "compile_seconds": round(time.monotonic() - started, 1),
    "jax": jax.__version__,
  }


def _answering(model: UnifiedModel, params: Any, rows: int, context: int) -> Loop:
  """The loop of decoding; its cache is whole."""
  state = jax.eval_shape(lambda: reading.Rows.empty(model, rows, context))
  args, static = (state, jax.ShapeDtypeStruct((), jnp.int32)), dict(eos=2, slots=context, greedy=True)
  return Loop(reading.run, args, static, step="token of each row", large=False)


def _generating(model: UnifiedModel, params: Any, rows: int) -> Loop:
  """The loop of the family's sampler."""
  kind = family(model.config.generation)
  ids = types.SimpleNamespace(image_start=0, pad=0)
  sampler = registry.load(kind.sampler)(model, params, ids)
  return sampler.loop(rows, _PROMPT, kind.settings())


def _needed(model: UnifiedModel, params: Any, loop: Loop, program: str) -> float:
  """Bytes that a step must read: the matrices that it multiplies by, and the keys and values of all rows."""
  lm, answering = params["language_model"], program == "understand"
  heads = lm["head"] if answering else {name: x for name, x in params.items() if name.startswith("generation_")}
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  caches = [x for x in jax.tree.leaves(loop.args) if x.ndim == 3 and x.dtype == model.dtype]
  body = flops.body_weights(model.config.language_model) * model.dtype.itemsize
  return float(body + size(heads) + size(caches))
