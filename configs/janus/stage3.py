"""Stage 3 of Janus, supervised fine-tuning on dialogues: trains everything except the VQ.

  jflow train --config=janus/stage3:pro-1b --workdir=runs/janus3 --config.train.init_from=runs/janus2 ...
  jflow train --config=janus/stage3:tiny --workdir=runs/tiny3               # a minute or two, built-in data

Result: the papers' tables (GenEval 0.61 for Janus, 0.73 and 0.80 for Janus-Pro-1B and -7B); we have not run these
sizes.
"""

from configs.janus import recipe


def get_config(size: str = "1b"):
  return recipe.at_stage(size, 3)
