"""Stage 3, supervised fine-tuning: everything but the VAE learns, on dialogues (paper section 3.3, table 1).

python -m jflow train --config=configs/stage3.py --workdir=runs/stage3 --config.train.init_from=runs/stage2
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
