"""Reinforcement learning of a trained model by Flow-GRPO: rewards of its own pictures (jflow/rl/README.md).

Not in the paper.

  jflow train --config=grpo --workdir=runs/grpo --config.train.init_from=runs/janusflow \\
    --config.data.tokenizer=runs/janusflow/tokenizer --config.rl.prompts=prompts.jsonl \\
    "--config.rl.rewards=(('http://scorer:8000/score',1.0),)"
  jflow train --config=grpo:quick --workdir=runs/grpo --config.train.init_from=runs/stage3    # the built-in world, minutes
  jflow train --config=grpo:world --workdir=runs/grpo --config.train.init_from=world          # all its kinds of scenes
  jflow train --config=grpo:tiny --workdir=runs/tiny_grpo                                     # a minute or two

train.batch_size counts pictures: train.batch_size / rl.group prompts a step. At 384 adapters are trained and the frozen
base is the reference; nobody has run this size. The sizes of the world train all weights.
"""

from ml_collections import ConfigDict

from configs import base, tune

# LLM and writer; what only reads, and what only speaks, has no part in a picture.
TRAINED = ("language_model/layers", "language_model/norm", "generation_.*")
FROZEN = ("language_model/(embed|head)", "understanding_.*", "vae")


def reinforced(c: ConfigDict, trained: tuple[str, ...], frozen: tuple[str, ...]) -> ConfigDict:
  """Returns the config of a run that trains all weights that patterns name on rewards of the built-in world."""
  c.rl.method, c.rl.prompts, c.rl.rewards = "grpo", "shapes", (("strict", 1.0),)
  c.optimizer.trained, c.optimizer.frozen = trained, frozen
  c.optimizer.weight_decay, c.optimizer.warmup_steps, c.optimizer.muon, c.optimizer.rates = 0.0, 5, (), ()
  c.optimizer.learning_rate = 1e-4
  c.train.ema = 0.0
  c.compute.remat = "none"
  c.data.template = "chat"
  c.train.steps, c.train.batch_size, c.rl.group, c.checkpoint.interval = 200, 96, 16, 50
  c.rl.advantage = "batch"  # most groups of an easy prompt differ by one picture
  if c.size == "tiny":
    c.train.steps, c.train.batch_size, c.rl.group, c.checkpoint.interval = 4, 8, 4, 2
    c.rl.rewards = (("strict", 1.0), ("true", 0.1))  # a fresh model shows nothing that the judge could accept
  return c


def published(c: ConfigDict, blocks: tuple[str, ...]) -> ConfigDict:
  """Returns the config of a run of adapters on a published model; prompts and rewards are the user's."""
  c.lora.rank, c.lora.alpha, c.lora.patterns, c.lora.frozen_dtype = 16, 32.0, blocks, "bfloat16"
  c.optimizer.trained, c.optimizer.frozen = (), (".*",)
  c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.weight_decay = 2e-4, 20, 0.0
  c.rl.method, c.train.ema = "grpo", 0.0
  c.train.batch_size, c.rl.group, c.train.accumulation, c.train.steps = 96, 24, 12, 300
  c.checkpoint.interval = 50
  c.rl.kl, c.rl.updates = 0.01, 2
  c.compute.remat = "full"
  return c


def get_config(size: str = ""):
  c = base.base(size)
  c.model.objectives, c.objective.weights = {}, dict(text=1.0, flow=1.0)
  c.train.init_dropped = ("alignment_head",)
  c.data.template = "chat"
  c.rl.explore = dict(steps=10, noise=0.7, window=0, guidance=1.0, normalised=1)
  if c.size in base.PAPER:
    return published(c, tune.BLOCKS)
  c.rl.explore.steps, c.rl.explore.window = (4, 0) if c.size == "tiny" else (6, 2)
  c = reinforced(c, TRAINED, FROZEN)
  if c.size == "world":  # learns what it paints with guidance, which costs twice as much
    c.rl.explore.guidance, c.train.steps, c.checkpoint.interval = 3.0, 600, 120
    c.optimizer.learning_rate, c.rl.kl = 2.5e-4, 0.002  # the weight holds back what the judge does not see
    c.optimizer.cooldown_start = c.optimizer.cooldown_steps = c.train.steps // 2  # counted in updates
  return c
