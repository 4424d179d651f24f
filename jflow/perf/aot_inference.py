"""Ahead-of-time compilation of painting and answering for an absent GPU, and the bytes of one step of their loops.

Legend: a step is one token of every row, or one step of the solver for every picture.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow import compilation, registry, sharding
from jflow.config import RunConfig
from jflow.generation.base import family
from jflow.inference import reading
from jflow.models import build, flops
from jflow.models.unified import UnifiedModel, for_inference, inference_model
from jflow.perf import hlo, targets

PROGRAMS = ("generate", "understand")
_PROMPT = 32  # slots of a prompt for a picture


def compile_report(
  config: RunConfig, topology: targets.Topology, program: str, rows: int, context: int, keep_text: str | None = None
) -> dict[str, Any]:
  """Compiles the loop of painting or of answering, and reports the memory traffic of one step of it.

  Args:
    config: whose model is compiled, in bfloat16.
    topology: one GPU.
    program: one of PROGRAMS.
    rows: pictures painted or answers decoded at once.
    context: slots of the cache that decoding covers; painting covers a prompt of 32.
    keep_text: file for the compiled program as text; None: none.

  Returns:
    The report as plain values. `step_bytes` is the traffic of one step of the compiled program; `step_bytes_needed`
    counts each weight of the LLM once and, of answers, the keys and values of each row.
  """
  device = targets.devices(topology)[0]
  on_chip = jax.sharding.SingleDeviceSharding(device)
  model = UnifiedModel(config.model, jnp.dtype("bfloat16"), remat="none", unroll=1, attention="xla")
  whole = sharding.unbox(jax.eval_shape(lambda: build.initial_params(model, 0)))
  inferring = inference_model(model, gpu=True)
  params = jax.eval_shape(lambda params: for_inference(model, params, gpu=True)[1], whole)
  if program == "understand":
    function, args, needed = _understand(inferring, params, rows, context)
  else:
    function, args, needed = _generate(inferring, params, rows)
  placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_chip), (params, *args))
  started = time.monotonic()
  donated = (1,) if program == "understand" else ()
  # Triton's tiles for large products are chosen by trying them on the device; of one row there is no product.
  options = {"xla_gpu_enable_triton_gemm": program == "understand"}
  with targets.absent_gpu(topology), compilation.said(f"{program} for {topology.name}"):
    compiled = jax.jit(function, donate_argnums=donated).lower(*placed).compile(options)
  text = compiled.as_text()
  if keep_text:
    with open(keep_text, "w", encoding="utf-8") as file:
      file.write(text)
  runs = [hlo.count(text, {}, lambda loop, n=n: n) for n in (1, 2)]
  size, work = runs[1].memory_bytes - runs[0].memory_bytes, runs[1].flops - runs[0].flops
  analysis = compiled.memory_analysis()
  return {
    "program": program,
    "topology": topology.name,
    "rows": rows,
    "slots": context if program == "understand" else _PROMPT,
    "step_bytes": size,
    "step_bytes_needed": needed,
    "step_flops": work,
    "step_seconds_at_least": max(size / topology.chip.memory_bandwidth, work / topology.chip.peak_flops),
    "memory_gib": {
      "arguments": analysis.argument_size_in_bytes / 2**30,
      "temporaries": analysis.temp_size_in_bytes / 2**30,
    },
    "compile_seconds": round(time.monotonic() - started, 1),
    "jax": jax.__version__,
  }


def _understand(model: UnifiedModel, params: Any, rows: int, context: int) -> tuple[Any, tuple[Any, ...], float]:
  """`reading.run`, its arguments after the params, and the bytes that a token of each row must read."""
  state = jax.eval_shape(lambda: reading.Rows.empty(model, rows, context))
  function = functools.partial(reading.run.function, model, eos=2, slots=context, greedy=True)
  read = flops.token_bytes(model.config.language_model, context, rows, model.dtype.itemsize)
  return function, (state, jax.ShapeDtypeStruct((), jnp.int32)), read


def _generate(model: UnifiedModel, params: Any, rows: int) -> tuple[Any, tuple[Any, ...], float]:
  """The loop of the family's sampler, its arguments after the params, and the bytes of the weights it reads."""
  kind = family(model.config.generation)
  sampler = registry.load(kind.sampler)(model, params)
  function, args = sampler.loop(rows, _PROMPT, kind.settings())
  size = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params["language_model"]))
  return function, args, float(size)
