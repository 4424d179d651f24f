"""The run config as frozen dataclasses: the type and the constraint of each field, once.

configs/base.py holds the values, with unit and source beside each; no field has a default here. A config file becomes a
`RunConfig` once, in `jflow.training.config_files.load`; after that the code reads attributes. To add a field, add a
line here and a line in configs/base.py. A field that the config.json of an earlier version lacks also declares what
that version did (`before`); one that had another name stands in `RENAMED`.

The section `model` is opaque here: the model's own dataclasses (`jflow.models.config`) build and check it. Two sections
are those of the built-in world, which declares their fields and constraints.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from jflow.errors import install_line
from jflow.sections import Section, built, field, refusal, section
from jflow.values import (
  address,
  factors,
  number,
  one_of,
  pairs,
  patterns,
  phases,
  prompts,
  setting,
  text,
  truth,
  weighted,
  whole,
  words,
)

_SECONDS = 10**7  # four months, the limit of some timers
_OFF = "; 0 turns it off"
_SOURCES = weighted("(directory, weight) pairs, as (('DIR', 1.0),)")


class TrainConfig(Section):
  steps: int = field(whole(0))
  epochs: float = field(number(0.0), before=0.0)
  batch_size: int = field(whole(1, 2**20))
  accumulation: int = field(whole(1, 2**20))
  seed: int = field(lambda value: whole(0, 2**32 - 1)(value) and "must be in [0, 2**32)")
  ema: float = field(number(least=0.0, below=1.0))
  init_from: str = field(text)
  init_weights: str = field(one_of("ema", "raw"))
  init_fresh: tuple = field(words)
  init_parts: tuple = field(pairs, before=())
  init_dropped: tuple = field(words)
  max_skipped: int = field(whole(1))
  spike_sigmas: float = field(number(0.0, note=_OFF), before=0.0)
  spike_window: int = field(whole(2, 2**20), before=128)
  watchdog_seconds: float = field(number(0.0, _SECONDS), before=0.0)
  validation_every: int = field(whole(0, note=_OFF), before=0)
  early_stop: int = field(whole(0, note=_OFF), before=0)


class OptimizerConfig(Section):
  learning_rate: float = field(number(above=0.0))
  warmup_steps: int = field(whole(0))
  cooldown_start: int = field(whole(0), before=0)
  cooldown_steps: int = field(whole(0), before=0)
  cooldown_shape: str = field(one_of("linear", "cosine"), before="linear")
  beta1: float = field(number(least=0.0, below=1.0))
  beta2: float = field(number(least=0.0, below=1.0))
  epsilon: float = field(number(above=0.0))
  weight_decay: float = field(number(0.0))
  clip_norm: float = field(number(above=0.0))
  muon: tuple = field(patterns, before=())
  rates: tuple = field(factors, before=())
  trained: tuple = field(patterns)
  frozen: tuple = field(patterns)


class LoraConfig(Section):
  rank: int = field(whole(0, 4096, "; 0 turns adapters off"), before=0)
  alpha: float = field(number(above=0.0), before=16.0)
  patterns: tuple = field(patterns, before=("language_model/layers",))
  frozen_dtype: str = field(one_of("float32", "bfloat16"), before="float32")


class ObjectiveConfig(Section):
  weights: dict = field(number(0.0))
  logged: tuple = field(words, before=())
  draws: dict = field(number())


class SourcesConfig(Section):
  understanding: tuple = field(_SOURCES)
  generation: tuple = field(_SOURCES)
  text: tuple = field(_SOURCES)


TASKS = tuple(one.name for one in dataclasses.fields(SourcesConfig))  # in the order of the mixture's weights


class DataConfig(Section):
  tokenizer: str = field(text)
  template: str = field(one_of("plain", "chat", "pro"))
  row_tokens: int = field(whole(0))
  row_images: int = field(whole(0, 2**16))
  sources: SourcesConfig
  mixture: tuple = field(phases(*TASKS))
  caption_prompt: str = field(text, before="Generate the caption of this picture.")
  first_sentence: float = field(number(0.0, 1.0))
  prompt_drop: float = field(number(0.0, 1.0))
  crop: str = field(one_of("random", "center", "pad"), before="random")
  decode: str = field(one_of("exact", "scaled"), before="exact")
  validation: float = field(number(least=0.0, below=1.0), before=0.0)
  validation_rows: int = field(whole(1, 2**20), before=64)
  stored: bool = field(truth, before=False)
  order: str = field(one_of("global", "blocks"), before="global")
  block_records: int = field(whole(1, 2**31), before=8192)
  block_window: int = field(whole(1, 2**20), before=4)
  block_lanes: int = field(whole(1, 2**20), before=16)
  workers: int = field(whole(0, 1024))
  threads: int = field(whole(0, 1024))
  prefetch: int = field(whole(0, 1024))
  plan_cache: str = field(text, before="")
  cache: str = field(text, before="~/.cache/jflow")
  cache_gib: float = field(number(above=0.0), before=100.0)
  max_rejected_share: float = field(number(0.0, 1.0))
  shapes: Any = section("jflow.world.config:ShapesConfig")


class ComputeConfig(Section):
  dtype: str = field(one_of("float32", "bfloat16"))
  remat: str = field(text)
  attention: str = field(text, before="xla")
  matmul: str = field(one_of("dtype", "fp8"), before="dtype")
  unroll: int = field(whole(1, 1024))
  memory_gib: float = field(number(0.0), before=0.0)
  compilation_cache: str = field(text)


class MeshConfig(Section):
  data: int = field(whole(1, 2**20))
  fsdp: int = field(whole(1, 2**20))
  model: int = field(whole(1, 2**20))


class DistributedConfig(Section):
  cluster: str = field(one_of("", "auto"), before="")
  coordinator: str = field(address, before="")
  processes: int = field(whole(1, 2**20), before=1)
  process_id: int = field(whole(0, 2**20), before=0)
  start_seconds: int = field(whole(1, _SECONDS), before=300)
  heartbeat_seconds: int = field(whole(1, _SECONDS), before=30)


class CheckpointConfig(Section):
  interval: int = field(whole(1))
  keep: int = field(whole(1))
  keep_every: int = field(whole(0, note=_OFF), before=0)


class ProfileConfig(Section):
  start: int = field(whole(0), before=0)
  steps: int = field(whole(0, note=_OFF), before=0)


class LogConfig(Section):
  every_seconds: float = field(number(0.0, _SECONDS))
  tensorboard: bool = field(truth, before=False)
  wandb: str = field(text, before="")
  sample_every: int = field(whole(0, note=_OFF), before=0)
  sample_prompts: tuple = field(prompts, before=())


class RunConfig(Section):
  size: str = field(text, before="")
  model: Any
  train: TrainConfig
  optimizer: OptimizerConfig
  lora: LoraConfig
  objective: ObjectiveConfig
  sampling: Mapping = field(setting, before={})
  rl: Any = section("jflow.rl.config:RlConfig")
  data: DataConfig
  compute: ComputeConfig
  mesh: MeshConfig
  distributed: DistributedConfig
  checkpoint: CheckpointConfig
  profile: ProfileConfig
  log: LogConfig
  world: Any = section("jflow.world.config:WorldConfig")

  @classmethod
  def from_dict(cls, values: Mapping[str, Any], model: Callable[[Mapping[str, Any]], Any]) -> "RunConfig":
    """Builds the config and checks each field by itself; `check` compares fields with each other.

    Args:
      values: nested plain values, as configs/base.py returns them.
      model: builds the model's own configuration from the section `model`.

    Raises:
      UserError: a field is missing, unknown or out of its constraint; the message names the first.
    """
    return built(cls, renamed(values), model)


# The dotted name that a field had in an earlier version -> its name now. An old name still loads, everywhere.
RENAMED = {
  "data.latents": "data.stored",
  "log.sample_guidance": "sampling.guidance",
  "log.sample_steps": "sampling.steps",
  "objective.time_mean": "objective.draws.time_mean",
  "objective.time_std": "objective.draws.time_std",
  "train.fit_images": "world.fit_images",
  "train.fit_labels": "world.fit_labels",
}


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns nested plain values with each field of `RENAMED` under its name of now; where both are there, the old one
  counts, which only a file that sets it can hold."""
  new = dict(values)
  for old, now in RENAMED.items():
    section, _, name = old.partition(".")
    if not isinstance(new.get(section), Mapping) or name not in new[section]:
      continue
    new[section] = dict(new[section])
    value = new[section].pop(name)
    *inner, last = now.split(".")
    where: Any = new
    for part in inner:
      where[part] = dict(found) if isinstance(found := where.get(part, {}), Mapping) else found
      where = where[part]
      if not isinstance(where, dict):  # `built` refuses what is no section
        break
    else:
      where[last] = value
  return new


