"""Ahead-of-time compilation of a config's train step for absent hardware, and a report of its cost."""

import dataclasses
import math
import pathlib
import re
import time
from typing import Any

import jax
import numpy as np

from jflow import compilation, outputs
from jflow.batch import TASKS
from jflow.config import RunConfig
from jflow.data.mixture import assumed, most_at_once
from jflow.errors import UserError
from jflow.models import flops as model_flops
from jflow.models import lora
from jflow.models.unified import UnifiedModel
from jflow.objectives import next_token
from jflow.perf import hlo, targets
from jflow.training import cost, remat, setup
from jflow.training.flops import model_flops_of
from jflow.training.program import Program, abstract_batch, make_program

# Share of a row's tokens with a next-token loss, by task: an answer of 200 tokens in 776, none, all.
_LOSS_SHARE = dict(zip(TASKS, (200 / 776, 0.0, 1.0), strict=True))
_KERNEL_SHARE = 0.5  # of the peak that fused attention is taken to reach
_READ_TEXT, _WRITE_TEXT = 200, 74  # tokens around an image
# What a chip reaches of its vendor's peaks, for the roofline of each launch. GPU: products of the step's shapes and
# copies on one H200. TPU: the peaks, since no figure of ours stands for one.
RATES: dict[str, Any] = {
  "gpu": lambda chip: hlo.Rates(
    0.708 * chip.peak_flops, 0.556 * chip.peak_flops, 0.833 * chip.memory_bandwidth, 2.5e-6
  ),
  "tpu": lambda chip: hlo.Rates(chip.peak_flops, chip.peak_flops, chip.memory_bandwidth, 0.0),
}
# Part of the step -> what the name of its instructions holds; the first that fits, and "rest": optimizer, averages,
# draws.
_PARTS = {
  "head": f"{next_token.SCOPE}|next_token",
  "siglip": "understanding_encoder",
  "vae": "posterior|/vae",
  "heads": r"velocity|writer\.slots|alignment|generation_",
  "llm": "language_model|backbone|layers/|assemble",
}
_PEAK_SHARE = 0.97  # of a GPU's memory that a program may use; XLA's own limit says it for a TPU


def expected(config: RunConfig, model: UnifiedModel) -> tuple[model_flops.Work, float]:
  """The work of a full batch of the run's last mixture, and the share of its tokens with a loss.

  Samples are those of the paper's data: 776 tokens around a read image, 650 around a written one at 384 (as
  many around the images of another size), whole rows of one text.
  """
  train, data = config.train, config.data
  weights = np.asarray(assumed(data)[-1][1], float)
  und, gen, text = weights / weights.sum()
  tokens = train.batch_size * data.row_tokens
  share = sum(w * _LOSS_SHARE[task] for w, task in zip((und, gen, text), TASKS))
  read_length, write_length = model.config.patches + _READ_TEXT, model.config.written_patches + _WRITE_TEXT
  lengths = ((und, read_length), (gen, write_length), (text, data.row_tokens))
  pairs = sum(w * tokens * (n + 1) / 2 for w, n in lengths)
  read, written = und * tokens / read_length, gen * tokens / write_length
  return model_flops.Work(tokens, pairs, share * tokens, read, written), share


