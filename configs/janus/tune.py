"""Tuning of Janus or Janus-Pro on one's own data, by low-rank adapters beside frozen weights. Not in the papers.

  jflow train --config=janus/tune:pro-1b --workdir=runs/tuned --config.train.init_from=Janus-Pro-1B \\
    "--config.data.sources.generation=(('data/mine',1.0),)"
  jflow train --config=janus/tune:tiny --workdir=runs/tiny_tune             # a minute or two, built-in data

As for JanusFlow (../tune.py), which says how data, steps and the held-out records are chosen. Sizes: 1b (the default),
pro-1b, pro-7b, each also as pro-1b-heads (aligners, gen_embed and gen_head whole) and pro-1b-full (all but the VQ, as
stage 3). An adapter stands beside every matrix of the LLM's blocks, gen_aligner and gen_head. Nobody has run these
sizes.
"""

from configs import tune
from configs.janus import recipe

BLOCKS = ("language_model/layers", "generation_projector/layers_1", "generation_head")  # layers_0 has 8 inputs


def get_config(size: str = "1b"):
  size, what = tune.split(size)
  c = recipe.at_stage(size, 3)
  c = tune.on_own_data(c, c.size in recipe.PAPER)
  return tune.choose(c, what, BLOCKS, recipe.NEW_PARTS, recipe.NEVER)
