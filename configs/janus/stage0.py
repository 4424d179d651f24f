"""Stage 0 of Janus, only for the built-in world: replaces the pretrained parts of the papers.

Before the first step a tokenizer of patches in place of the VQ is fitted, and a small SigLIP, as in configs/stage0.py.
Then the small LLM is trained on text and, with the aligner, on captions and questions.

  jflow train --config=janus/stage0:shapes --workdir=runs/janus0
  jflow train --config=janus/stage1:shapes --workdir=runs/janus1 --config.train.init_from=runs/janus0     # and so on

Result: a checkpoint for stage 1; it cannot generate images yet.
"""

from configs.janus import recipe


def get_config(size: str = "shapes"):
  if size not in recipe.WORLD_SIZES:
    raise ValueError(f"{size!r} must be {' or '.join(recipe.WORLD_SIZES)}: other sizes have no stage 0")
  return recipe.at_stage(size, 0)
