"""Stage 0, only for the built-in world: makes the stand-ins for what the paper takes pretrained.

Before the first step the codec in the VAE's place is fitted in closed form, and the small SigLIP to labels of what its
patches show and where they lie (jflow/world/siglip_fit.py). Then the small LLM learns text, and with the linear aligner to
describe pictures and to answer.

  python -m jflow train --config=configs/stage0.py:shapes --workdir=runs/stage0
"""

from configs import base, world


def get_config(size: str = "shapes"):
  c = base.base(size)
  c.model.alignment_width = 0
  c.objective.weights = dict(text=1.0, flow=0.0, alignment=0.0)
  c.data.mixture = ((0, (80, 0, 20)),)
  reader = ("understanding_projector", "understanding_start")
  c.optimizer.trained = ("language_model",) + reader
  c.optimizer.frozen = (
    tuple(p for p in base.NEW_PARTS if p not in reader + ("alignment_head",)) + base.SIGLIP + base.NEVER
  )
  c.train.fit_labels = 320
  return world.at_stage(c, 0)
