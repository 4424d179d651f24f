"""bench train: the train step of a config on synthetic full rows: tokens/s, MFU, memory, and its parts alone."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

from jflow.config import RunConfig
from jflow.errors import Stopped, UserError
from jflow.models import initial, lora


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of `bench train`."""

  config: str
  rows: int | None = None  # of a step; None: train.batch_size
  steps: int = 20  # timed
  parts: bool = True  # time the parts too
  fields: tuple[str, ...] = ()  # "config.FIELD=VALUE"


def run(args: Settings) -> dict[str, Any]:
  """Measures the step of a config; see `measure`."""
  if args.steps < 1:
    raise UserError(f"--steps must be at least 1, got {args.steps}")
  return measure(load(args.config, args.fields, args.rows), args.steps, args.parts)


def load(name: str, fields: Sequence[str], rows: int | None) -> RunConfig:
  """The config of a name with `fields` ("config.FIELD=VALUE") set, and so many rows a step; see `with_rows`."""
  from jflow.training import config_files

  if rows is not None and rows < 1:
    raise UserError(f"--rows must be at least 1, got {rows}")
  return with_rows(config_files.load(name, [f"--{field.lstrip('-')}" for field in fields]), rows)


def with_rows(config: RunConfig, rows: int | None) -> RunConfig:
  """The config with another batch size, which needs no data."""
  return config.replace(
    train=dict(batch_size=rows or config.train.batch_size), data=dict(tokenizer=config.data.tokenizer or "unused")
  )


def measure(config: RunConfig, steps: int, parts: bool) -> dict[str, Any]:
  """Compiles and times the step, then each part alone.

  Args:
    config: of a run.
    steps: timed steps, after two that are not.
    parts: time LLM, head, SigLIP, heads, VAE and optimizer too.

  Raises:
    Stopped: a step had no finite gradient, so that what was timed is not a step.
  """
  import jax

  from jflow import chips, sharding
  from jflow.batch import need_memory
  from jflow.data.mixture import assumed
  from jflow.perf import parts as part_timing
  from jflow.perf.rows import most, synthetic
  from jflow.perf.timing import spread
  from jflow.training import remat, setup
  from jflow.training.flops import counted, model_flops_of
  from jflow.training.program import make_program

  setup.check(config)
  mesh = sharding.make_mesh(**vars(config.mesh))
  device = mesh.devices.flat[0]
  model = setup.undecided(config, device)
  shape, rows = setup.row_shape(config, model.config), config.train.batch_size
  vocabulary = model.config.language_model.vocab_size
  need_memory(rows, shape, 2)  # here and on the devices
  host = synthetic(rows, shape, assumed(config.data)[-1][1], vocabulary)
  model = setup.with_room(model, most(host, config.mesh.data * config.mesh.fsdp, config.train.accumulation))
  with jax.set_mesh(mesh):
    batch = jax.device_put(host, sharding.batch_sharding(mesh))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)
    started = time.perf_counter()
    make = lambda chosen: make_program(config, chosen, mesh)
    model, program, compiled, predicted = remat.fit_or_refuse(model, mesh, make, shapes, config.train.accumulation)
    compile_seconds = time.perf_counter() - started
    fresh = initial.create(lambda: setup.initial_params(config, model), mesh)
    state = jax.jit(program.state_of, out_shardings=program.shardings, donate_argnums=0)(fresh)
    seconds = []
    for i in range(-2, steps):
      started = time.perf_counter()
      state, metrics = compiled(state, batch)
      jax.block_until_ready(metrics["loss"])
      if i >= 0:
        seconds.append(time.perf_counter() - started)
    loss, skipped = float(metrics["loss"]), int(metrics["skipped"])
    if skipped or not math.isfinite(loss):
      raise Stopped(f"{skipped} of {steps + 2} steps were skipped, and the loss is {loss}: the times say nothing")
    flops = model_flops_of(config, model.config, lora.parts(state.trained), counted(host))
    tokens, pictures, total = int((host.segment_ids > 0).sum()), int((host.image_kind > 0).sum()), sum(flops.values())
    peak = chips.peak_flops(device.device_kind)
    step = spread(seconds)
    rate = lambda f, s: f / s / (peak * mesh.size) if peak else None
    report = {
      "workload": "train",
      "device": device.device_kind,
      "devices": mesh.size,
      "dtype": model.dtype.name,
      "attention": model.attention,
      "matmul": model.matmul,
      "remat": model.remat,
      "unroll": model.unroll,
      "rows": rows,
      "seconds_per_step": step,
      "tokens_per_second": tokens / step["median"],
      "tokens_per_step": tokens,
      "learned_tokens_per_step": int(host.loss_mask.sum()),
      "pictures_per_step": pictures,
      "images_per_second": pictures / step["median"],
      "model_flops": total,
      "model_flops_per_token": total / tokens,
      "mfu": rate(total, step["median"]),
      "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use", predicted),
      "predicted_bytes": predicted,
      "compile_seconds": compile_seconds,
      "loss": loss,
    }
    if parts:
      report["parts"] = {}
      for name, seconds in part_timing.time_parts(config, model, state, batch, max(3, steps // 4)).items():
        work = flops.get(name)
        report["parts"][name] = {
          "seconds": seconds["median"],
          "model_flops": work,
          "mfu": work and rate(work, seconds["median"]),
        }
  return report
