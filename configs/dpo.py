"""Preference optimisation of a trained model on pairs of pictures (jflow/rl/README.md). Not in the paper.

  jflow train --config=dpo --workdir=runs/dpo --config.train.init_from=runs/janusflow \\
    --config.data.tokenizer=runs/janusflow/tokenizer --config.rl.pairs=data/pairs
  jflow train --config=dpo:tiny --workdir=runs/tiny_dpo                     # a minute or two, built-in pairs

data/pairs/pairs.jsonl holds lines {"prompt": ..., "better": FILE, "worse": FILE}. train.batch_size counts pairs.
"""

from ml_collections import ConfigDict

from configs import grpo


def preferred(c: ConfigDict, beta: float) -> ConfigDict:
  """Turns a config of rewards into one of pairs; `beta`: of mean log-likelihoods."""
  published = bool(c.lora.rank)
  c.rl.method, c.rl.prompts, c.rl.rewards, c.rl.kl, c.rl.updates = "dpo", "", (), 0.0, 1
  c.rl.beta, c.rl.pairs = beta, "" if published else "shapes"
  c.rl.clip, c.rl.group, c.rl.advantage = 1e-3, 8, "group"  # of rewards
  if c.size not in ("tiny",):
    c.train.batch_size = 32
    c.train.accumulation = 8 if published else 1
  return c


def get_config(size: str = ""):
  return preferred(grpo.get_config(size), beta=2000.0)
