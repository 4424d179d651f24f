"""Preference optimisation of Janus or Janus-Pro on pairs of pictures, as ../dpo.py. Not in the papers.

  jflow train --config=janus/dpo:pro-1b --workdir=runs/dpo --config.train.init_from=Janus-Pro-1B \\
    --config.data.tokenizer=Janus-Pro-1B --config.rl.pairs=data/pairs
  jflow train --config=janus/dpo:tiny --workdir=runs/tiny_dpo               # a minute or two, built-in pairs
"""

from configs import dpo
from configs.janus import grpo


def get_config(size: str = "1b"):
  return dpo.preferred(grpo.get_config(size), beta=50.0)
