"""Stage 2 of Janus, unified pre-training: trains everything except SigLIP and the VQ.

  jflow train --config=janus/stage2:pro-1b --workdir=runs/janus2 --config.train.init_from=runs/janus1 ...
  jflow train --config=janus/stage2:tiny --workdir=runs/tiny2               # a minute or two, built-in data

Janus writes ImageNet for the first 120,000 steps and text-to-image pairs for the last 60,000: two runs with other
`data.sources.generation`. Pro leaves ImageNet out. Time: 7 days of 128 A100 for all stages of Janus, 9 days of 128 for
Pro-1B, 14 days of 256 for Pro-7B (papers); we have not run these sizes.
"""

from configs.janus import recipe


def get_config(size: str = "1b"):
  return recipe.at_stage(size, 2)
