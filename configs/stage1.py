"""Stage 1, adaptation: trains the new parts between frozen LLM, SigLIP and VAE (paper section 3.3, table 1).

  jflow train --config=stage1 --workdir=runs/stage1 --config.train.init_from=runs/parts \\
    --config.data.tokenizer=runs/parts/tokenizer --config.mesh.fsdp=8 --config.train.accumulation=16 \\
    --config.data.sources.understanding="(('DIR', 1.0),)" --config.data.sources.generation="(('DIR', 1.0),)"
  jflow train --config=stage1:tiny --workdir=runs/tiny1                     # a minute or two, built-in data

Time: 10,000 steps of 2.1 million tokens, 1.3e20 FLOPs: 16 hours of 8 H200 at 30 % of their peak.
Result: the losses of flow and alignment fall; the paper gives no numbers, and we have not run this size.
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
