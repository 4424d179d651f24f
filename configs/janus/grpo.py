"""Reinforcement learning of Janus or Janus-Pro: GRPO on the log-probabilities of codes (jflow/rl/README.md).

Not in the papers.

  jflow train --config=janus/grpo:pro-1b --workdir=runs/grpo --config.train.init_from=Janus-Pro-1B \\
    --config.data.tokenizer=Janus-Pro-1B --config.rl.prompts=prompts.jsonl \\
    "--config.rl.rewards=(('http://scorer:8000/score',1.0),)"
  jflow train --config=janus/grpo:shapes --workdir=runs/grpo --config.train.init_from=runs/janus3   # the built-in world
  jflow train --config=janus/grpo:tiny --workdir=runs/tiny_grpo                                     # a minute or two

As ../grpo.py, with adapters at the published sizes, which nobody has run.
"""

from configs import grpo
from configs.janus import recipe, tune

FROZEN = ("language_model/(embed|head)", "understanding_.*", "vq")


def get_config(size: str = "1b"):
  c = recipe.at_stage(size, 3)
  c.optimizer.cooldown_steps = 0
  c.rl.explore = dict(guidance=1.0, temperature=1.0)
  c.rl.clip = 0.2  # of the ratio of one code
  if c.size in recipe.PAPER:
    return grpo.published(c, tune.BLOCKS)
  return grpo.reinforced(c, grpo.TRAINED, FROZEN)
