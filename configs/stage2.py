"""Stage 2, unified pre-training: everything but SigLIP and the VAE learns (paper section 3.3, table 1).

The mixture is 30 : 50 : 20 for the first 10,000 steps, then 14 : 80 : 6. The paper says 390,000 steps, its
slides 380,000.

  python -m jflow train --config=configs/stage2.py --workdir=runs/stage2 --config.train.init_from=runs/stage1
"""

from configs import base, world


def get_config(size: str = ""):
  c = base.base(size)
  c.data.mixture = ((0, (30, 50, 20)), (10_000, (14, 80, 6)))
  c.train.init_fresh = ("alignment_head",)  # the published checkpoint has none
  c.optimizer.trained = base.NEW_PARTS + ("language_model",)
  c.optimizer.frozen = base.SIGLIP + base.NEVER
  if c.size in base.PAPER:
    c.train.steps = 390_000
  return world.at_stage(c, 2)
