"""Stage 2, unified pre-training: trains everything except SigLIP and the VAE (paper section 3.3, table 1).

The mixture is 30 : 50 : 20 for the first 10,000 steps, then 14 : 80 : 6. The paper says 390,000 steps, its
slides 380,000.

  jflow train --config=stage2 --workdir=runs/stage2 --config.train.init_from=runs/stage1 ...    # data as for stage 1, and text
  jflow train --config=stage2:tiny --workdir=runs/tiny2                     # a minute or two, built-in data

Time: 8.2e11 tokens, 7.6e21 FLOPs: 37 days of 8 H200 at 30 % of their peak (a step of 4 rows on one: 29.6 %).
Result: the paper reports FID 9.51 on MJHQ-30k and 0.63 on GenEval after stage 3; we have not run this size.
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
