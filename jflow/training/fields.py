"""What each field of a config may be: one row per field of configs/base.py but the model's, which its own class checks."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jflow.batch import TASKS
from jflow.errors import UserError

_MOST = 2**31 - 1  # of what counts steps or records: jax counts in int32
_SECONDS = 10**7  # four months; timers take no more of some kinds

# A value -> what it must be, "" where it is that.
Check = Callable[[Any], str]


def whole(least: int, most: int = _MOST, note: str = "") -> Check:
  """A whole number from `least` to `most`."""

  def check(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
      return "must be a whole number"
    if value < least:
      return ("must not be negative" if least == 0 else f"must be at least {least}") + note
    return f"must be at most {most}" if value > most else ""

  return check


def number(
  least: float = -math.inf, most: float = math.inf, above: float = -math.inf, below: float = math.inf, note: str = ""
) -> Check:
  """A finite number, at least and at most, above and below something."""

  def check(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
      return "must be a finite number"
    if above == 0 and value <= 0:
      return "must be positive" + note
    if least == 0 and below == math.inf == most and value < 0:
      return "must not be negative" + note
    if not (least <= value <= most and above < value < below):
      low, high = (
        (f"[{least:g}" if math.isfinite(least) else "("),
        (f"{most:g}]" if most < math.inf else f"{below:g})"),
      )
      return f"must be in {low}, {high}"
    return ""

  return check


def text(value: Any) -> str:
  """Text of one line."""
  return "" if isinstance(value, str) and not re.search(r"[\x00-\x1f\x7f]", value) else "must be text of one line"


def truth(value: Any) -> str:
  return "" if isinstance(value, bool) else "must be true or false"


def words(value: Any) -> str:
  """Names, none of them empty."""
  fine = isinstance(value, (tuple, list)) and all(isinstance(one, str) and one and not text(one) for one in value)
  return "" if fine else "must be a tuple of texts, as ('a', 'b')"


def patterns(value: Any) -> str:
  """Regular expressions."""
  if words(value):
    return "must be a tuple of patterns, as ('language_model/layers',)"
  for one in value:
    try:
      re.compile(one)
    except (re.error, RecursionError, OverflowError) as error:
      return f"holds {one[:60]!r}, which is no regular expression: {error}"
  return ""


def one_of(*choices: str) -> Check:
  told = " or ".join(map(repr, choices))
  return lambda value: "" if isinstance(value, str) and value in choices else f"must be {told}"


def pairs(value: Any) -> str:
  """((part, checkpoint), ...)."""
  fine = isinstance(value, (tuple, list)) and all(
    isinstance(one, (tuple, list)) and len(one) == 2 and not words(one) for one in value
  )
  return "" if fine else "must be a tuple of (part, checkpoint), as (('understanding_encoder', 'DIR'),)"


def weighted(example: str) -> Check:
  """((name, weight), ...) with weights that are not negative."""

  def check(value: Any) -> str:
    fine = isinstance(value, (tuple, list)) and all(
      isinstance(one, (tuple, list)) and len(one) == 2 and not text(one[0]) and one[0] and not number(0)(one[1])
      for one in value
    )
    return "" if fine else f"must be a tuple of {example}"

  return check


def mixture(value: Any) -> str:
  """((first step, (weight per task)), ...), from step 0 on and rising."""
  what = f"must be a tuple of (from step, ({', '.join(TASKS)})), as ((0, (30, 50, 20)),)"
  if not isinstance(value, (tuple, list)) or not value:
    return what
  for one in value:
    if not isinstance(one, (tuple, list)) or len(one) != 2 or whole(0)(one[0]):
      return what
    if not isinstance(one[1], (tuple, list)) or len(one[1]) != len(TASKS) or any(map(number(0), one[1])):
      return what
    if not 0 < sum(one[1]) < math.inf:
      return "must give some task a weight above 0 from each step on"
  starts = [one[0] for one in value]
  return "" if starts[0] == 0 and starts == sorted(set(starts)) else "must start at step 0 and rise"


def prompts(value: Any) -> str:
  fine = isinstance(value, (tuple, list)) and all(isinstance(one, str) and one.strip() for one in value)
  return "" if fine else "must be a tuple of texts"


def guidance(value: Any) -> str:
  """w of eq. 5."""
  return "must be at least 1, or 0" if number(0)(value) or 0 < value < 1 else ""


def address(value: Any) -> str:
  found = re.fullmatch(r"(\S+:([0-9]{1,5}))?", value) if isinstance(value, str) else None
  return "" if found and int(found[2] or 0) < 2**16 else "must be HOST:PORT of process 0"


_OFF = "; 0 turns it off"
_SOURCES = weighted("(directory, weight) pairs, as (('DIR', 1.0),)")

FIELDS: dict[str, Check] = {
  "size": text,
  "train.steps": whole(1),
  "train.batch_size": whole(1, 2**20),
  "train.accumulation": whole(1, 2**20),
  "train.seed": lambda value: whole(0, 2**32 - 1)(value) and "must be in [0, 2**32)",
  "train.ema": number(least=0.0, below=1.0),
  "train.init_from": text,
  "train.init_weights": one_of("ema", "raw"),
  "train.init_fresh": words,
  "train.init_parts": pairs,
  "train.init_dropped": words,
  "train.max_skipped": whole(1),
  "train.spike_sigmas": number(0.0, note=_OFF),
  "train.spike_window": whole(2, 2**20),
  "train.watchdog_seconds": number(0.0, _SECONDS),
  "train.fit_labels": whole(0, 10**7, "; 0 leaves SigLIP fresh"),
  "train.fit_images": whole(1, 10**6),
  "optimizer.learning_rate": number(above=0.0),
  "optimizer.warmup_steps": whole(0),
  "optimizer.cooldown_start": whole(0),
  "optimizer.cooldown_steps": whole(0),
  "optimizer.beta1": number(least=0.0, below=1.0),
  "optimizer.beta2": number(least=0.0, below=1.0),
  "optimizer.epsilon": number(above=0.0),
  "optimizer.weight_decay": number(0.0),
  "optimizer.clip_norm": number(above=0.0),
  "optimizer.muon": patterns,
  "optimizer.trained": patterns,
  "optimizer.frozen": patterns,
  "objective.time_mean": number(),
  "objective.time_std": number(above=0.0),
  "data.tokenizer": text,
  "data.template": one_of("plain", "chat"),
  "data.row_tokens": whole(1),
  "data.row_images": whole(1, 2**16),
  **{f"data.sources.{task}": _SOURCES for task in TASKS},
  "data.mixture": mixture,
  "data.first_sentence": number(0.0, 1.0),
  "data.prompt_drop": number(0.0, 1.0),
  "data.latents": truth,
  "data.workers": whole(0, 1024),
  "data.threads": whole(0, 1024),
  "data.prefetch": whole(0, 1024),
  "data.plan_cache": text,
  "data.max_rejected_share": number(0.0, 1.0),
  "data.shapes.size": whole(1, 10**8),
  "data.shapes.seed": whole(-_MOST, 2**63 - 1),
  "data.shapes.split": text,
  "data.shapes.long_captions": number(0.0, 1.0),
  "data.shapes.named_colors": number(0.0, 1.0),
  "data.shapes.in_order": number(0.0, 1.0),
  "data.shapes.asked": weighted("(kind of question, weight) pairs, as (('relation', 4.0),)"),
  "compute.dtype": one_of("float32", "bfloat16"),
  "compute.remat": text,
  "compute.attention": text,
  "compute.unroll": whole(1, 1024),
  "compute.compilation_cache": text,
  "mesh.data": whole(1, 2**20),
  "mesh.fsdp": whole(1, 2**20),
  "mesh.model": whole(1, 2**20),
  "distributed.cluster": one_of("", "auto"),
  "distributed.coordinator": address,
  "distributed.processes": whole(1, 2**20),
  "distributed.process_id": whole(0, 2**20),
  "distributed.start_seconds": whole(1, _SECONDS),
  "distributed.heartbeat_seconds": whole(1, _SECONDS),
  "checkpoint.interval": whole(1),
  "checkpoint.keep": whole(1),
  "checkpoint.keep_every": whole(0, note=_OFF),
  "profile.start": whole(0),
  "profile.steps": whole(0, note=_OFF),
  "log.every_seconds": number(0.0, _SECONDS),
  "log.tensorboard": truth,
  "log.wandb": text,
  "log.sample_every": whole(0, note=_OFF),
  "log.sample_prompts": prompts,
  "log.sample_steps": whole(1, 10_000),
  "log.sample_guidance": guidance,
  # Of the model, whose class checks the rest: depths that would be built layer by layer, for hours.
  **dict.fromkeys(
    (
      "model.language_model.layers",
      "model.understanding_encoder.layers",
      "model.generation.encoder_blocks",
      "model.generation.decoder_blocks",
      "model.autoencoder.layers_per_block",
    ),
    whole(-_MOST, 1024),
  ),
}


def flat(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
  """Yields (dotted name, value) of each field of nested sections."""
  for name, value in config.items():
    if isinstance(value, Mapping):
      yield from flat(value, f"{before}{name}.")
    else:
      yield before + str(name), value


def check(config: Mapping[str, Any]) -> None:
  """Checks the fields that are there, one by one.

  Raises:
    UserError: naming the first field that is not what it must be, and its value.
  """
  for name, value in flat(config):
    if what := FIELDS[name](value) if name in FIELDS else "":
      raise refusal(name, value, what)


def refusal(name: str, value: Any, what: str) -> UserError:
  """The error of a field whose value is not what it must be."""
  return UserError(f"config.{name}={shown(value)} {what}")


def shown(value: Any, most: int = 200) -> str:
  """A value as a message shows it: on one line, and not all of a long one."""
  try:
    told = repr(value)
  except ValueError:  # Python writes no number of more than 4,300 digits
    return "a number of thousands of digits"
  return told if len(told) <= most else f"{told[:most]}... ({len(told):,} characters)"


def check_complete(config: Mapping[str, Any]) -> None:
  """Checks that no field is missing, as in a config that was not made from configs/base.py.

  Raises:
    UserError: naming the first one.
  """
  there = {name for name, _ in flat(config)}
  sections = {name.rpartition(".")[0] for name in there}
  missing = [name for name in FIELDS if name not in there and not name.startswith("model.")]
  if "model" not in config:
    missing.insert(0, "model")
  if missing:
    where = missing[0].rpartition(".")[0]
    what = f"field {missing[0]}" if where in sections or not where else f"section {where}"
    raise UserError(f"the config has no {what}: start from what configs/base.py returns")
