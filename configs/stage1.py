"""Stage 1, adaptation: the new parts learn to sit between frozen LLM, SigLIP and VAE (paper section 3.3, table 1).

  python -m jflow train --config=configs/stage1.py --workdir=runs/stage1 \\
    --config.train.init_from=runs/parts --config.data.tokenizer=... --config.data.sources.generation="(('DIR', 1.0),)"
  python -m jflow train --config=configs/stage1.py:tiny --workdir=runs/tiny1     # seconds, built-in data
"""

from configs import base, world


def get_config(size: str = ""):
  c = base.base(size)
  c.data.mixture = ((0, (50, 50, 0)),)
  c.train.init_fresh = ("alignment_head",)
  c.optimizer.trained = base.NEW_PARTS
  c.optimizer.frozen = ("language_model",) + base.SIGLIP + base.NEVER
  if c.size in base.PAPER:
    c.train.steps = 10_000
  return world.at_stage(c, 1)