def room(config: RunConfig, shards: int) -> tuple[int, ...]:
  """The result of `Pipeline.most` for a run on the samples of `expected`."""
  data, model = config.data, config.model
  lengths = (model.patches + _READ_TEXT, model.written_patches + _WRITE_TEXT)
  read, written = (min(data.row_tokens // length, data.row_images) for length in lengths)
  held = np.array([[read, 0, read], [0, written, written], [0, 0, 0]])
  most = most_at_once(assumed(data), config.train.batch_size, shards, config.train.accumulation, held)
  return (*(max(1, int(n)) for n in most), max(1, read, written))


def compile_report(
  config: RunConfig, topology: targets.Topology, effort: float = 0.0, keep_text: pathlib.Path | None = None
) -> dict[str, Any]:
  """Compiles the train step and reports memory, FLOPs, traffic and a bound of its time.

  Args:
    config: with the mesh and the batch size to compile for; checked here.
    topology: to compile for.
    effort: of the compiler's optimization, from 0, as in training, down to -1, the shortest compilation.
    keep_text: file for the compiled program as text; None: none.

  Returns:
    The report as plain values; `fits` is False where the compiler reports too little memory.

  Raises:
    UserError: the config is wrong, or the topology does not exist.
  """
  setup.check(config)
  sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.model)
  mesh = targets.make_mesh(topology, sizes)
  model = setup.with_room(setup.undecided(config, mesh.devices.flat[0]), room(config, sizes[0] * sizes[1]))
  _, share = expected(config, model)
  per_device = config.train.batch_size // (sizes[0] * sizes[1])
  report: dict[str, Any] = {
    "topology": topology.name,
    "chips": topology.chips,
    "mesh": dict(vars(config.mesh)),
    "rows_per_device": per_device,
    "accumulation": config.train.accumulation,
    "attention": model.attention,
    "matmul": model.matmul,
    "effort": effort,
    "jax": jax.__version__,
  }
  with jax.set_mesh(mesh), targets.absent_gpu(topology):
    batch = abstract_batch(config, model, mesh)
    tokens, most = per_device * config.data.row_tokens // config.train.accumulation, _limit(topology) * 2**30
    *others, last = remat.candidates(model, topology.chip.platform)
    for candidate in [*(one for one in others if remat.kept(one, tokens) <= most), last]:
      model = candidate
      program = make_program(config, model, mesh)
      report |= {"remat": model.remat, "unroll": model.unroll}
      compiled, cost = _compiled(program, batch, topology, effort)
      report |= cost
      if report["fits"]:
        break
  if compiled is None:
    return report
  text = compiled.as_text()
  if keep_text:
    outputs.replace(keep_text, text)
  micro = per_device * config.data.row_tokens / config.train.accumulation
  chunks = next_token.chunks(math.ceil(share * micro))
  rates = RATES[topology.chip.platform](topology.chip)
  counts = hlo.count(text, dict(mesh.shape), lambda loop: chunks if next_token.SCOPE in loop else 0, rates, part_of)
  return report | _roofline(config, model, lora.parts(program.state.trained), topology, counts, dict(mesh.shape))


def _compiled(program: Any, batch: Any, topology: targets.Topology, effort: float) -> tuple[Any, dict[str, Any]]:
  """The compiled step, None where the compiler itself refuses its memory; its part of the report."""
  started = time.monotonic()
  lowered = program.step.lower(program.state, batch)
  lowered_after = time.monotonic() - started
  started = time.monotonic()
  try:
    with compilation.said(f"the step for {topology.name}"):
      compiled = lowered.compile(_options(topology, effort))
  except Exception as error:  # jax raises several kinds
    overflow = re.search(r"Used ([0-9.]+)([GMK]) of ([0-9.]+)([GMK]) hbm", str(error))
    if not overflow:
      raise UserError(f"{topology.name}: the compiler refuses: {str(error).strip().splitlines()[0]}") from error
    scale = {"G": 1.0, "M": 2.0**-10, "K": 2.0**-20}
    used, limit = (float(overflow.group(i)) * scale[overflow.group(i + 1)] for i in (1, 3))
    return None, {"fits": False, "memory_gib": {"total": used, "limit": limit}}
  memory = _memory(program, batch, compiled.memory_analysis(), topology)
  return compiled, {
    "lower_seconds": round(lowered_after, 1),
    "compile_seconds": round(time.monotonic() - started, 1),
    "memory_gib": memory,
    "fits": memory["total"] <= memory["limit"],
  }


def part_of(name: str) -> str:
  """The part of the step that an instruction belongs to, by its name."""
  return next((part for part, pattern in _PARTS.items() if re.search(pattern, name)), "rest")


def _options(topology: targets.Topology, effort: float) -> dict[str, Any]:
  """Compiler options in addition to those of the step itself."""
  options: dict[str, Any] = {"exec_time_optimization_effort": effort} if effort else {}
  if topology.chip.platform == "gpu":
    # Triton's tiles are chosen by trying them on the device; where there is none, those it guesses need not fit.
    # cuBLAS, the other way to a product, has the same FLOPs and operands.
    options["xla_gpu_enable_triton_gemm"] = False
  return options


def _memory(program: Program, batch: Any, analysis: Any, topology: targets.Topology) -> dict[str, float]:
  """Memory of one device by kind, in GiB."""
  held = lambda tree: cost.held(tree) / 2**30
  state = program.state
  temporaries = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  out = {
    "parameters": held((state.trained, state.frozen)),
    "ema": held(state.ema),
    "optimizer": held(state.optimizer),
    "batch": held(batch),
    "temporaries": temporaries / 2**30,
  }
  out["total"] = (analysis.argument_size_in_bytes + temporaries) / 2**30
  out["limit"] = _limit(topology)
  return out


def _limit(topology: targets.Topology) -> float:
  """GiB of a device that a program may use."""
  share = _PEAK_SHARE if topology.chip.platform == "gpu" else 1.0
  return share * topology.chip.memory_bytes / 2**30


def _roofline(
  config: RunConfig, model: UnifiedModel, trained, topology, counts: hlo.Counts, mesh: dict[str, int]
) -> dict[str, Any]:
  """Lower bounds of a step's time from compute, memory traffic and network, as if the others cost nothing."""
  chip, work = topology.chip, expected(config, model)[0]
  parts = model_flops_of(config, model.config, trained, work)
  needed = sum(parts.values()) / topology.chips
  kernels = _kernel_flops(model, work, config) / topology.chips if counts.kernels else 0.0
  seconds = {
    "compute": (counts.flops - counts.fp8_flops / 2 + kernels) / chip.peak_flops,
    "memory": counts.memory_bytes / chip.memory_bandwidth,
  }
  network = 0.0
  for (kind, axes), size in counts.collective_bytes.items():
    network += (2 if kind == "all-reduce" else 1) * size / topology.link(axes, mesh)
  seconds["network"] = network
  slowest = max(seconds, key=seconds.get)
  tokens = work.tokens / topology.chips
  return {
    "flops": {"program": counts.flops, "kernels": kernels, "model": needed},
    "executed_flops": counts.flops + kernels,
    "fp8_products": counts.fp8_products,
    "fp8_flops": counts.fp8_flops,
    "model_flops": needed,
    "memory_bytes": counts.memory_bytes,
    "parts": {name: dataclasses.asdict(part) for name, part in sorted(counts.parts.items())},
    "launches": counts.launches,
    "seconds_by_launch": counts.seconds + kernels / (_KERNEL_SHARE * chip.peak_flops),
    "collective_bytes": {f"{kind} {axes}": size for (kind, axes), size in sorted(counts.collective_bytes.items())},
    "collective_bytes_total": sum(counts.collective_bytes.values()),
    "largest_gather_bytes": counts.largest_gather,
    "seconds": seconds,
    "bound": slowest,
    "seconds_if_overlapped": seconds[slowest],
    "seconds_if_serial": sum(seconds.values()),
    "mfu_at_most": needed / chip.peak_flops / seconds[slowest],
    "tokens_per_second_per_chip_at_most": tokens / seconds[slowest],
  }


def _kernel_flops(model: UnifiedModel, work: model_flops.Work, config: RunConfig) -> float:
  """FLOPs of fused attention over a step: 2 products forward, 5 backward, forward again where rematerialized.

  cuDNN and "packed" skip pairs across segments; the others compute all pairs under the diagonal.
  """
  lm, rows = model.config.language_model, config.train.batch_size
  pairs = work.pairs if model.attention.startswith(("cudnn", "packed")) else rows * config.data.row_tokens**2 / 2
  again = 0 if model.remat == "none" or ("attended" in model.remat and model.attention != "triton") else 2
  return 2.0 * lm.num_layers * lm.num_heads * lm.head_dim * pairs * (2 + again + 5)
