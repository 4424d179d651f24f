"""The section `rl` of a run config: reinforcement learning."""

from typing import Any

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


_OF_GRPO = dict(kl=0.0, updates=1, group=8, advantage="group", clip=1e-3, timeout=60.0, retries=3)  # and their defaults


def _only_of_grpo(name: str, default: Any) -> None:
  @constraint(f"rl.{name}")
  def check(c: RunConfig) -> str:
    fits = c.rl.method == "grpo" or getattr(c.rl, name) == default
    return "" if fits else f"must be {default!r} without rl.method='grpo'"


for _name, _default in _OF_GRPO.items():
  _only_of_grpo(_name, _default)


@constraint("rl.beta")
def _pairs_are_preferred(c: RunConfig) -> str:
  return "" if c.rl.method == "dpo" or c.rl.beta == 1 else "must be 1 without rl.method='dpo'"


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
  if c.rl.method != "grpo":
    return "" if not c.rl.rewards else "must be () without rl.method='grpo'"
  return "" if any(weight for _, weight in c.rl.rewards) else "must hold a weight above 0, as (('strict', 1.0),)"


@constraint("rl.prompts")
def _there_are_prompts(c: RunConfig) -> str:
  if c.rl.method != "grpo":
    return "" if not c.rl.prompts else "must be '' without rl.method='grpo'"
  return "" if c.rl.prompts else "must name a file of JSON lines, or 'shapes'"


@constraint("rl.pairs")
def _there_are_pairs(c: RunConfig) -> str:
  if c.rl.method != "dpo":
    return "" if not c.rl.pairs else "must be '' without rl.method='dpo'"
  return "" if c.rl.pairs else "must name a folder with pairs.jsonl, or 'shapes'"


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