# --- between fields -------------------------------------------------------------------------------------------

# (dotted field, config -> what the field must be, or "" where it fits).
CONSTRAINTS: list[tuple[str, Callable[[RunConfig], str]]] = []


def constraint(name: str) -> Callable[[Callable[[RunConfig], str]], Callable[[RunConfig], str]]:
  """Decorator: adds a constraint, whose message is about the field `name`."""

  def add(function: Callable[[RunConfig], str]) -> Callable[[RunConfig], str]:
    CONSTRAINTS.append((name, function))
    return function

  return add


def check(config: RunConfig) -> None:
  """Checks the fields against each other.

  Raises:
    UserError: a field does not fit; the message names the first, its value, and what is allowed.
  """
  for name, needed in CONSTRAINTS:
    if what := needed(config):
      raise refusal(name, functools.reduce(getattr, name.split("."), config), what)


@constraint("train.steps")
def _there_are_steps(c: RunConfig) -> str:
  return "" if c.train.steps or c.train.epochs else "must be at least 1, or train.epochs above 0"


@constraint("train.accumulation")
def _accumulation_divides(c: RunConfig) -> str:
  fits = c.train.batch_size % c.train.accumulation == 0
  return "" if fits else f"must divide train.batch_size={c.train.batch_size}"


@constraint("train.batch_size")
def _rows_fill_the_mesh(c: RunConfig) -> str:
  parts, shards = c.train.accumulation, c.mesh.data * c.mesh.fsdp
  fits = c.train.batch_size // parts % shards == 0
  return "" if fits else f"must be a multiple of train.accumulation={parts} x mesh.data x mesh.fsdp={shards}"


