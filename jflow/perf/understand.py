"""bench understand: time to the first token and tokens per second after it, beside PyTorch on request."""

import dataclasses
from typing import Any

import numpy as np

from jflow.errors import Stopped, UserError
from jflow.inference import reading
from jflow.inference.decoding import Decoder, Request
from jflow.models import flops as model_flops
from jflow.perf import inference, versus


@dataclasses.dataclass(frozen=True)
class Settings(inference.Settings):
  """The settings of `bench understand`."""

  batch_size: int = 1  # answers generated at once
  new_tokens: int = 64  # of each answer
  question_tokens: int = 64  # beside the picture


def run(args: Settings) -> dict[str, Any]:
  """Runs the benchmark and returns its report."""
  for name, least in (("batch_size", 1), ("new_tokens", 2), ("question_tokens", 3)):
    if getattr(args, name) < least:
      raise UserError(f"--{name}={getattr(args, name)} must be at least {least}")
  source = inference.open_source(args)
  work = versus.work_of(args, source.config)
  pipeline = source.pipeline()
  c, n, count = pipeline.model.config, args.batch_size, args.new_tokens
  slots, lm = 1 + c.patches, c.language_model
  length = 1 + slots + args.question_tokens
  if length + count > lm.max_length:
    raise UserError(f"{length} tokens of a prompt and {count} of its answer exceed the context of {lm.max_length}")
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (n, c.image_size, c.image_size, 3), np.uint8)
  tokens = rng.integers(10, 500, (n, length)).astype(np.int32)
  tokens[:, 0] = pipeline.tokenizer.bos

  def answer(made: int) -> np.ndarray:
    decoder = Decoder(pipeline, n, length + count, ignore_end=True)
    rows = [decoder.admit(Request(tokens[i], (1,), images[i : i + 1], made, 0.0, 1.0, 0)) for i in range(n)]
    out: dict[int, list[int]] = {row: [] for row in rows}
    while decoder.busy:
      for slot, new, _ in decoder.step(min(reading.CHUNK, made - 1)):
        out[slot] += new
    return np.asarray([out[row] for row in rows])

  calls = {"first": lambda: answer(1), "all": lambda: answer(count)}
  _, first_seconds = inference.first(calls["all"])
  report = inference.about("understand", pipeline)
  with versus.torch_side(args, work, source, pipeline.model.dtype) as torch:
    if torch:
      pixels = np.ascontiguousarray(images.astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1)
      torch.give(tokens=tokens, lengths=np.full(n, length), starts=np.ones((n, 1), int), pixels=pixels)
      theirs, ours = torch.result(do="answer", count=count), answer(count)
      report["same_tokens"] = float(np.mean(ours == theirs))
      if str(pipeline.model.dtype) == "float32" and (ours != theirs).any():
        raise Stopped("jflow and PyTorch answer differently, so their times say nothing")
      calls["torch first"] = lambda: torch.call(do="answer", count=1)
      calls["torch all"] = lambda: torch.call(do="answer", count=count)
    measured = inference.in_turn(calls, args.repeats)
  median = inference.median
  after = lambda side, clock="seconds": max(
    1e-9, median(measured[f"{side}all"], clock) - median(measured[f"{side}first"], clock)
  )
  rate = lambda side: n * (count - 1) / after(side)
  chip, itemsize = inference.chip(), pipeline.model.dtype.itemsize
  seconds_per_token = n / rate("")
  read = model_flops.token_bytes(lm, length + count // 2, n, itemsize)
  report |= {
    "answers": n,
    "prompt_tokens": length,
    "new_tokens": count,
    "seconds_to_first": measured["first"]["seconds"],
    "seconds_per_answer_batch": measured["all"]["seconds"],
    "tokens_per_second": rate(""),
    "bytes_per_step": read,
    "bandwidth_share": chip and read / seconds_per_token / chip.memory_bandwidth,
    "peak_bytes": inference.peak_bytes(),
    "compile_seconds": max(0.0, first_seconds - median(measured["all"])),
  }
  if torch:
    report["torch"] = {"tokens_per_second": rate("torch "), **torch.about}
    report["speedup"] = {
      "decode": rate("") / rate("torch "),
      "first": median(measured["torch first"]) / median(measured["first"]),
      "all": median(measured["torch all"]) / median(measured["all"]),
    }
    report["speedup_cpu_seconds"] = {"decode": after("torch ", "cpu_seconds") / after("", "cpu_seconds")}
  return {name: value for name, value in report.items() if value is not None or name == "bandwidth_share"}
