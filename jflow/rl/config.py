"""The section `rl` of a run config: reinforcement learning."""

import dataclasses

from jflow.config import RunConfig, constraint
from jflow.sections import Section, field
from jflow.values import number, one_of, text, weighted, whole


class RlConfig(Section):
  """Learning from rewards or preferences, in place of the losses of `objective`; the values are in configs/base.py."""

  method: str = field(one_of("", "grpo", "dpo"), before="")
  prompts: str = field(text, before="")
  group: int = field(whole(2, 2**16, "; a picture is compared with others of its prompt"), before=8)
  rewards: tuple = field(weighted("(reward, weight) pairs with weights of 0 or more, as (('strict', 1.0),)"), before=())
  timeout: float = field(number(above=0.0, most=10**7), before=60.0)
  retries: int = field(whole(0, 1000), before=3)
  advantage: str = field(one_of("group", "batch", "mean"), before="group")
  clip: float = field(number(above=0.0), before=1e-3)
  kl: float = field(number(0.0, note="; 0 turns it off"), before=0.0)
  updates: int = field(whole(1, 2**16), before=1)
  pairs: str = field(text, before="")
  beta: float = field(number(above=0.0), before=1.0)
  explore: dict = field(number(), before={})

  @property
  def refers(self) -> bool:
    """Whether the objective compares with the parameters of step 0."""
    return self.method == "dpo" or bool(self.method and self.kl)


@constraint("rl.group")
def _groups_fill_a_batch(c: RunConfig) -> str:
  fits = c.rl.method != "grpo" or c.train.batch_size % c.rl.group == 0
  return "" if fits else f"must divide train.batch_size={c.train.batch_size}, the pictures of a step"


@constraint("rl.updates")
def _updates_cut_a_batch(c: RunConfig) -> str:
  parts, shards = c.rl.updates * c.train.accumulation, c.mesh.data * c.mesh.fsdp
  fits = not c.rl.method or c.train.batch_size % (parts * shards) == 0
  return "" if fits else f"times train.accumulation x mesh.data x mesh.fsdp must divide {c.train.batch_size} pictures"


_OF_METHOD = {
  "grpo": ("prompts", "rewards", "group", "timeout", "retries", "advantage", "clip", "kl", "updates"),
  "dpo": ("pairs", "beta"),
}


def _only_of(method: str, name: str) -> None:
  """Constrains a field that one method reads: with another it must be what it is where nobody sets it."""
  (unset,) = (field.metadata["before"] for field in dataclasses.fields(RlConfig) if field.name == name)

  @constraint(f"rl.{name}")
  def check(c: RunConfig) -> str:
    fits = c.rl.method == method or getattr(c.rl, name) == unset
    return "" if fits else f"must be {unset!r} without rl.method={method!r}"


for _method, _names in _OF_METHOD.items():
  for _name in _names:
    _only_of(_method, _name)


@constraint("data.crop")
def _pairs_are_cropped(c: RunConfig) -> str:
  return "" if c.rl.method != "dpo" or c.data.crop != "pad" else "must not be 'pad' with rl.method='dpo', which crops"


@constraint("data.stored")
def _nothing_is_stored(c: RunConfig) -> str:
  return (
    ""
    if not c.rl.method or not c.data.stored
    else "must be False with rl.method, whose pictures have no latents or codes"
  )


@constraint("objective.logged")
def _no_loss_is_logged(c: RunConfig) -> str:
  return "" if not c.rl.method or not c.objective.logged else "must be () with rl.method, which computes no such loss"


@constraint("rl.rewards")
def _something_is_rewarded(c: RunConfig) -> str:
  fits = c.rl.method != "grpo" or any(weight for _, weight in c.rl.rewards)
  return "" if fits else "must hold a weight above 0, as (('strict', 1.0),)"


@constraint("rl.prompts")
def _there_are_prompts(c: RunConfig) -> str:
  return "" if c.rl.method != "grpo" or c.rl.prompts else "must name a file of JSON lines, or 'shapes'"


@constraint("rl.pairs")
def _there_are_pairs(c: RunConfig) -> str:
  return "" if c.rl.method != "dpo" or c.rl.pairs else "must name a folder with pairs.jsonl, or 'shapes'"


@constraint("compute.matmul")
def _policies_compute_in_the_dtype(c: RunConfig) -> str:
  return "" if not c.rl.method or c.compute.matmul == "dtype" else "must be 'dtype' with rl.method"


@constraint("data.validation")
def _nothing_is_held_out(c: RunConfig) -> str:
  return "" if not c.rl.method or not c.data.validation else "must be 0 with rl.method, which has no records"


@constraint("train.epochs")
def _steps_are_given(c: RunConfig) -> str:
  return "" if not c.rl.method or not c.train.epochs else "must be 0 with rl.method: give train.steps"


@constraint("compute.remat")
def _nothing_is_fitted(c: RunConfig) -> str:
  return (
    "" if not c.rl.method or c.compute.remat != "auto" else "must name what is kept with rl.method: 'none', 'full', ..."
  )


@constraint("compute.memory_gib")
def _no_memory_is_checked(c: RunConfig) -> str:
  return (
    "" if not c.rl.method or not c.compute.memory_gib else "must be 0 with rl.method, whose programs are not fitted"
  )


@constraint("optimizer.trained")
def _the_reference_stays(c: RunConfig) -> str:
  fits = not (c.rl.refers and c.lora.rank and c.optimizer.trained)
  return "" if fits else "must be () with adapters and a reference, which is the base without them (or rl.kl=0 of grpo)"