@constraint("train.init_parts")
def _parts_replace_others(c: RunConfig) -> str:
  fits = not c.train.init_parts or c.train.init_from
  return "" if fits else "must be empty without train.init_from, whose parts it replaces"


@constraint("lora.rank")
def _adapters_have_a_place(c: RunConfig) -> str:
  if not c.lora.rank:
    return ""
  return "" if c.lora.patterns else "must be 0 without lora.patterns, which name the matrices that get an adapter"


@constraint("train.validation_every")
def _validation_has_records(c: RunConfig) -> str:
  fits = not c.train.validation_every or c.data.validation
  return "" if fits else "must be 0 without data.validation, the share of records that are held out"


@constraint("train.early_stop")
def _early_stop_has_a_loss(c: RunConfig) -> str:
  fits = not c.train.early_stop or c.train.validation_every
  return "" if fits else "must be 0 without train.validation_every and data.validation, whose loss decides"


@constraint("optimizer.cooldown_steps")
def _some_rate_is_left(c: RunConfig) -> str:
  start, steps = c.optimizer.cooldown_start, c.optimizer.cooldown_steps
  updates, named = c.train.steps, "train.steps"
  if c.rl.method == "grpo":
    updates, named = c.train.steps * c.rl.updates, "train.steps * rl.updates"
  fits = not steps or updates <= start + steps
  return "" if fits else f"must be 0, or end the cool-down at {named} = {updates} or later, not at {start + steps}"


@constraint("data.row_tokens")
def _rows_fit_the_language_model(c: RunConfig) -> str:
  most = c.model.language_model.max_length
  if not c.data.row_tokens:  # `config_files.load` puts a number in its place
    return "must be at least 1"
  return "" if c.data.row_tokens <= most else f"must be at most model.language_model.max_length={most}"


@constraint("data.row_images")
def _images_have_tokens(c: RunConfig) -> str:
  most = c.data.row_tokens
  if not c.data.row_images:
    return "must be at least 1"
  return "" if c.data.row_images <= most else f"must be at most data.row_tokens={most}"


@constraint("data.tokenizer")
def _there_is_a_tokenizer(c: RunConfig) -> str:
  there = c.data.tokenizer or c.train.init_from
  return "" if there else "must name a directory with tokenizer.json, without train.init_from, which may have one"


@constraint("data.stored")
def _what_is_read_is_not_stored(c: RunConfig) -> str:
  if not c.data.stored or c.model.reader.kind == "siglip":
    return ""
  return "must be False with another model.reader.kind than 'siglip': images to read have no stored latents"


@constraint("data.crop")
def _stored_images_have_their_crop(c: RunConfig) -> str:
  fits = not c.data.stored or c.data.crop == "random"
  return "" if fits else "must be 'random' with data.stored: images that are encoded ahead have random squares"


@constraint("objective.weights")
def _something_is_learned(c: RunConfig) -> str:
  return "" if any(c.objective.weights.values()) else "must hold a weight above 0"


@constraint("distributed.process_id")
def _a_process_of_the_run(c: RunConfig) -> str:
  count = c.distributed.processes
  return "" if c.distributed.process_id < count else f"must be in [0, distributed.processes={count})"


@constraint("distributed.coordinator")
def _processes_find_each_other(c: RunConfig) -> str:
  d = c.distributed
  return "" if d.cluster == "auto" or d.processes == 1 or d.coordinator else "must be HOST:PORT of process 0"


@constraint("log.tensorboard")
def _tensorboard_is_installed(c: RunConfig) -> str:
  return _installed("tensorboard") if c.log.tensorboard else ""


@constraint("log.wandb")
def _wandb_is_installed(c: RunConfig) -> str:
  return _installed("wandb") if c.log.wandb else ""


def _installed(package: str) -> str:
  there = importlib.util.find_spec(package) is not None
  return "" if there else f"needs the package {package}: {install_line('log')}"
