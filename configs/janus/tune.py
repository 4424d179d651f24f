"""Tuning of Janus or Janus-Pro on one's own data, by low-rank adapters beside frozen weights. Not in the papers.

  jflow train --config=janus/tune:pro-1b --workdir=runs/tuned --config.train.init_from=Janus-Pro-1B \\
    --config.data.tokenizer=Janus-Pro-1B "--config.data.sources.generation=(('data/mine',1.0),)" \\
    --config.data.mixture="((0,(0,1,0)),)"
  jflow train --config=janus/tune:tiny --workdir=runs/tiny_tune             # seconds, built-in data

Every matrix of the LLM's blocks, gen_aligner and gen_head gets an adapter. As for JanusFlow (../tune.py), checkpoints hold
base and adapters, and all commands merge them. Nobody has run these sizes.
"""

from configs import tune
from configs.janus import recipe

BLOCKS = ("language_model/layers", "generation_projector/layers_1", "generation_head")  # layers_0 has 8 inputs


def get_config(size: str = "1b"):
  c = recipe.at_stage(size, 3)
  return tune.by_adapters(c, BLOCKS, published=c.size in recipe.PAPER)
