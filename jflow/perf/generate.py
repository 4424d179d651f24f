"""bench generate: images per second, solver and VAE timed apart, beside PyTorch on request."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jflow.errors import UserError
from jflow.generation.flow import equations as flow
from jflow.generation.flow import flops
from jflow.generation.flow import sampler as painting
from jflow.generation.flow import settings as sampling
from jflow.perf import inference


@dataclasses.dataclass(frozen=True)
class Settings(inference.Settings):
  """The settings of `bench generate`."""

  batch_size: int = 2  # images generated at once
  steps: int = 30  # of the Euler solver
  guidance: float = 2.0  # w of eq. 5
  prompt_tokens: int = 32  # of the longest prompt


def run(args: Settings) -> dict[str, Any]:
  """Runs the benchmark and returns its report."""
  for name in ("batch_size", "steps", "prompt_tokens"):
    if getattr(args, name) < 1:
      raise UserError(f"--{name}={getattr(args, name)} must be at least 1")
  pipeline = inference.open_pipeline(args)
  c, n, dtype = pipeline.model.config, args.batch_size, str(pipeline.model.dtype)
  context = c.language_model.max_length
  if args.prompt_tokens + 1 + c.patches > context:
    raise UserError(
      f"--prompt_tokens={args.prompt_tokens} and the {1 + c.patches} slots of a picture must not exceed the "
      f"context of {context}"
    )
  rng = np.random.default_rng(0)
  lengths = np.asarray([args.prompt_tokens - i % min(8, args.prompt_tokens) for i in range(n)], np.int32)
  tokens = rng.integers(10, 500, (n, -(-args.prompt_tokens // 32) * 32)).astype(np.int32)
  tokens[:, 0] = pipeline.tokenizer.bos
  noise = rng.standard_normal((n, c.latent_size, c.latent_size, c.autoencoder.latent_channels)).astype(np.float32)
  guided = args.guidance != 1.0

  def solve() -> jax.Array:
    prefix = painting.read_prompts(pipeline.model, pipeline.params, tokens, lengths, guided=guided)
    grid = np.pad(np.asarray(flow.time_grid(args.steps)), (0, -args.steps % 256), mode="edge")
    return painting.solve(
      pipeline.model,
      pipeline.params,
      prefix,
      lengths,
      noise,
      grid,
      np.int32(0),
      np.int32(args.steps),
      np.int32(args.steps),
      np.float32(args.guidance),
      np.asarray([0.0, 1.0], np.float32),
      solver="euler",
      release=False,
    ).block_until_ready()

  def decode() -> jax.Array:
    at_once = painting.decoded_at_once(c.image_size)
    return painting.decode(pipeline.model, pipeline.params, z, at_once=at_once).block_until_ready()

  first_moves = lambda x: np.ascontiguousarray(np.asarray(x, np.float32).transpose(0, 3, 1, 2))
  z, first_solve = inference.first(solve)
  _, first_decode = inference.first(decode)
  calls = {"solve": solve, "decode": decode}
  report = inference.about("generate", pipeline)
  with inference.torch_side(args, pipeline) as torch:
    if torch:
      torch.load(tokens=tokens, lengths=lengths, noise=first_moves(noise), latents=first_moves(z))
      painted = torch.result(do="solve", steps=args.steps, guidance=args.guidance)
      pixels = torch.result(do="decode")
      report["difference"] = {
        "solve": inference.agree("latents", first_moves(z), painted, dtype),
        "decode": inference.agree("pixels", first_moves(decode()), pixels, dtype),
      }
      calls["torch solve"] = lambda: torch.call(do="solve", steps=args.steps, guidance=args.guidance)
      calls["torch decode"] = lambda: torch.call(do="decode")
    measured = inference.in_turn(calls, args.repeats)
  median = inference.median
  seconds = median(measured["solve"]) + median(measured["decode"])
  total = sum(
    flops.image(c, sampling.Settings(steps=args.steps, guidance=args.guidance), int(length)) for length in lengths
  )
  chip = inference.chip()
  report |= {
    "pictures": n,
    "steps": args.steps,
    "guidance": args.guidance,
    "seconds_per_step": {k: v / args.steps for k, v in measured["solve"]["seconds"].items()},
    "seconds_decode": measured["decode"]["seconds"],
    "images_per_second": n / seconds,
    "model_flops": total,
    "mfu": chip and total / seconds / chip.peak_flops,
    "peak_bytes": inference.peak_bytes(),
    "compile_seconds": max(0.0, first_solve + first_decode - seconds),
  }
  if torch:
    theirs = median(measured["torch solve"]) + median(measured["torch decode"])
    ratio = lambda part, clock: median(measured[f"torch {part}"], clock) / median(measured[part], clock)
    report["torch"] = {"images_per_second": n / theirs, **torch.about}
    report["speedup"] = {"all": theirs / seconds} | {part: ratio(part, "seconds") for part in ("solve", "decode")}
    report["speedup_cpu_seconds"] = {part: ratio(part, "cpu_seconds") for part in ("solve", "decode")}
  return {name: value for name, value in report.items() if value is not None or name == "mfu"}
