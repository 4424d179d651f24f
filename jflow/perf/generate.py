"""bench generate: images per second, the halves of the sampler timed apart, beside PyTorch on request."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jflow import registry
from jflow.errors import UserError
from jflow.generation.base import check_settings, family, settings
from jflow.inference.loading import usual_dtype
from jflow.interop import checkpoints
from jflow.models import kernels
from jflow.perf import inference, versus


@dataclasses.dataclass(frozen=True)
class Settings(inference.Settings):
  """The settings of `bench generate`."""

  batch_size: int = 2  # images generated at once
  prompt_tokens: int = 32  # of the longest prompt
  attention: str = "auto"  # of a picture's own positions: "xla", "fused" (a GPU's), "auto": what inference takes
  sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # settings of the model's way to write images


def run(args: Settings) -> dict[str, Any]:
  """Runs the benchmark and returns its report."""
  for name in ("batch_size", "prompt_tokens"):
    if getattr(args, name) < 1:
      raise UserError(f"--{name}={getattr(args, name)} must be at least 1")
  if args.sampling:
    check_settings(args.sampling)
  source = inference.open_source(args)
  c, n, kind = source.config, args.batch_size, family(source.config.generation)
  greedy = {"temperature": 0.0} if args.versus and "temperature" in kind.setting_names else {}  # else draws differ
  own = checkpoints.sampling_of(args.checkpoint) if args.checkpoint else {}
  chosen = settings(kind, {**own, **greedy, **args.sampling})
  work = versus.work_of(args, c, chosen)
  room = c.language_model.max_length - kind.layout.slots(c.written_patches)
  if args.prompt_tokens > room:
    raise UserError(
      f"--prompt_tokens={args.prompt_tokens} must be at most {room}, which a picture's {c.language_model.max_length - room} "
      f"slots leave of the context of {c.language_model.max_length}"
    )
  if args.attention == "fused":
    _check_fused(c.language_model.head_dim, args.dtype or usual_dtype())
  pipeline = source.pipeline()
  if args.attention not in ("auto", pipeline.model.attention):
    pipeline.model = pipeline.model.clone(attention=args.attention)
    pipeline.sampler = registry.load(kind.sampler)(pipeline.model, pipeline.params, pipeline.tokenizer)
  rng, sampler, dtype = np.random.default_rng(0), pipeline.sampler, str(pipeline.model.dtype)
  shorter = 1 if work and work.same_lengths else min(8, args.prompt_tokens)
  lengths = np.asarray([args.prompt_tokens - i % shorter for i in range(n)], np.int32)
  tokens = rng.integers(10, 500, (n, -(-args.prompt_tokens // 32) * 32)).astype(np.int32)
  tokens[:, 0] = pipeline.tokenizer.bos
  start = sampler.start(range(n))
  write = lambda: jax.block_until_ready(sampler.write(tokens, lengths, start, chosen))
  if hasattr(sampler, "halves"):
    first, second = sampler.halves
    written, first_seconds = inference.first(write)
    pixels, second_seconds = inference.first(lambda: sampler.decode(written))
    calls: dict[str, Callable[[], Any]] = {first: write, second: lambda: sampler.decode(written)}
  else:
    first, second = "sample", ""
    calls = {first: lambda: sampler.sample(tokens, lengths, start, chosen)}
    (pixels, first_seconds), second_seconds = inference.first(calls[first]), 0.0
  report = inference.about("generate", pipeline)
  with versus.torch_side(args, work, source, dtype) as torch:
    if torch:
      request = work.request(chosen)
      ours = work.moved(written)
      inputs = work.inputs(tokens[:, : args.prompt_tokens], start, pipeline.tokenizer)
      torch.give(lengths=lengths, written=ours, **inputs)
      report["difference"] = {
        first: work.differ(ours, torch.result(**request), dtype),
        second: versus.agree("pixels", versus.channels_first(pixels), torch.result(do="decode"), dtype),
      }
      calls[f"torch {first}"] = lambda: torch.call(**request)
      calls[f"torch {second}"] = lambda: torch.call(do="decode")
    measured = inference.in_turn(calls, args.repeats)
  median, parts = inference.median, [part for part in (first, second) if part]
  seconds = sum(median(measured[part]) for part in parts)
  evaluations = sampler.evaluations(chosen)
  count = registry.load(kind.flops)
  total = sum(count.image(c, chosen, int(length)) for length in lengths) if count else None
  chip, reads = inference.chip(), getattr(count, "step_bytes", None)
  step_bytes = reads and reads(c, chosen, args.prompt_tokens, n, pipeline.model.dtype.itemsize)
  per_step = {k: v / evaluations for k, v in measured[first]["seconds"].items()}
  report |= {
    "pictures": n,
    "attention": pipeline.model.attention,
    **kind.told(chosen),
    "seconds_per_step": per_step,
    "seconds_decode": measured[second]["seconds"] if second else None,
    "images_per_second": n / seconds,
    "model_flops": total,
    "mfu": chip and total and total / seconds / chip.peak_flops,
    "bytes_per_step": step_bytes,
    "bandwidth_share": chip and step_bytes and step_bytes / per_step["median"] / chip.memory_bandwidth,
    "peak_bytes": inference.peak_bytes(),
    "compile_seconds": max(0.0, first_seconds + second_seconds - seconds),
  }
  if torch:
    theirs = sum(median(measured[f"torch {part}"]) for part in parts)
    ratio = lambda part, clock: median(measured[f"torch {part}"], clock) / median(measured[part], clock)
    report["torch"] = {"images_per_second": n / theirs, **torch.about}
    report["speedup"] = {"all": theirs / seconds} | {part: ratio(part, "seconds") for part in parts}
    report["speedup_cpu_seconds"] = {part: ratio(part, "cpu_seconds") for part in parts}
  return {name: value for name, value in report.items() if value is not None or name == "mfu"}


def _check_fused(head_dim: int, dtype: str) -> None:
  """Raises UserError where the device or the model has no fused causal kernel."""
  if (platform := jax.default_backend()) != "gpu":
    raise UserError(f"--attention=fused needs a GPU, and this is a {platform}")
  if not kernels.fuses_causal(dtype, head_dim):
    raise UserError(
      f"--attention=fused needs --dtype=bfloat16 and heads of at most 128 and a multiple of 8, not {dtype} and {head_dim}"
    )
