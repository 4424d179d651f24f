"""Stage 0, only for the built-in world: makes the stand-ins for what the paper takes pretrained.

Before the first step the codec in the VAE's place is fitted in closed form, and the small SigLIP to labels of what its
patches show and where they lie (jflow/world/siglip_fit.py). Then the small LLM learns text, and with the linear aligner to
describe pictures and to answer.

  jflow train --config=stage0:shapes --workdir=runs/stage0

Time: two cores take some 14 minutes for the stages 0 to 3 at :shapes.
Result: a checkpoint for stage 1; it reads and paints nothing yet.
"""

from configs import base, world


def get_config(size: str = "shapes"):
  c = base.base(size)
  c.model.objectives = {}
  c.objective.weights = dict(text=1.0, flow=0.0, alignment=0.0)
  c.data.mixture = ((0, (80, 0, 20)),)
  reader = ("understanding_projector", "understanding_start")
  c.optimizer.trained = ("language_model",) + reader
  c.optimizer.frozen = (
    tuple(p for p in base.NEW_PARTS if p not in reader + ("alignment_head",)) + base.SIGLIP + base.NEVER
  )
  c.train.fit_labels = 320
  return world.at_stage(c, 0)
