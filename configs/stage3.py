"""Stage 3, supervised fine-tuning: trains everything except the VAE, on dialogues (paper section 3.3, table 1).

  jflow train --config=stage3 --workdir=runs/stage3 --config.train.init_from=runs/stage2 ...    # data as for stage 2
  jflow train --config=stage3:tiny --workdir=runs/tiny3                     # a minute or two, built-in data

Time: 26,000 steps of 1.05 million tokens, 2.6e20 FLOPs: 30 hours of 8 H200 at 30 % of their peak.
Result: the scores of the paper's tables 2 to 4. At :shapes, after stages 0 to 3: of single objects 32 of 32 in the
right color, 5 of 32 in the right shape; at :quick 105 of 128 lone large ones in color and shape.
"""

from configs import base, world


def get_config(size: str = ""):
  c = base.base(size)
  c.data.template = "chat"
  c.data.mixture = ((0, (21, 70, 9)),)
  c.optimizer.learning_rate = 2e-5
  c.train.init_fresh = ("alignment_head",)  # the published checkpoint has none
  c.optimizer.trained = base.NEW_PARTS + ("language_model",) + base.SIGLIP
  c.optimizer.frozen = base.NEVER
  if c.size in base.PAPER:
    c.train.steps, c.train.batch_size, c.optimizer.warmup_steps = 26_000, 256, 1000
  return world.at_stage(c, 3)
